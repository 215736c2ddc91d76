"""From validated rows to token ids and labels. The masking is ours: no library decides what is trained.

* chat rows (`messages`): the model's own template; loss on assistant turns with their end-of-turn token, not on the
  header before them, and not on turns of `weight` 0.
* `prompt` and `completion`: loss on the completion and the end-of-sequence token.
* `text`: loss on everything and the end-of-sequence token.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.failures import TrainingFailed
from tunery.states import FailureCode

IGNORED = -100
"""The label of a token without loss, as torch and transformers read it."""


@dataclass(frozen=True)
class Example:
    """One row as the model sees it; both lists have the same length."""

    input_ids: list[int]
    labels: list[int]

    @property
    def loss_tokens(self) -> int:
        return sum(label != IGNORED for label in self.labels)


@dataclass(frozen=True)
class Question:
    """A held-out row as a prompt to answer: `prompt_ids` for the model, the two texts for people."""

    index: int
    prompt_ids: list[int]
    prompt: str
    expected: str


@dataclass
class Prepared:
    """A file's examples, and how many rows were cut to `max_length` or left out with nothing to train on."""

    examples: list[Example] = field(default_factory=list)
    truncated: int = 0
    dropped: int = 0


def read_rows(path: str, code: FailureCode) -> list[dict[str, Any]]:
    """Read one JSON object a line.

    Raises:
        TrainingFailed: with `code`, naming the line.
    """
    rows = []
    with Path(path).open(encoding="utf-8") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise TrainingFailed(code, f"Line {number} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise TrainingFailed(code, f"Line {number} is not a JSON object.")
            rows.append(row)
    return rows


def prepare(rows: list[dict[str, Any]], tokenizer: Any, max_length: int, code: FailureCode) -> Prepared:
    """Render, mask and cut every row.

    Raises:
        TrainingFailed: with `code`, for a row of no known shape, or when no row has anything left to train on.
    """
    prepared = Prepared()
    for number, row in enumerate(rows, start=1):
        example = _render(row, tokenizer, number, code)
        if len(example.input_ids) > max_length:
            prepared.truncated += 1
            example = Example(example.input_ids[:max_length], example.labels[:max_length])
        if example.loss_tokens:
            prepared.examples.append(example)
        else:
            prepared.dropped += 1
    if not prepared.examples:
        reason = f"all {len(rows)} rows have their trained tokens beyond max_length {max_length}" if rows else "no rows"
        raise TrainingFailed(code, f"Nothing to train on: {reason}.")
    return prepared


def question(row: dict[str, Any], tokenizer: Any, index: int) -> Question | None:
    """A row as a prompt and the answer expected, or None where there is nothing to answer (`text`)."""
    if "messages" in row:
        messages = _plain(row["messages"])
        last = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=None)
        if last is None or not isinstance(messages[last].get("content"), str):
            return None
        ids = _template(tokenizer, messages[:last], row.get("tools"), header=True)
        asked = next((m["content"] for m in reversed(messages[:last]) if m["role"] == "user"), "")
        return Question(index, ids, str(asked), messages[last]["content"])
    if "prompt" in row:
        return Question(index, _prompt_ids(tokenizer, row["prompt"]), row["prompt"], row["completion"])
    return None


def _render(row: dict[str, Any], tokenizer: Any, number: int, code: FailureCode) -> Example:
    if isinstance(row.get("messages"), list):
        example = _chat(row, tokenizer, number, code)
    elif isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str):
        prompt = _prompt_ids(tokenizer, row["prompt"])
        answer = [*_ids(tokenizer, row["completion"]), tokenizer.eos_token_id]
        example = Example(prompt + answer, [IGNORED] * len(prompt) + answer)
    elif isinstance(row.get("text"), str):
        ids = [*_prompt_ids(tokenizer, row["text"]), tokenizer.eos_token_id]
        example = Example(ids, list(ids))
    else:
        raise TrainingFailed(code, f"Row {number} has neither `messages`, `prompt` and `completion`, nor `text`.")
    # No token predicts the first one. Masked here, every counter of loss tokens agrees with the loss.
    return Example(example.input_ids, [IGNORED, *example.labels[1:]])


def _chat(row: dict[str, Any], tokenizer: Any, number: int, code: FailureCode) -> Example:
    weights = [_weight(message) for message in row["messages"]]
    messages = _plain(row["messages"])
    if tokenizer.chat_template is None:
        raise TrainingFailed(
            FailureCode.INVALID_SPEC, "The base model has no chat template; use prompt/completion rows."
        )
    try:
        if "{% generation" in tokenizer.chat_template or "{%- generation" in tokenizer.chat_template:
            return _by_generation_block(messages, weights, row.get("tools"), tokenizer, number)
        return _by_prefix(messages, weights, row.get("tools"), tokenizer, number)
    except TrainingFailed:
        raise
    except Exception as error:  # whatever a model's own template raises: Jinja errors, type errors
        raise TrainingFailed(code, f"Row {number}: the model's chat template refused it: {error}"[:500]) from error


def _by_generation_block(
    messages: list[dict[str, Any]], weights: list[int], tools: Any, tokenizer: Any, number: int
) -> Example:
    """Where the template marks what the assistant generates, its marks are the mask."""
    encoded = tokenizer.apply_chat_template(
        messages, tools=tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, mask = list(encoded["input_ids"]), list(encoded["assistant_masks"])
    runs = _runs(mask)
    spoken = [weight for message, weight in zip(messages, weights, strict=True) if message["role"] == "assistant"]
    if len(runs) != len(spoken):
        if all(spoken):  # nothing to tell apart, so the marks are right however many runs they make
            spoken = [1] * len(runs)
        else:
            raise TrainingFailed(
                FailureCode.INVALID_SPEC,
                f"Row {number}: the chat template marks {len(runs)} assistant turns of {len(spoken)}; "
                "weights cannot be applied.",
            )
    labels = [IGNORED] * len(ids)
    for (start, end), weight in zip(runs, spoken, strict=True):
        if end < len(ids) and ids[end] == tokenizer.eos_token_id and ids[end - 1] != tokenizer.eos_token_id:
            end += 1  # a block closed before the end-of-turn token would teach the model never to stop
        if weight:
            labels[start:end] = ids[start:end]
    return Example(ids, labels)


def _by_prefix(messages: list[dict[str, Any]], weights: list[int], tools: Any, tokenizer: Any, number: int) -> Example:
    """Without marks: the tokens that appear between a turn's header and its end are what the assistant generates."""
    ids = _template(tokenizer, messages, tools)
    labels = [IGNORED] * len(ids)
    for turn, (message, weight) in enumerate(zip(messages, weights, strict=True)):
        if message["role"] != "assistant" or not weight:
            continue
        before = _template(tokenizer, messages[:turn], tools, header=True)
        through = _template(tokenizer, messages[: turn + 1], tools)
        if through[: len(before)] != before or ids[: len(through)] != through:
            raise TrainingFailed(
                FailureCode.INVALID_SPEC,
                f"Row {number}: the base model's chat template rewrites earlier turns, so what to train cannot be "
                "told. Use a base model whose template has generation marks, or prompt/completion rows.",
            )
        end = _turn_end(through, len(before), tokenizer)
        labels[len(before) : end] = ids[len(before) : end]
    return Example(ids, labels)


def _turn_end(ids: list[int], start: int, tokenizer: Any) -> int:
    """Where a turn ends: after its end-of-turn token, before white space that the template adds behind it."""
    end = len(ids)
    while (
        end > start and ids[end - 1] not in tokenizer.all_special_ids and not tokenizer.decode([ids[end - 1]]).strip()
    ):
        end -= 1
    return end if end > start and ids[end - 1] in tokenizer.all_special_ids else len(ids)


def _template(tokenizer: Any, messages: list[dict[str, Any]], tools: Any, *, header: bool = False) -> list[int]:
    if not messages and not header:
        return []
    encoded = tokenizer.apply_chat_template(
        messages, tools=tools, tokenize=True, return_dict=True, add_generation_prompt=header
    )
    return list(encoded["input_ids"])


def _plain(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages without `weight`, which is for us and not for the model's template."""
    return [{key: value for key, value in message.items() if key != "weight"} for message in messages]


def _weight(message: dict[str, Any]) -> int:
    weight = message.get("weight")
    return 1 if weight is None else int(weight)


def _prompt_ids(tokenizer: Any, text: str) -> list[int]:
    """With the beginning token, if the model wants one, and never with the end token."""
    ids = list(tokenizer(text)["input_ids"])
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id and not text.endswith(tokenizer.eos_token) else ids


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _runs(mask: list[int]) -> list[tuple[int, int]]:
    """Half-open spans of ones."""
    runs, start = [], None
    for position, value in enumerate([*mask, 0]):
        if value and start is None:
            start = position
        elif not value and start is not None:
            runs.append((start, position))
            start = None
    return runs
