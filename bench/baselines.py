"""Scheduling policies that others use, speaking the product's contract, so that one simulation compares them all.

Exclusive GPUs of one class, whole gangs on one node, caps, limits that are enforced: what a comparison needs. Orders:
first come, first served; instantaneous dominant-resource fairness (lowest rate over weight, as Kueue and Armada);
history (lowest service over weight); and the product's score. Backfill: none, best effort (whatever fits starts), or
EASY with one reservation that gangs keep.
"""

import math
import uuid
from collections import defaultdict
from dataclasses import dataclass
from enum import Enum

from tunery.contracts.scheduling import GpuView, Hold, HoldKind, JobView, Plan, Snapshot, Standing, Start


class Order(Enum):
    FIFO = "fifo"
    DRF = "drf"
    HISTORY = "history"
    SCORE = "score"


class Backfill(Enum):
    NONE = "none"
    """The first that does not fit blocks all behind it."""
    BEST_EFFORT = "best effort"
    EASY = "easy"


@dataclass(slots=True)
class _Running:
    until: float
    gpus: int
    node_id: uuid.UUID
    project_id: uuid.UUID


@dataclass(frozen=True, slots=True)
class _Reservation:
    job: JobView
    at: float
    node_id: uuid.UUID


@dataclass(frozen=True, slots=True)
class Baseline:
    """`sticky`: a gang keeps its reservation until it starts."""

    order: Order
    backfill: Backfill
    sticky: bool = True

    def __call__(self, snapshot: Snapshot) -> Plan:
        return _Pass(self, snapshot).run()


class _Pass:
    def __init__(self, rule: Baseline, snapshot: Snapshot) -> None:
        self._rule, self._now, self._settings = rule, snapshot.now, snapshot.settings
        self._names = {node.id: node.name for node in snapshot.nodes}
        self._free: dict[uuid.UUID, list[GpuView]] = {
            node.id: [gpu for gpu in node.gpus if gpu.free_bytes == gpu.usable_bytes]
            for node in sorted(snapshot.nodes, key=lambda node: node.name)
            if node.schedulable
        }
        self._tenants = {one.id: one for one in snapshot.projects}
        self._rate: dict[uuid.UUID, float] = defaultdict(float)
        self._running: list[_Running] = []
        for view in snapshot.running:
            self._rate[view.project_id] += len(view.gpu_ids)
            until = view.started_at + view.limit_s + self._settings.grace_s
            self._running.append(_Running(until, len(view.gpu_ids), view.node_id, view.project_id))
        self._queues: dict[uuid.UUID, list[JobView]] = defaultdict(list)
        for job in sorted(snapshot.jobs, key=lambda job: (-job.priority, job.queued_at, job.id)):
            self._queues[job.project_id].append(job)
        self._standings, self._service = self._woken()
        self._hold = next((job for hold in snapshot.holds for job in snapshot.jobs if job.id == hold.job_id), None)
        self._reserved: _Reservation | None = None

    def _woken(self) -> tuple[tuple[Standing, ...], dict[uuid.UUID, float]]:
        """Idle time banks nothing, as in the product."""
        busy = [
            one for one in self._tenants.values() if one.active and (self._queues.get(one.id) or self._rate[one.id])
        ]
        level = min((one.service / one.weight for one in busy), default=-math.inf)
        standings, service = [], {}
        for one in self._tenants.values():
            active = bool(self._queues.get(one.id)) or self._rate[one.id] > 0
            credit = max(0.0, level * one.weight - one.service) if active and not one.active and busy else 0.0
            service[one.id] = one.service + credit
            if credit or active != one.active:
                standings.append(Standing(one.id, active, credit))
        return tuple(standings), service

    def run(self) -> Plan:
        starts: list[Start] = []
        while (start := self._next()) is not None:
            starts.append(start)
        holds: tuple[Hold, ...] = ()
        if self._hold is not None and self._reserved is not None and self._reserved.job is self._hold:
            kept = self._reserved
            holds = (Hold(kept.job.id, HoldKind.GANG, "any", kept.node_id, (), kept.at),)
        return Plan(tuple(starts), holds=holds, projects=self._standings)

    def _next(self) -> Start | None:
        """Of all that wait, in order, the first that may start."""
        rule, self._reserved = self._rule, None
        for job in self._candidates():
            capped = self._rate[job.project_id] + job.gpus > self._tenants[job.project_id].cap
            if capped and job is not self._hold:
                continue
            if self._reserved is not None:
                places = [node for node, free in self._free.items() if len(free) >= job.gpus and self._may(job, node)]
                if places:
                    return self._start(job, places)
                continue
            places = [] if capped else [node for node, free in self._free.items() if len(free) >= job.gpus]
            if places:
                return self._start(job, places)
            if rule.backfill is not Backfill.BEST_EFFORT:
                self._reserved = self._reservation(job)
                if self._reserved is not None and rule.sticky and job.gpus > 1:
                    self._hold = job
            if rule.backfill is Backfill.NONE:
                return None
        return None

    def _candidates(self) -> list[JobView]:
        depth = 1 if self._rule.backfill is Backfill.NONE else self._settings.depth
        found = sorted((job for queue in self._queues.values() for job in queue[:depth]), key=self._key)
        if self._hold is not None:
            found = [self._hold, *(job for job in found if job is not self._hold)]
        return found

    def _key(self, job: JobView) -> tuple[float, float, uuid.UUID]:
        tenant, rate = self._tenants[job.project_id], self._rate[job.project_id]
        score = {
            Order.FIFO: 0.0,
            Order.DRF: rate + job.gpus,
            Order.HISTORY: self._service[tenant.id],
            Order.SCORE: self._service[tenant.id] + self._settings.tau_s * rate,
        }[self._rule.order]
        return score / tenant.weight, job.queued_at, job.id

    def _reservation(self, job: JobView) -> _Reservation | None:
        free = {node: len(gpus) for node, gpus in self._free.items()}
        rate, cap = self._rate[job.project_id], self._tenants[job.project_id].cap
        for one in sorted(self._running, key=lambda one: one.until):
            free[one.node_id] = free.get(one.node_id, 0) + one.gpus
            rate -= one.gpus if one.project_id == job.project_id else 0
            places = [(left - job.gpus, self._names[node], node) for node, left in free.items() if left >= job.gpus]
            if places and rate + job.gpus <= cap:
                return _Reservation(job, one.until, min(places)[2])
        return None

    def _may(self, job: JobView, node_id: uuid.UUID) -> bool:
        """Whether the reservation stands if it starts there."""
        kept = self._reserved
        assert kept is not None
        if self._now + job.limit_s + self._settings.grace_s <= kept.at:
            return True
        gone = [one for one in self._running if one.until <= kept.at]
        if job.project_id == kept.job.project_id:
            rate = self._rate[job.project_id] - sum(one.gpus for one in gone if one.project_id == job.project_id)
            if rate + job.gpus + kept.job.gpus > self._tenants[job.project_id].cap:
                return False
        spare = len(self._free[node_id]) + sum(one.gpus for one in gone if one.node_id == node_id)
        return node_id != kept.node_id or spare >= kept.job.gpus + job.gpus

    def _start(self, job: JobView, places: list[uuid.UUID]) -> Start:
        """On the node with the fewest GPUs left over."""
        node_id = min(places, key=lambda node: (len(self._free[node]), self._names[node]))
        taken, self._free[node_id] = self._free[node_id][: job.gpus], self._free[node_id][job.gpus :]
        self._rate[job.project_id] += job.gpus
        self._queues[job.project_id].remove(job)
        until = self._now + job.limit_s + self._settings.grace_s
        self._running.append(_Running(until, job.gpus, node_id, job.project_id))
        if job is self._hold:
            self._hold = None
        ids = tuple(gpu.id for gpu in taken)
        return Start(job.id, node_id, ids, job.required_bytes, True, None, float(job.gpus), job.limit_s)
