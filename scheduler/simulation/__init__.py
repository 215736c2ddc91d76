"""What would happen: the product's policy over simulated time, from any snapshot on.

Jobs arrive, run as long as `Work` says, end by themselves or at their limit, are moved off at a checkpoint, are
cancelled; nodes are lost and come back. Everything that a pass leaves behind (service, credits, holds, past
pre-emptions) is in the next pass's snapshot, as it is in the database. No clock and no randomness: the same input
gives the same future. It serves forecasts, benchmarks and the property tests.
"""

import heapq
import math
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from enum import IntEnum

from scheduler.policy import schedule
from scheduler.simulation.accounts import Accounts
from scheduler.simulation.fate import End, Fate, Live, Work
from scheduler.simulation.fleet import Fleet
from tunery.contracts.scheduling import JobView, PastPreemption, Plan, Preempt, RunningView, Snapshot, Start

__all__ = ["End", "Fate", "Live", "Simulation", "Work"]

SILENT_S = 1200.0
"""GPUs of an ended attempt that nobody has seen die come back after so long."""

Policy = Callable[[Snapshot], Plan]


class _Event(IntEnum):
    """What happens first of what happens at one moment."""

    GONE = 0
    ASK = 1
    LOST = 2
    BACK = 3
    CANCEL = 4
    ARRIVE = 5
    PASS = 6


class Simulation:
    """One possible future. `policy` decides, `watch` sees every pass: the simulation, what the policy saw, its plan."""

    def __init__(
        self,
        snapshot: Snapshot,
        work: Mapping[uuid.UUID, Work],
        *,
        policy: Policy = schedule,
        watch: Callable[["Simulation", Snapshot, Plan], object] | None = None,
        tick_s: float = math.inf,
        batch_s: float = 0.0,
    ) -> None:
        """`tick_s`: while jobs wait, a pass follows the last one after so long even if nothing has happened.

        `batch_s`: what happens within so long of the first event waits for one pass; fewer passes, later starts.
        """
        self.now = snapshot.now
        self.settings = snapshot.settings
        self.fates: dict[uuid.UUID, Fate] = {}
        self.waiting: dict[uuid.UUID, JobView] = {}
        self.live: dict[uuid.UUID, Live] = {}
        self.holds = snapshot.holds
        self.past = list(snapshot.preemptions)
        self.preempts: list[tuple[float, Preempt]] = []
        self.passes = 0
        self._policy, self._watch, self._tick_s, self._batch_s = policy, watch, tick_s, batch_s
        self._events: list[tuple[float, int, int, uuid.UUID | None, object]] = []
        self._made = 0
        self._next_pass = math.inf
        self._unstarted: set[uuid.UUID] | None = None
        self._work = dict(work)
        self._done: dict[uuid.UUID, float] = defaultdict(float)
        self._moved: dict[uuid.UUID, list[float]] = defaultdict(list)
        """When each job was moved off."""
        self._fleet = Fleet(snapshot.nodes, snapshot.engines)
        self._projects = Accounts(snapshot.projects, self.now)
        self._organizations = Accounts(snapshot.organizations, self.now)
        for job in snapshot.jobs:
            self._wait(job, Fate(job, job.queued_at))
        for view in snapshot.running:
            self._resume(view)

    # ---- what is to happen ---------------------------------------------------------------------------------------

    def arrive(self, job: JobView, work: Work) -> None:
        """The job is submitted at its `queued_at`."""
        self._work[job.id] = work
        self._at(max(job.queued_at, self.now), _Event.ARRIVE, job.id, job)

    def cancel(self, job_id: uuid.UUID, at: float) -> None:
        self._at(at, _Event.CANCEL, job_id)

    def lose(self, node_id: uuid.UUID, at: float, until: float) -> None:
        """The node and everything on it is gone for that time."""
        self._at(at, _Event.LOST, node_id)
        self._at(until, _Event.BACK, node_id)

    def run(
        self, until: float = math.inf, starts_of: Iterable[uuid.UUID] | None = None, passes: float = math.inf
    ) -> None:
        """To that time, or for so many passes, or to the end, or until each of these jobs has started or ended."""
        if starts_of is not None:
            self._unstarted = {one for one in starts_of if one in self.waiting}
        self._pass()
        while (at := self._next()) <= until and at < math.inf and self.passes < passes:
            if self._unstarted is not None and not self._unstarted:
                break
            self._next_pass, by = math.inf, min(at + self._batch_s, until)
            while self._events and self._events[0][0] <= by:
                self.now, kind, _, subject, what = heapq.heappop(self._events)
                self._happen(_Event(kind), subject, what)
            self.now = max(self.now, at)
            self._pass()
        if math.isfinite(until) and self._next() > until:
            self.now = max(self.now, until)

    def _next(self) -> float:
        return min(self._events[0][0] if self._events else math.inf, self._next_pass)

    def _at(self, at: float, kind: _Event, subject: uuid.UUID | None = None, what: object = None) -> None:
        self._made += 1
        heapq.heappush(self._events, (at, kind, self._made, subject, what))

    def _happen(self, kind: _Event, subject: uuid.UUID | None, what: object) -> None:
        if kind is _Event.PASS or subject is None:
            return
        if kind is _Event.ARRIVE and isinstance(what, JobView):
            self._wait(what, Fate(what, self.now))
        elif kind is _Event.CANCEL:
            self._cancel(subject)
        elif kind is _Event.LOST:
            self._lose(subject)
        elif kind is _Event.BACK:
            self._fleet.turn(subject, up=True)
        elif (one := self.live.get(subject)) is not None:
            if kind is _Event.ASK and not one.stop:
                self._ask(one, "limit")
            elif kind is _Event.GONE and one.gone_at <= self.now:
                self._gone(one)

    # ---- a pass --------------------------------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """What the policy would see now."""
        since = self.now - self.settings.window_s
        self.past = [one for one in self.past if one.at > since]
        return Snapshot(
            tuple(self.waiting.values()),
            self._fleet.nodes(),
            self.now,
            tuple(map(self._running, self.live.values())),
            self._projects.tenants(self.now),
            self._organizations.tenants(self.now),
            self.holds,
            self._fleet.engines(),
            tuple(self.past),
            self.settings,
        )

    def _pass(self) -> None:
        seen = self.snapshot()
        plan = self._policy(seen)
        self.passes += 1
        self.holds = plan.holds
        self._projects.stand(plan.projects)
        self._organizations.stand(plan.organizations)
        for start in plan.starts:
            self._start(start)
        for asked in plan.preempts:
            self._preempt(asked)
        if self._watch is not None:
            self._watch(self, seen, plan)
        if self.waiting and math.isfinite(self._tick_s) and (self.live or self.holds or self._events):
            self._next_pass = self.now + self._tick_s

    def _start(self, start: Start) -> None:
        job = self.waiting.pop(start.job_id)
        work = self._work.get(job.id) or Work(job.limit_s)
        self._fleet.take(start, job)
        self._made += 1
        view = RunningView(
            uuid.UUID(int=self._made),
            job.id,
            job.organization_id,
            job.project_id,
            start.node_id,
            start.gpu_ids,
            start.bytes_per_gpu,
            start.exclusive,
            start.rate,
            self.now,
            start.limit_s,
            job.queued_at,
            job.priority,
            job.preemptible,
            job.preemptions,
            overhead_s=work.load_s + work.stop_s,
            engine_id=start.engine_id,
        )
        one = Live(view, job, work, self._done[job.id])
        self.fates[job.id].starts.append(self.now)
        if self._unstarted is not None:
            self._unstarted.discard(job.id)
        self._hold(one, self.now + work.load_s + work.work_s - one.done_s)

    def _hold(self, one: Live, ends_at: float) -> None:
        """It is live from now on."""
        view, settings = one.view, self.settings
        self.live[view.attempt_id] = one
        self._accrue(view, view.rate)
        limit_at = view.started_at + view.limit_s
        one.gone_at = max(ends_at, self.now)
        if ends_at > limit_at:
            one.gone_at = math.inf
            self._at(max(limit_at, self.now), _Event.ASK, view.attempt_id)
        else:
            self._at(one.gone_at, _Event.GONE, view.attempt_id)
        matured_at = view.started_at + max(settings.min_runtime_s, 3 * view.overhead_s)
        if settings.preemption and view.preemptible and self.now < matured_at < one.gone_at:
            self._at(matured_at, _Event.PASS)

    def _preempt(self, asked: Preempt) -> None:
        one = self.live[asked.attempt_id]
        beneficiary = self.fates[asked.for_job].job.project_id
        self.past.append(PastPreemption(beneficiary, one.view.project_id, self.now))
        self.preempts.append((self.now, asked))
        self._moved[one.job.id].append(self.now)
        self._ask(one, "preempted")

    def _ask(self, one: Live, why: str) -> None:
        """To write a checkpoint and stop. An attempt that would have ended by itself before it is gone does so."""
        within = min(one.work.stop_s, self.settings.grace_s)
        one.stop, one.asked_at = why, self.now
        if one.gone_at > self.now + within:
            one.gone_at = self.now + within
            self._at(one.gone_at, _Event.GONE, one.view.attempt_id)
        else:
            one.stop = ""
        one.view = replace(one.view, stopping=True, stops_at=self.now + self.settings.grace_s)

    # ---- ends ----------------------------------------------------------------------------------------------------

    def _gone(self, one: Live) -> None:
        self._release(one)
        if one.stop == "preempted":
            kept = one.worked_s(one.asked_at)
            if one.work.stop_s > self.settings.grace_s:
                kept = one.stored_s(one.asked_at)
            self.fates[one.job.id].preempted += 1
            self._again(one, kept)
        elif not one.view.ended:
            self._end(one.job.id, End(one.stop) if one.stop else End.DONE)

    def _again(self, one: Live, kept_s: float) -> None:
        """Back in the queue at its old place, with what is left to do; what it must do again is nobody's debt."""
        fate, now = self.fates[one.job.id], self.now
        held_s = now - one.view.started_at
        lost = (held_s - kept_s) * one.view.rate
        fate.lost += lost
        self._projects.refund(one.view.project_id, lost)
        self._organizations.refund(one.view.organization_id, lost)
        self._done[one.job.id] += kept_s
        since = now - self.settings.window_s
        moved = self._moved[one.job.id] = [at for at in self._moved[one.job.id] if at > since]
        limit_s = max(1.0, one.job.limit_s - kept_s)
        self.waiting[one.job.id] = replace(one.job, limit_s=limit_s, preemptions=len(moved))

    def _lose(self, node_id: uuid.UUID) -> None:
        self._fleet.turn(node_id, up=False)
        for one in [one for one in self.live.values() if one.view.node_id == node_id]:
            self._release(one)
            if one.stop in (End.LIMIT, End.CANCELLED):
                self._end(one.job.id, End(one.stop))
            elif not one.view.ended:
                self.fates[one.job.id].faults += 1
                self._again(one, one.stored_s(min(self.now, one.asked_at)))

    def _cancel(self, job_id: uuid.UUID) -> None:
        if self.waiting.pop(job_id, None) is not None:
            self._end(job_id, End.CANCELLED)
        for one in [one for one in self.live.values() if one.job.id == job_id and not one.view.ended]:
            if one.stop == "preempted":
                one.stop = "cancelled"
            elif not one.stop:
                self._ask(one, "cancelled")

    def _end(self, job_id: uuid.UUID, end: End) -> None:
        fate = self.fates[job_id]
        fate.ended_at, fate.end = self.now, end
        if self._unstarted is not None:
            self._unstarted.discard(job_id)

    def _release(self, one: Live) -> None:
        view = one.view
        del self.live[view.attempt_id]
        self._fleet.give_back(one, [other.view for other in self.live.values()])
        self.fates[one.job.id].used += (self.now - view.started_at) * view.rate
        if not view.ended:
            self._accrue(view, -view.rate)

    def _accrue(self, view: RunningView, rate: float) -> None:
        self._know(view)
        self._projects.accrue(view.project_id, rate, self.now)
        self._organizations.accrue(view.organization_id, rate, self.now)

    # ---- views ---------------------------------------------------------------------------------------------------

    def _wait(self, job: JobView, fate: Fate) -> None:
        self.fates[job.id] = fate
        self.waiting[job.id] = job
        self._know(job)

    def _resume(self, view: RunningView) -> None:
        """Somebody who runs already when the simulation begins."""
        job = JobView(
            view.job_id,
            view.organization_id,
            view.project_id,
            view.queued_at,
            len(view.gpu_ids),
            view.bytes_per_gpu,
            priority=view.priority,
            limit_s=view.limit_s,
            preemptible=view.preemptible,
            preemptions=view.preemptions,
        )
        self.fates.setdefault(job.id, Fate(job, view.queued_at, [view.started_at]))
        work = self._work.get(job.id) or Work(view.limit_s)
        one = Live(view, job, work, 0.0)
        ends_at = view.started_at + work.load_s + work.work_s
        if view.ended:
            ends_at = view.stops_at if view.stops_at is not None else self.now + SILENT_S
            self.live[view.attempt_id] = one
            one.gone_at = max(self.now, ends_at)
            self._at(one.gone_at, _Event.GONE, view.attempt_id)
        elif view.stopping:
            stops_at = view.stops_at if view.stops_at is not None else view.started_at + view.limit_s
            held = {gpu_id for hold in self.holds for gpu_id in hold.gpu_ids}
            one.stop = "preempted" if held & set(view.gpu_ids) else ""
            self._hold(one, min(ends_at, stops_at))
        else:
            self._hold(one, ends_at)

    def _know(self, one: JobView | RunningView) -> None:
        self._projects.know(one.project_id, one.organization_id, self.now)
        self._organizations.know(one.organization_id, one.organization_id, self.now)

    def service(self, project_id: uuid.UUID) -> float:
        """Cost that a project has been given by now, credits and refunds included."""
        return self._projects.service(project_id, self.now)

    def credit(self, project_id: uuid.UUID) -> float:
        """Of its service, what was added because it had been idle."""
        return self._projects.credit(project_id)

    def _running(self, one: Live) -> RunningView:
        if math.isfinite(one.work.checkpoint_s) and (stored_s := one.stored_s(self.now)) > 0:
            at = one.view.started_at + one.work.load_s + stored_s
            if at != one.view.checkpoint_at:
                one.view = replace(one.view, checkpoint_at=at)
        return one.view
