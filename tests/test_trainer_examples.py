"""The example data: sizes, labels, and that no held-out row is a training row in other words."""

import json
import re
from collections import Counter
from pathlib import Path

from tunery.contracts.spec import Recipe

EXAMPLES = Path(__file__).parents[1] / "examples"
TEAMS = {"billing": "finance", "delivery": "logistics", "login": "identity", "bug": "engineering"}
TOO_CLOSE = 0.6


def messages(name: str) -> list[tuple[str, str]]:
    """The customer's words and the ticket of each row."""
    rows = [json.loads(line) for line in (EXAMPLES / name).read_text().splitlines()]
    return [(row["messages"][-2]["content"], row["messages"][-1]["content"]) for row in rows]


def likeness(one: str, other: str) -> float:
    """Jaccard similarity of two texts' sets of words."""
    words, others = (set(re.findall(r"[a-z0-9']+", text.lower())) for text in (one, other))
    return len(words & others) / len(words | others)


def test_every_ticket_follows_the_rule_and_all_kinds_are_equally_common():
    for name, each in (("train.jsonl", 16), ("validation.jsonl", 4)):
        tickets = Counter(ticket for _, ticket in messages(name))
        rule = {
            f"{category} | {priority} | {team}" for category, team in TEAMS.items() for priority in ("normal", "high")
        }
        assert tickets == dict.fromkeys(rule, each)


def test_a_fifth_is_held_out_and_nothing_is_repeated():
    train, held_out = messages("train.jsonl"), messages("validation.jsonl")
    assert len(train) + len(held_out) >= 120
    assert len(held_out) / (len(train) + len(held_out)) == 0.2
    assert len(dict(train + held_out)) == len(train) + len(held_out)


def test_no_held_out_row_is_near_a_training_row():
    train = [text for text, _ in messages("train.jsonl")]
    near = [
        (text, other)
        for text, _ in messages("validation.jsonl")
        for other in train
        if likeness(text, other) >= TOO_CLOSE
    ]
    assert near == []


def test_the_prompts_do_not_give_the_format_away():
    for name in ("train.jsonl", "validation.jsonl"):
        assert not [text for text, _ in messages(name) if "|" in text]


def test_the_demo_recipe_is_a_recipe():
    recipe = Recipe.model_validate_json((EXAMPLES / "demo-recipe.json").read_text())
    assert recipe.training.max_steps == 40
    assert recipe.evaluation.exact_match
