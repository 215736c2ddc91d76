"""What the scheduling policy sees and what it may decide. Plain values: the policy is a pure function of them.

Times are seconds of the database's clock since the epoch. Cost is GPU-seconds times the class's cost: one second on
two GPUs of cost 0.5 costs 1. A rate is the cost of a second.
"""

import math
import uuid
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum


@dataclass(frozen=True, slots=True)
class GpuView:
    """One healthy device. `held_by` is the one project that shares it; None where it is empty, or held whole."""

    id: uuid.UUID
    node_id: uuid.UUID
    name: str
    kind: str
    usable_bytes: int
    free_bytes: int
    gpu_class: str = "any"
    cost: float = 1.0
    held_by: uuid.UUID | None = None


@dataclass(frozen=True, slots=True)
class NodeView:
    """A node that is up. One that is not `schedulable` (cordoned, draining, silent, full) is seen to explain waits."""

    id: uuid.UUID
    name: str
    free_slots: int
    gpus: tuple[GpuView, ...]
    labels: frozenset[tuple[str, str]] = frozenset()
    schedulable: bool = True
    why_not: str = ""
    """`cordoned`, `draining`, `silent` or `its disk is full`; empty while schedulable."""


@dataclass(frozen=True, slots=True)
class EngineView:
    """A resident base model that jobs with the same `key` may join; its bytes are allocated already."""

    id: uuid.UUID
    node_id: uuid.UUID
    gpu_id: uuid.UUID
    organization_id: uuid.UUID
    key: str


@dataclass(frozen=True, slots=True)
class JobView:
    """A job that waits. `required_bytes` is its estimate for each of its `gpus`, all on one node."""

    id: uuid.UUID
    organization_id: uuid.UUID
    project_id: uuid.UUID
    queued_at: float
    """Its original submission, whatever happened to it since."""
    gpus: int
    required_bytes: int
    priority: int = 0
    """Inside its project only."""
    urgent: bool = False
    """Operators may put a job before every project's."""
    limit_s: float = 1800.0
    """Time it may still hold its GPUs; enforced."""
    gpu_class: str | None = None
    """Only on this class; None is any."""
    labels: frozenset[tuple[str, str]] = frozenset()
    """Only on nodes that have all of these."""
    shareable: bool = False
    """May run beside other shareable jobs of its own project on one GPU."""
    preemptible: bool = True
    preemptions: int = 0
    """Within the policy's window."""
    engine_key: str | None = None
    """Base model, revision, precision and device: jobs with equal keys may train over one resident base."""
    engine_bytes: int = 0
    """Its own bytes inside an engine, the base not counted."""


@dataclass(frozen=True, slots=True)
class RunningView:
    """An attempt that holds GPUs. Also one that has ended, while nobody has seen its trainer die (`ended`)."""

    attempt_id: uuid.UUID
    job_id: uuid.UUID
    organization_id: uuid.UUID
    project_id: uuid.UUID
    node_id: uuid.UUID
    gpu_ids: tuple[uuid.UUID, ...]
    bytes_per_gpu: int
    exclusive: bool
    rate: float
    """Cost of a second of it."""
    started_at: float
    limit_s: float
    """Of this attempt: it is stopped at `started_at + limit_s`, and gone a grace later."""
    queued_at: float = 0.0
    priority: int = 0
    preemptible: bool = True
    preemptions: int = 0
    checkpoint_at: float | None = None
    """When its newest checkpoint was stored; None before the first."""
    overhead_s: float = 0.0
    """Loading plus writing one checkpoint: what a pre-emption costs it."""
    stopping: bool = False
    """It has been asked to stop, for whatever reason."""
    stops_at: float | None = None
    """By then it is killed, once asked."""
    ended: bool = False
    engine_id: uuid.UUID | None = None


@dataclass(frozen=True, slots=True)
class Tenant:
    """A project or an organization as the policy weighs it."""

    id: uuid.UUID
    organization_id: uuid.UUID
    """Of an organization: itself."""
    weight: float = 1.0
    guarantee: float = 0.0
    """Rate that it gets before anybody's share is looked at."""
    cap: float = math.inf
    """Rate that it never exceeds."""
    service: float = 0.0
    """Cost it has been given up to `Snapshot.now`, live attempts included, lost work refunded."""
    active: bool = False
    """It had live or waiting jobs at the last pass."""
    max_running: int | None = None
    """Live attempts at once; None is no limit."""
    blocked: str = ""
    """Why none of its jobs may start, e.g. its budget is used up. Empty: they may."""
    dedicated: bool = False
    """Never shares an engine."""


class HoldKind(StrEnum):
    GANG = "gang"
    """EASY: the first job of its class that did not fit, with more than one GPU, keeps its place until it starts."""
    PREEMPTION = "preemption"
    """GPUs that others are being moved off for this job."""


@dataclass(frozen=True, slots=True)
class Hold:
    """GPUs kept for a waiting job, from pass to pass."""

    job_id: uuid.UUID
    kind: HoldKind
    gpu_class: str
    node_id: uuid.UUID
    gpu_ids: tuple[uuid.UUID, ...]
    """Of a pre-emption: exactly these. Of a gang: any of its node's, none named."""
    promised_at: float
    """It starts by then; never later than first promised while its node stays healthy."""


@dataclass(frozen=True, slots=True)
class PastPreemption:
    """One that was asked for within the policy's window; keeps two projects from taking turns."""

    beneficiary: uuid.UUID
    victim: uuid.UUID
    at: float


@dataclass(frozen=True, slots=True)
class PolicySettings:
    """Every constant of the policy. `docs/scheduler.md` says where each comes from."""

    tau_s: float = 600.0
    """Look-ahead of the score `(S + tau * rate) / weight`."""
    depth: int = 100
    """So many waiting jobs of each project are looked at in one pass."""
    preemption: bool = True
    min_runtime_s: float = 900.0
    """A victim has run so long, or three times its overhead if that is longer."""
    grace_s: float = 120.0
    """From being asked to stop to being killed."""
    max_preemptions: int = 3
    """Of one job within `window_s`; then it is left alone."""
    window_s: float = 86400.0
    sharing: bool = True
    """Several attempts of one project on one GPU, where all agree."""
    engines: bool = False
    """Jobs with equal engine keys join one resident base."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What there is at one moment. Rows may come in any order; the decisions do not depend on it."""

    jobs: tuple[JobView, ...]
    nodes: tuple[NodeView, ...]
    now: float = 0.0
    running: tuple[RunningView, ...] = ()
    projects: tuple[Tenant, ...] = ()
    organizations: tuple[Tenant, ...] = ()
    holds: tuple[Hold, ...] = ()
    engines: tuple[EngineView, ...] = ()
    preemptions: tuple[PastPreemption, ...] = ()
    settings: PolicySettings = field(default_factory=PolicySettings)


# ---- decisions ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Start:
    """Run this job on these GPUs of one node; with an engine, inside it."""

    job_id: uuid.UUID
    node_id: uuid.UUID
    gpu_ids: tuple[uuid.UUID, ...]
    bytes_per_gpu: int
    exclusive: bool = True
    engine_id: uuid.UUID | None = None
    rate: float = 1.0
    limit_s: float = 1800.0
    why: str = ""
    """In words, for the job's events and the log: which share or guarantee gave it its turn."""


class PreemptKind(StrEnum):
    GUARANTEE = "guarantee"
    """The beneficiary's project is below its guarantee, the victim's above its own."""
    FAIR_SHARE = "fair_share"
    """The victim's project has had more than its share, and has more even afterwards."""


@dataclass(frozen=True, slots=True)
class Preempt:
    """Ask this attempt to checkpoint and stop; what it frees is held for `for_job`."""

    attempt_id: uuid.UUID
    job_id: uuid.UUID
    for_job: uuid.UUID
    kind: PreemptKind


class WaitCode(StrEnum):
    """Why a job waits: exactly one of these is true of it."""

    NO_NODE = "no_node"
    TOO_LARGE = "too_large"
    NO_SUCH_PLACE = "no_such_place"
    """No node has the class and the labels it asks for."""
    UNAVAILABLE = "unavailable"
    """The nodes that could take it are cordoned, draining, silent or full."""
    BLOCKED = "blocked"
    """Its project's budget."""
    PROJECT_CAP = "project_cap"
    ORGANIZATION_CAP = "organization_cap"
    RUNNING_LIMIT = "running_limit"
    BUSY = "busy"
    """Every place is taken, and others come first."""
    FRAGMENTED = "fragmented"
    """Enough GPUs are free, but not on one node."""
    NO_SLOT = "no_slot"
    RESERVED = "reserved"
    """Free GPUs are kept for a job ahead of it; a shorter limit would let it in."""
    HOLDS = "holds"
    """It is next: GPUs are kept for it, and it starts by `promised_at`."""
    PREEMPTING = "preempting"
    """Others are checkpointing to make room for it."""
    BEHIND = "behind"
    """Deeper in its project's queue than a pass looks."""


@dataclass(frozen=True, slots=True)
class Reason:
    """True of a job at the moment of the pass. `numbers` are those of its code: see `tunery.waiting`."""

    code: WaitCode
    numbers: tuple[tuple[str, float | int | str], ...] = ()


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why the waiting jobs of one shape in one project do not start now: what is true of one is true of all."""

    project_id: uuid.UUID
    shape: str
    reason: Reason


@dataclass(frozen=True, slots=True)
class Wait:
    """Why this one job does not start now."""

    job_id: uuid.UUID
    reason: Reason


@dataclass(frozen=True, slots=True)
class Standing:
    """What the pass leaves of a tenant: written only where it changed."""

    id: uuid.UUID
    active: bool
    credit: float
    """Added to its service: an idle tenant that wakes up has banked nothing."""


@dataclass(frozen=True, slots=True)
class Plan:
    """One pass. Starts and pre-emptions in the order in which they were taken; `holds` replaces all there were."""

    starts: tuple[Start, ...] = ()
    preempts: tuple[Preempt, ...] = ()
    holds: tuple[Hold, ...] = ()
    explanations: tuple[Explanation, ...] = ()
    """Of each project and shape that waits."""
    waits: tuple[Wait, ...] = ()
    """Of single jobs, where more is known of them than of their shape: those that hold GPUs."""
    sizes: tuple[int, ...] = ()
    """Usable bytes of the devices there are, ascending: what `shape` was made with."""
    projects: tuple[Standing, ...] = ()
    organizations: tuple[Standing, ...] = ()
    engines: bool = False

    def reasons(self, jobs: Iterable[JobView]) -> dict[uuid.UUID, Reason]:
        """Of every job in `jobs` that this plan leaves waiting: its one reason."""
        started = {start.job_id for start in self.starts}
        own = {wait.job_id: wait.reason for wait in self.waits}
        by_shape = {(one.project_id, one.shape): one.reason for one in self.explanations}
        return {
            job.id: own.get(job.id) or by_shape[job.project_id, shape(job, self.sizes, engines=self.engines)]
            for job in jobs
            if job.id not in started
        }


def shape(job: JobView, sizes: Sequence[int], *, engines: bool = False) -> str:
    """What decides where a job fits, in words: equal for jobs that fit the same places. `sizes` ascend.

    A job that has its GPUs to itself fits wherever the device is large enough, so its bytes count only as the
    smallest device that holds it; one that shares, by its own bytes. `engines`: whether jobs join resident bases.
    """
    joins = engines and job.engine_key is not None
    place = bisect_left(sizes, job.required_bytes)
    size = job.required_bytes if job.shareable or joins else sizes[place] if place < len(sizes) else -1
    parts = [f"{job.gpus}x{size}", job.gpu_class or "any", *(f"{key}={value}" for key, value in sorted(job.labels))]
    marks = "".join(mark for mark, on in (("u", job.urgent), ("s", job.shareable), ("e", joins)) if on)
    return "|".join([*parts, marks]) if marks else "|".join(parts)
