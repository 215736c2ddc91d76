"""Rows: reading a user's JSONL, naming what is wrong with it, and the checked rows made from it.

Reading is a stream: memory does not grow with the file. Errors carry line numbers; the first `MAX_ERRORS` are kept,
all are counted.
"""

import hashlib
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import msgspec
from sqlalchemy import select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from tunery.ids import uuid7
from tunery.models import Dataset

CHECKER = "1"
"""Raised whenever these rules change, so that rows checked by older rules are checked again."""
MAX_LINE_BYTES = 1024 * 1024
MAX_ERRORS = 50
MAX_DEPTH = 32
MIN_ROWS = 10
_BOM = b"\xef\xbb\xbf"
_BLOCK = 1024 * 1024


@dataclass(frozen=True)
class RowError:
    """`line` counts from 1."""

    line: int
    message: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.message}"


@dataclass
class Report:
    """What one pass over a file found."""

    rows: int = 0
    shape: str | None = None
    max_row_bytes: int = 0
    error_count: int = 0
    errors: list[RowError] = field(default_factory=list)

    def add(self, line: int, message: str) -> None:
        self.error_count += 1
        if len(self.errors) < MAX_ERRORS:
            self.errors.append(RowError(line, message))


class Message(msgspec.Struct, forbid_unknown_fields=True):
    role: str
    content: str
    name: str | None = None
    weight: int | None = None


class ChatRow(msgspec.Struct):
    messages: list[Message]


class PromptRow(msgspec.Struct):
    prompt: str
    completion: str


class AlpacaRow(msgspec.Struct):
    instruction: str
    output: str
    input: str = ""


class TextRow(msgspec.Struct):
    text: str


_SHAPES: dict[str, tuple[str, msgspec.json.Decoder[Any]]] = {
    "messages": ("chat", msgspec.json.Decoder(ChatRow)),
    "prompt": ("prompt_completion", msgspec.json.Decoder(PromptRow)),
    "instruction": ("prompt_completion", msgspec.json.Decoder(AlpacaRow)),
    "text": ("text", msgspec.json.Decoder(TextRow)),
}
ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
"""The prompts of Stanford Alpaca (Taori et al. 2023), byte for byte: models trained on them expect them."""
Row = ChatRow | PromptRow | AlpacaRow | TextRow
_ANY = msgspec.json.Decoder()
_ENCODER = msgspec.json.Encoder()
_ROLES = ("system", "user", "assistant")
_NOT_YET = {
    "preferred_output": "preference rows (`input`, `preferred_output`, `non_preferred_output`) are not supported yet",
    "tools": "`tools` are not supported yet",
}


def lines(stream: BinaryIO | Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """Number and bytes of each non-empty line. A line over `MAX_LINE_BYTES` comes cut, never whole."""
    blocks = iter(lambda: stream.read(_BLOCK), b"") if hasattr(stream, "read") else iter(stream)  # type: ignore[union-attr]
    rest, number, first = b"", 0, True
    for block in blocks:
        if first:
            block, first = block.removeprefix(_BOM), False
        *whole, rest = (rest + block).split(b"\n")
        for line in whole:
            number += 1
            if line.strip():
                yield number, line
        rest = rest[: MAX_LINE_BYTES + 1]
    if rest.strip():
        yield number + 1, rest


def check_json(stream: BinaryIO) -> Report:
    """Is every line a JSON object? What an upload must pass; the shape of rows is checked when a job is made."""
    report = Report()
    for number, line in lines(stream):
        report.rows += 1
        _parse(report, number, line)
    return report


def normalise(stream: Iterable[bytes], out: BinaryIO) -> Report:
    """Check every row and write the sound ones, one compact JSON object a line, in one shape."""
    report = Report()
    for number, line in lines(stream):
        row = _parse(report, number, line)
        if row is None or (shape := _shape(report, number, row)) is None:
            continue
        name, decoder = shape
        if report.shape is None:
            report.shape = name
        elif report.shape != name:
            report.add(number, f"a '{name}' row in a file whose first row is '{report.shape}'; use one shape")
            continue
        try:
            typed = decoder.decode(line)
        except msgspec.ValidationError as error:
            report.add(number, _explain(error))
            continue
        if problem := _problem(typed):
            report.add(number, problem)
            continue
        encoded = _ENCODER.encode(_clean(typed))
        out.write(encoded + b"\n")
        report.rows += 1
        report.max_row_bytes = max(report.max_row_bytes, len(encoded))
    return report


def _parse(report: Report, number: int, line: bytes) -> dict[str, Any] | None:
    if len(line) > MAX_LINE_BYTES:
        report.add(number, f"longer than {MAX_LINE_BYTES:,} bytes")
        return None
    try:
        row = _ANY.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        report.add(number, f"not valid JSON ({_explain(error)})")
        return None
    except RecursionError:
        report.add(number, "nested too deeply")
        return None
    if not isinstance(row, dict):
        report.add(number, f"a JSON object is expected, not {type(row).__name__}")
        return None
    if _depth(row) > MAX_DEPTH:
        report.add(number, f"nested deeper than {MAX_DEPTH} levels")
        return None
    return row


def _depth(value: Any) -> int:
    """Levels of nesting, walked without recursion."""
    level, deepest = [value], 0
    while level and deepest <= MAX_DEPTH:
        deepest += 1
        children = (v.values() if isinstance(v, dict) else v for v in level if isinstance(v, dict | list))
        level = [child for group in children for child in group if isinstance(child, dict | list)]
    return deepest


def _shape(report: Report, number: int, row: dict[str, Any]) -> tuple[str, msgspec.json.Decoder[Any]] | None:
    for key, reason in _NOT_YET.items():
        if row.get(key):
            report.add(number, reason)
            return None
    for key, shape in _SHAPES.items():
        if key in row:
            return shape
    report.add(
        number,
        "expected 'messages', 'prompt' and 'completion', 'instruction' and 'output', or 'text'; found "
        + ", ".join(sorted(row)[:6]),
    )
    return None


def _problem(row: Row) -> str | None:
    if isinstance(row, TextRow):
        return None if row.text.strip() else "'text' is empty"
    if isinstance(row, PromptRow):
        return None if row.completion.strip() else "'completion' is empty"
    if isinstance(row, AlpacaRow):
        return None if row.instruction.strip() and row.output.strip() else "'instruction' or 'output' is empty"
    if not row.messages:
        return "'messages' is empty"
    for index, message in enumerate(row.messages):
        where = f"messages[{index}]"
        if message.role not in _ROLES:
            return f"{where}.role is '{message.role[:20]}'; expected system, user or assistant"
        if message.role == "system" and index:
            return f"{where}: a system message may only come first"
        if message.role == "assistant" and not message.content.strip():
            return f"{where}: the assistant's message is empty"
        if message.weight not in (None, 0, 1):
            return f"{where}.weight must be 0 or 1"
    if row.messages[-1].role != "assistant":
        return "the last message must be from the assistant"
    if all(message.role != "assistant" or message.weight == 0 for message in row.messages):
        return "no assistant message is trained: every weight is 0"
    return None


def _clean(row: Row) -> dict[str, Any]:
    """The row without what means nothing to training."""
    if isinstance(row, ChatRow):
        kept = []
        for message in row.messages:
            item: dict[str, Any] = {"role": message.role, "content": message.content}
            if message.role == "assistant" and message.weight == 0:
                item["weight"] = 0
            kept.append(item)
        return {"messages": kept}
    if isinstance(row, AlpacaRow):
        template = ALPACA_WITH_INPUT if row.input.strip() else ALPACA
        return {"prompt": template.format(instruction=row.instruction, input=row.input), "completion": row.output}
    return msgspec.to_builtins(row)


def _explain(error: Exception) -> str:
    """msgspec's words, with its `$.messages[0]` path in ours."""
    return str(error).replace("`$.", "`").replace("Object ", "").rstrip(".")


def digest(stream: BinaryIO) -> tuple[int, str]:
    """Size in bytes and sha256 of a stream."""
    size, sha = 0, hashlib.sha256()
    while block := stream.read(_BLOCK):
        size += len(block)
        sha.update(block)
    return size, sha.hexdigest()


def find(session: Session, project_id: uuid.UUID, source_sha256: str) -> Dataset | None:
    """Rows already made from these bytes, by these rules."""
    same = (Dataset.project_id == project_id, Dataset.source_sha256 == source_sha256, Dataset.checker == CHECKER)
    return session.scalar(select(Dataset).where(*same))


def get(session: Session, dataset_id: uuid.UUID) -> Dataset:
    return session.get_one(Dataset, dataset_id)


def record(
    session: Session,
    project_id: uuid.UUID,
    *,
    source_sha256: str,
    sha256: str,
    object_key: str,
    size: int,
    report: Report,
) -> Dataset:
    """Remember checked rows; of two tasks that checked the same bytes at once, the first one's stay."""
    made = insert(Dataset).values(
        id=uuid7(),
        project_id=project_id,
        source_sha256=source_sha256,
        checker=CHECKER,
        sha256=sha256,
        object_key=object_key,
        bytes=size,
        rows=report.rows,
        shape=report.shape,
        max_row_bytes=report.max_row_bytes,
    )
    session.execute(made.on_conflict_do_nothing(index_elements=["project_id", "source_sha256", "checker"]))
    known = find(session, project_id, source_sha256)
    assert known is not None, "inserted, or there before"
    return known
