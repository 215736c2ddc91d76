"""What the history checker judges: what users were told, what Postgres and the store hold, what was seen meanwhile."""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Told:
    """What one client was told of one job."""

    job_id: str
    """As on the wire."""
    statuses: list[str] = field(default_factory=list)
    """OpenAI's, in the order seen, without repeats in a row."""
    cancelled: bool = False
    """A cancel was asked for, whether or not its answer came back."""
    bad: bool = False
    """Its rows are not sound: it must fail, and say so."""


@dataclass(frozen=True)
class Version:
    job_id: uuid.UUID
    attempt_id: uuid.UUID
    files: dict[str, str]
    """Object key and the sha256 that was published."""


@dataclass(frozen=True)
class Stored:
    """A checkpoint that is not deleted."""

    job_id: uuid.UUID
    step: int
    keys: frozenset[str]


@dataclass(frozen=True)
class Try:
    """An attempt, and what it reported."""

    id: uuid.UUID
    job_id: uuid.UUID
    no: int
    fence: int
    state: str
    start_step: int
    failure: str
    steps: tuple[int, ...]
    """Steps whose loss is stored under it, in order."""
    log: str
    ended_at: float | None = None
    """Seconds since 1970, by Postgres."""
    project_id: uuid.UUID | None = None
    began: float = 0
    """When it was assigned; this and the following are seconds since 1970, too."""
    asked: tuple[float, float] | None = None
    """When an operator or a budget asked it to stop, and by when it had to be gone."""
    kept: int = 0
    """The newest step of which it stored a checkpoint."""
    node: str = ""
    """Of which it had its devices, as the deployment calls it."""


@dataclass(frozen=True)
class Ended:
    """A job at the end."""

    id: uuid.UUID
    state: str
    error: str
    total_steps: int
    event_seqs: tuple[int, ...]
    terminal_events: int


@dataclass(frozen=True)
class Blocked:
    """A time, in seconds of the database's clock, in which a used-up budget was in force without a pause."""

    project_id: uuid.UUID
    since: float
    """Somebody saw that the project was blocked."""
    until: float
    """The order to lift it had not been sent yet."""
    said: dict[uuid.UUID, str] = field(default_factory=dict)
    """At the end: of each of its jobs that had been waiting for a while, the code of its reason."""


@dataclass(frozen=True)
class Hurt:
    """A fault from its beginning until it is got over, in seconds since 1970; it excuses only what it can touch."""

    since: float
    until: float
    kind: str
    """Of the victim, as `nemesis` calls it."""
    node: str = ""
    """Whose process, link or disk it was."""
    attempt: uuid.UUID | None = None
    """Whose trainer or supervisor it was."""

    def touches(self, each: Try) -> bool:
        """What a supervisor needs to stop in order: its trainer, its node's disk and links, Postgres. Nobody else
        has a part in that: Valkey only makes it hear sooner."""
        match self.kind:
            case "postgres" | "backends":
                return True
            case "trainer" | "supervisor":
                return self.attempt == each.id
            case "node" | "disk" | "node-postgres" | "node-s3":
                return self.node == each.node
        return False

    def touches_the_queue(self) -> bool:
        """What the scheduler needs to say why a job waits."""
        return self.kind in ("scheduler", "scheduler-postgres", "postgres", "backends")


@dataclass(frozen=True)
class Books:
    """The ledger as two sides tell it, in GPU-seconds of this month."""

    project_id: uuid.UUID
    told: float
    """What the project is told that it has used."""
    charged: float
    """What the rows of its ended attempts add up to."""


@dataclass
class History:
    told: list[Told]
    jobs: dict[uuid.UUID, Ended]
    tries: list[Try]
    versions: list[Version]
    checkpoints: list[Stored]
    objects: dict[str, str | None]
    """Every key under `a/`; the sha256 of those that were published."""
    held: list[str]
    """Allocations, slots and leases that nothing gave back."""
    processes: dict[str, list[int]]
    """Attempt and the processes that still carry its mark."""
    logs: dict[str, str]
    """Program and what it wrote."""
    scheduling: list[str] = field(default_factory=list)
    """What Postgres' own record says against the scheduler: see `record`."""
    killed: dict[uuid.UUID, float] = field(default_factory=dict)
    """Attempts of which a process was killed, and when."""
    hurt: Sequence[Hurt] = ()
    blocked: Sequence[Blocked] = ()
    books: Sequence[Books] = ()
    detection_s: float = 90
    """A dead process is noticed, and its attempt ended, within so long."""

    def detections(self) -> list[float]:
        """Seconds from each kill to the end of the attempt that it cost; one that was done anyway is none."""
        return [
            each.ended_at - self.killed[each.id]
            for each in self.tries
            if each.id in self.killed and each.ended_at is not None and each.state in ("lost", "failed")
        ]
