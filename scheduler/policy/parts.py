"""What a pass counts with: devices, nodes, tenants, places and reservations.

Devices of a node are numbered by size, and sets of them are bit masks: a pass over a thousand GPUs asks some hundred
thousand times which of a node's devices are free.
"""

import math
import uuid
from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import accumulate

from tunery.contracts.scheduling import GpuView, JobView, NodeView, RunningView, Tenant

Kind = int
"""Jobs of one kind fit the same places: see `World.kind`. A number, because a pass looks one up for every job that
waits."""

EPSILON = 1e-9
"""Rates are sums of fractions."""


@dataclass(slots=True)
class Gpu:
    """One device of a node that may take work."""

    view: GpuView
    bit: int
    free: int
    held_by: uuid.UUID | None
    """The project that shares it."""


@dataclass(slots=True)
class Occupant:
    """Somebody who holds devices of a node until `until` at the latest."""

    until: float
    mask: int
    project_id: uuid.UUID
    rate: float
    view: RunningView | None = None
    """None: started in this pass."""


@dataclass(slots=True)
class Node:
    view: NodeView
    slots: int
    gpus: list[Gpu]
    """Smallest first."""
    index: dict[uuid.UUID, Gpu]
    empty: int
    """Mask of the devices that nobody holds."""
    classes: dict[str, tuple[float, int]]
    """Of its devices: what a second on one costs, and their mask."""
    kept: int = 0
    """Mask of the devices that are kept for somebody."""
    occupants: list[Occupant] = field(default_factory=list)
    """By the moment at which they are gone."""
    foreign: int = 0
    """Mask of devices held by nobody we know of, e.g. an engine's base: nobody can say until when."""
    _sizes: list[int] = field(default_factory=list)
    _by_size: dict[str | None, list[int]] = field(default_factory=dict)
    """By class, None for all: of the devices from each place of `gpus` on, the mask."""

    def suitable(self, job: JobView) -> int:
        """Mask of the devices that could hold the job, were they empty."""
        from_here = self._by_size.get(job.gpu_class)
        return from_here[bisect_left(self._sizes, job.required_bytes)] if from_here else 0

    def could_run(self, job: JobView) -> bool:
        """With nobody else there."""
        return job.labels <= self.view.labels and self.suitable(job).bit_count() >= job.gpus

    def taken(self, mask: int) -> list[Gpu]:
        return [gpu for gpu in self.gpus if gpu.bit & mask]

    def mask(self, gpu_ids: Iterable[uuid.UUID]) -> int:
        return sum(self.index[gpu_id].bit for gpu_id in gpu_ids if gpu_id in self.index)


@dataclass(slots=True)
class Party:
    """A project or an organization in this pass. `rate` counts what is held for its jobs as running."""

    view: Tenant
    rate: float = 0.0
    running: int = 0
    gpus: int = 0
    service: float = 0.0
    waits: bool = False
    lost: float = 0.0
    """Rate that this pass takes from it."""
    occupants: list[Occupant] = field(default_factory=list)
    _ends: tuple[list[float], list[float]] | None = None
    """When its occupants are gone, in order, and the rate that is free again by then."""

    @property
    def limited(self) -> bool:
        """It has a cap or a running limit."""
        return self.view.max_running is not None or not math.isinf(self.view.cap)

    def take(self, one: Occupant, gpus: int) -> None:
        self.occupants.append(one)
        self._count(one.rate, 1, gpus)

    def leave(self, one: Occupant, gpus: int) -> None:
        self.occupants.remove(one)
        self._count(-one.rate, -1, -gpus)

    def _count(self, rate: float, running: int, gpus: int) -> None:
        self.rate += rate
        self.running += running
        self.gpus += gpus
        self._ends = None

    def score(self, tau_s: float) -> float:
        return (self.service + tau_s * self.rate) / self.view.weight

    def capped(self, cost: float) -> bool:
        return self.rate + cost > self.view.cap + EPSILON

    def guaranteed(self, cost: float) -> bool:
        return self.rate + cost <= self.view.guarantee + EPSILON

    def room_at(self, cost: float) -> float:
        """When it may take so much more, if everybody runs to the limit; infinity if never."""
        if not self.capped(cost):
            return -math.inf
        ends, freed = self._gone()
        return next(
            (at for at, rate in zip(ends, freed, strict=True) if self.rate - rate + cost <= self.view.cap + EPSILON),
            math.inf,
        )

    def turn_at(self) -> float:
        """When fewer of it run than may, if everybody runs to the limit."""
        most = self.view.max_running
        if most is None or self.running < most:
            return -math.inf
        ends, gone = self._gone()[0], self.running - most
        return ends[gone] if gone < len(ends) and most else math.inf

    def running_at(self, at: float) -> int:
        """Then, of what runs now."""
        return self.running - bisect_right(self._gone()[0], at)

    def rate_at(self, at: float) -> float:
        """Then, of what runs now."""
        ends, freed = self._gone()
        gone = bisect_right(ends, at)
        return self.rate - freed[gone - 1] if gone else self.rate

    def _gone(self) -> tuple[list[float], list[float]]:
        if self._ends is None:
            ordered = sorted(self.occupants, key=lambda one: one.until)
            self._ends = [one.until for one in ordered], list(accumulate(one.rate for one in ordered))
        return self._ends


@dataclass(frozen=True, slots=True)
class Place:
    """Where a job would run, and what it would hold there."""

    node_id: uuid.UUID
    mask: int
    bytes_per_gpu: int
    exclusive: bool
    rate: float
    engine_id: uuid.UUID | None = None


@dataclass(frozen=True, slots=True)
class Reservation:
    """EASY: this job starts there by then, whatever else is started meanwhile."""

    job: JobView
    at: float
    node_id: uuid.UUID
    gpu_class: str
    rate: float


def suits(gpu: GpuView, job: JobView) -> bool:
    """Empty, it could hold the job."""
    return gpu.usable_bytes >= job.required_bytes and job.gpu_class in (None, gpu.gpu_class)
