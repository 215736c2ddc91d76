"""What a job will do, and what becomes of it. Times are the simulation's, in seconds."""

import math
from dataclasses import dataclass, field
from enum import StrEnum

from tunery.contracts.scheduling import JobView, RunningView


@dataclass(frozen=True, slots=True)
class Work:
    """What a job will do, which the policy does not know."""

    work_s: float
    """Of training, in all. Of an attempt that the first snapshot shows running: since its start, loading included."""
    load_s: float = 0.0
    """Of every attempt, before its first step."""
    checkpoint_s: float = math.inf
    """Of training between checkpoints; what follows the newest is lost with a node."""
    stop_s: float = 0.0
    """From being asked to stop to being gone. Longer than the grace: killed, and back to the newest checkpoint."""


class End(StrEnum):
    DONE = "done"
    LIMIT = "limit"
    CANCELLED = "cancelled"


@dataclass(slots=True)
class Fate:
    """What became of a job. Costs are GPU-seconds times the class's cost."""

    job: JobView
    arrived_at: float
    starts: list[float] = field(default_factory=list)
    ended_at: float | None = None
    end: End | None = None
    preempted: int = 0
    faults: int = 0
    used: float = 0.0
    """Of all its attempts."""
    lost: float = 0.0
    """Of that, what was spent in vain: loading, and writing for a stop, and work behind the newest checkpoint."""


@dataclass(slots=True)
class Live:
    """An attempt that holds GPUs."""

    view: RunningView
    job: JobView
    work: Work
    done_s: float
    """Work of earlier attempts that was kept."""
    stop: str = ""
    """Why it was asked to stop: `preempted`, `limit` or `cancelled`."""
    asked_at: float = math.inf
    gone_at: float = math.inf

    def worked_s(self, at: float) -> float:
        """Of training in this attempt, by then."""
        return max(0.0, min(at - self.view.started_at - self.work.load_s, self.work.work_s - self.done_s))

    def stored_s(self, at: float) -> float:
        """Of that, behind a periodic checkpoint."""
        every = self.work.checkpoint_s
        return math.floor(self.worked_s(at) / every) * every if math.isfinite(every) else 0.0
