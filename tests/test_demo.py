"""`make demo` keeps its word: what it says is recomputed with plain transformers and PEFT."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.servers import temporary_home

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).parent.parent
HELD_OUT = [json.loads(line)["messages"] for line in (ROOT / "examples/validation.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    made = temporary_home()
    yield made.root
    run(made.root, "-m", "tunery.cli", "down", "--purge", "-y")


def run(home: Path, *arguments: str) -> str:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("TUNERY_")}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=clean | {"TUNERY_HOME": str(home), "NO_COLOR": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def test_the_demo_improves_the_model_as_much_as_it_says(home: Path, tmp_path: Path) -> None:
    said = run(home, "scripts/demo.py")
    before, after = map(float, re.search(r"^eval loss (\S+) -> (\S+)$", said, re.MULTILINE).groups())  # type: ignore[union-attr]
    right_before, right_after = map(int, re.search(r"^exact match (\d+)% -> (\d+)%", said, re.MULTILINE).groups())  # type: ignore[union-attr]
    assert after <= 0.75 * before
    assert right_before <= 20
    assert right_after >= 60

    adapter = tmp_path / "adapter"
    run(home, "-m", "tunery.cli", "adapters", "download", "ticket-router", "-o", str(adapter))
    folder = next((home / "node" / "models").glob("*/config.json")).parent
    base_loss, base_right = measure(folder, None)
    tuned_loss, tuned_right = measure(folder, adapter)
    assert base_loss == pytest.approx(before, rel=0.02)
    assert tuned_loss == pytest.approx(after, rel=0.02)
    assert abs(base_right * 100 - right_before) <= 2
    assert abs(tuned_right * 100 - right_after) <= 2


def measure(folder: Path, adapter: Path | None) -> tuple[float, float]:
    """Mean loss of the held-out answers' tokens, and the share answered exactly; none of our code takes part."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    model.eval()
    total, tokens, right = 0.0, 0, 0
    for messages in HELD_OUT:
        wanted = messages[-1]["content"]
        prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        question = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
        answer = tokenizer(wanted + "<|im_end|>", add_special_tokens=False, return_tensors="pt").input_ids
        ids = torch.cat([question, answer], dim=1)
        with torch.no_grad():
            logits = model(ids).logits[0, question.shape[1] - 1 : -1].double()
            written = model.generate(question, max_new_tokens=24, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        total += torch.nn.functional.cross_entropy(logits, answer[0], reduction="sum").item()
        tokens += answer.shape[1]
        right += tokenizer.decode(written[0, question.shape[1] :], skip_special_tokens=True).strip() == wanted
    return total / tokens, right / len(HELD_OUT)
