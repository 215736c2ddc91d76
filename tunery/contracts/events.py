"""What a trainer and its supervisor say to each other: one JSON object a line, both ways, over a unix socket.

Every event carries `seq` (1, 2, 3 ... of this connection), `time` (Unix seconds) and `step` (optimiser steps
done, counted from the job's first attempt). `metrics` and `sample` may be dropped when the reader is slow; the
rest never. The last event is the outcome: `finished`, `stopped` or `failed`.
"""

from pathlib import PurePosixPath
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter

from tunery.states import FailureCode, StopReason

PROTOCOL = 1
MAX_LINE_BYTES = 4 * 1024 * 1024
TICK_TIMEOUT_S = 45.0
"""A trainer that has heard no tick for so long stops by itself: its supervisor is gone or frozen."""


class _Message(BaseModel):
    # NaN and Infinity are not JSON; as strings they survive every parser and come back as floats.
    model_config = ConfigDict(frozen=True, extra="ignore", ser_json_inf_nan="strings")


class _Event(_Message):
    seq: int = 0
    time: float = 0.0
    step: int = 0


_MAX_NAME_BYTES, _MAX_PART_BYTES = 512, 200
"""A name becomes part of an object's key, and of a path wherever the object is fetched or backed up."""


def _plain(name: str) -> str:
    parts = name.split("/")
    if len(name.encode()) > _MAX_NAME_BYTES or not name.isprintable() or "\\" in name:
        raise ValueError("a file's name is printable, and at most 512 bytes long")
    if any(part in ("", ".", "..") or len(part.encode()) > _MAX_PART_BYTES for part in parts):
        raise ValueError("a file's name leads down from its folder, in parts of at most 200 bytes")
    return name


class FileEntry(_Message):
    """One file of a checkpoint or an output folder; `name` is relative, with forward slashes."""

    name: Annotated[str, AfterValidator(_plain)]
    bytes: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


def _apart(files: list[FileEntry]) -> list[FileEntry]:
    names = {file.name for file in files}
    folders = {str(above) for name in names for above in PurePosixPath(name).parents}
    if len(names) != len(files) or names & folders:
        raise ValueError("two files have one name, or one is a folder of another")
    return files


Files = Annotated[list[FileEntry], AfterValidator(_apart)]
"""All files of one folder."""


class Started(_Event):
    type: Literal["started"] = "started"
    protocol: int = PROTOCOL
    device: str
    precision: str
    trainable_parameters: int
    total_parameters: int
    total_steps: int
    start_step: int
    train_rows: int
    eval_rows: int
    truncated_rows: int = 0
    versions: dict[str, str] = {}


class Phase(_Event):
    """`loading`, `evaluating`, `sampling`, `training` or `saving` begins; the one before it has ended."""

    type: Literal["phase"] = "phase"
    phase: str


class Metrics(_Event):
    """One step's numbers under Hugging Face's names. `tokens` counts trained tokens since the job began."""

    type: Literal["metrics"] = "metrics"
    values: dict[str, float]
    tokens: int = 0
    total_steps: int = 0


class Eval(_Event):
    type: Literal["eval"] = "eval"
    when: Literal["before", "during", "after"]
    values: dict[str, float]


class Sample(_Event):
    type: Literal["sample"] = "sample"
    model: Literal["base", "tuned"]
    index: int
    prompt: str
    expected: str
    output: str


class Checkpoint(_Event):
    """A complete checkpoint lies in `path`. The trainer never deletes one; the supervisor does, once stored."""

    type: Literal["checkpoint"] = "checkpoint"
    path: str
    files: Files
    metrics: dict[str, float] = {}


class Warning(_Event):
    type: Literal["warning"] = "warning"
    code: str
    message: str


class Finished(_Event):
    type: Literal["finished"] = "finished"
    path: str
    files: Files
    tokens: int
    metrics: dict[str, float] = {}
    peak_memory_bytes: int = 0


class Stopped(_Event):
    type: Literal["stopped"] = "stopped"
    reason: StopReason
    tokens: int = 0


class Failed(_Event):
    type: Literal["failed"] = "failed"
    code: FailureCode
    message: str
    peak_memory_bytes: int = 0
    """The most that was held at once; 0 where nobody measured it."""


Event = Annotated[
    Started | Phase | Metrics | Eval | Sample | Checkpoint | Warning | Finished | Stopped | Failed,
    Field(discriminator="type"),
]
EVENTS: TypeAdapter[Event] = TypeAdapter(Event)
OUTCOMES = (Finished, Stopped, Failed)
DROPPABLE = (Metrics, Sample)


class Tick(_Message):
    type: Literal["tick"] = "tick"


class Stop(_Message):
    """Stop at the next step boundary, with a checkpoint if asked; killed after `deadline_s` seconds."""

    type: Literal["stop"] = "stop"
    reason: StopReason
    checkpoint: bool
    deadline_s: float


class Stored(_Message):
    """The checkpoint of `step` is in the object store and recorded."""

    type: Literal["stored"] = "stored"
    step: int


Command = Annotated[Tick | Stop | Stored, Field(discriminator="type")]
COMMANDS: TypeAdapter[Command] = TypeAdapter(Command)


class Attach(_Message):
    """Supervisor to engine, one line on the engine's own socket: take this attempt, then connect to its socket."""

    type: Literal["attach"] = "attach"
    spec: str


EXIT_OK, EXIT_USER, EXIT_OURS, EXIT_MEMORY, EXIT_STOPPED = 0, 64, 70, 71, 75
"""A trainer's exit codes; read only when no outcome event came."""
