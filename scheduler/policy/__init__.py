"""Who starts where, who makes room, and why the rest waits: a pure function of what there is.

Weighted fair share with a look-ahead, `(S + tau * rate) / weight` (docs/scheduler.md has the evidence): `S` is the cost
a tenant has been given, start-time fair queueing's virtual time (Goyal et al. 1997); the rate makes it react before
`S` does. Backfill is EASY (Lifka 1995), with one reservation a GPU class that a gang keeps until it starts. What runs
may be moved off for a guarantee or for a fairer share, at a checkpoint.
"""

import heapq
import math
import uuid

from scheduler.policy import explain, preempt
from scheduler.policy.parts import Kind, Party
from scheduler.policy.reading import build
from scheduler.policy.world import World
from tunery.contracts.scheduling import Hold, HoldKind, JobView, Plan, Preempt, Snapshot, Standing, Start

_Order = tuple[bool, bool, float, float, float, uuid.UUID]


def schedule(snapshot: Snapshot, *, explained: bool = True) -> Plan:
    """One pass. No clock, no randomness, no I/O; the order of the snapshot's rows does not matter.

    Not `explained`, it leaves out why the others wait; a simulation of hundreds of passes need not know.
    """
    world = build(snapshot)
    projects, organizations = _wake(world)
    walk = _Walk(world)
    walk.finish_preemptions()
    walk.keep_promises()
    walk.run()
    explanations, waits = explain.all_that_wait(world, walk.started, walk.holds) if explained else ((), ())
    return Plan(
        tuple(walk.starts),
        tuple(walk.preempts),
        tuple(sorted(walk.holds.values(), key=lambda hold: hold.job_id)),
        explanations,
        waits,
        world.sizes,
        projects,
        organizations,
        snapshot.settings.engines,
    )


def _wake(world: World) -> tuple[tuple[Standing, ...], tuple[Standing, ...]]:
    """A tenant that was idle starts level with the least served of those that were not: idle time banks nothing."""
    everybody = list(world.organizations.values())
    organizations = [_standing(party, everybody) for party in everybody]
    siblings: dict[uuid.UUID, list[Party]] = {}
    for party in world.projects.values():
        siblings.setdefault(party.view.organization_id, []).append(party)
    projects = [_standing(party, siblings[party.view.organization_id]) for party in world.projects.values()]
    for parties, standings in ((everybody, organizations), (list(world.projects.values()), projects)):
        for party, standing in zip(parties, standings, strict=True):
            party.service += standing.credit
    changed = [
        [
            standing
            for party, standing in zip(parties, standings, strict=True)
            if standing.credit or standing.active != party.view.active
        ]
        for parties, standings in ((list(world.projects.values()), projects), (everybody, organizations))
    ]
    return tuple(changed[0]), tuple(changed[1])


def _standing(party: Party, others: list[Party]) -> Standing:
    active = party.waits or party.running > 0
    credit = 0.0
    if active and not party.view.active:
        busy = [other for other in others if other.view.active and (other.waits or other.running)]
        if busy:
            level = min(other.view.service / other.view.weight for other in busy) * party.view.weight
            credit = max(0.0, level - party.view.service)
    return Standing(party.view.id, active, credit)


class _Walk:
    """Projects in the order of their scores, each with its jobs in its own order, until nothing more can start."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._settings = world.snapshot.settings
        self._soon = world.snapshot.now + self._settings.grace_s
        """Whoever starts by then without it needs no pre-emption."""
        self.starts: list[Start] = []
        self.started: set[int] = set()
        """Ids as integers: a UUID's own hash is slow."""
        self.preempts: list[Preempt] = []
        self.holds: dict[uuid.UUID, Hold] = {}
        self._room = preempt.Room(world)
        self._heads = dict.fromkeys(world.queues, 0)
        self._last = {one: min(len(queue), self._settings.depth) for one, queue in world.queues.items()}
        """How far down its queue each project is looked at."""
        self._failed: dict[uuid.UUID, dict[Kind, float]] = {one: {} for one in world.queues}
        """By project and kind: jobs with this time limit, or a longer one, have no place in this pass."""
        self._tried: set[uuid.UUID] = set()
        """Projects for whose first blocked job room was looked for."""

    def finish_preemptions(self) -> None:
        """Jobs that others made room for start as soon as the room is empty."""
        for job, hold in sorted(self._world.kept.values(), key=lambda one: (one[1].promised_at, one[0].id)):
            project, organization = self._world.parties(job)
            over = project.capped(0.0) or organization.capped(0.0) or _too_many(project, already=1)
            if project.view.blocked or over:
                self._world.let_go(job.id)
            elif (place := self._world.place(job)) is not None:
                self._start(job, self._world.start(job, place, "others made room for it"))
            else:
                self.holds[job.id] = hold

    def keep_promises(self) -> None:
        """Gangs that hold a reservation come first, and keep it until they start. All have theirs before any starts or
        finds a better one: it must not take another one's."""
        kept: list[tuple[JobView, Hold]] = []
        gangs = self._gangs()
        wanted = {hold.job_id.int for hold in gangs}
        waiting = {job.id: job for job in self._world.snapshot.jobs if job.id.int in wanted} if wanted else {}
        for hold in gangs:
            job = waiting.get(hold.job_id)
            if job is None or job.id.int in self.started or job.id in self._world.kept:
                continue
            project, _ = self._world.parties(job)
            if not project.view.blocked:
                self._world.renew(job, hold)
                kept.append((job, hold))
        for job, _ in kept:
            self._world.reserve(job)
        for job, hold in kept:
            project, _ = self._world.parties(job)
            if not _too_many(project) and (place := self._world.place(job)) is not None:
                self._start(job, self._world.start(job, place, "it held the reservation of its class"))
            elif hold.promised_at <= self._soon or _too_many(project) or not self._make_room(job):
                self._reserve(job, hold)

    def _gangs(self) -> list[Hold]:
        gangs = [hold for hold in self._world.snapshot.holds if hold.kind is HoldKind.GANG]
        return sorted(gangs, key=lambda hold: (hold.promised_at, hold.job_id))

    def run(self) -> None:
        heap = [entry for project_id in self._world.queues if (entry := self._entry(project_id)) is not None]
        heapq.heapify(heap)
        while heap:
            order, project_id = heapq.heappop(heap)
            entry = self._entry(project_id)
            if entry is None:
                continue
            if entry[0] > order:  # somebody of its organization, or itself, has started since
                heapq.heappush(heap, entry)
                continue
            self._consider(self._world.queues[project_id][self._heads[project_id]])
            if (entry := self._entry(project_id)) is not None:
                heapq.heappush(heap, entry)

    def _entry(self, project_id: uuid.UUID) -> tuple[_Order, uuid.UUID] | None:
        """The project's next job and its order; None when nothing of it can start any more."""
        queue, failed, head = self._world.queues[project_id], self._failed[project_id], self._heads[project_id]
        kinds = self._world.kinds[project_id]
        project = self._world.projects[project_id]
        if project.view.blocked or _too_many(project):
            return None
        last, never = self._last[project_id], self._world.never[project_id]
        while head < last:
            job, kind = queue[head], kinds[head]
            if job.limit_s < failed.get(kind, math.inf) and job.id.int not in self.started:
                break
            head += 1
            if kind in never and last < len(queue):
                last += 1  # however many of those there are, they keep nobody out
        self._heads[project_id], self._last[project_id] = head, last
        if head >= last:
            return None
        job = queue[head]
        organization, cost = self._world.organizations[job.organization_id], self._world.cost(job)
        ahead = project.guaranteed(cost) or organization.guaranteed(cost)
        tau_s = self._settings.tau_s
        scores = organization.score(tau_s), project.score(tau_s)
        return (not job.urgent, not ahead, *scores, job.queued_at, job.id), project_id

    def _consider(self, job: JobView) -> None:
        world = self._world
        failed = self._failed[job.project_id]
        if job.id in world.kept or job.id in self.holds:
            self._heads[job.project_id] += 1
            return
        if (place := world.place(job)) is not None:
            self._start(job, world.start(job, place, self._why(job, place.rate)))
            return
        fits, cost = world.fits(job), self._world.cost(job)
        # a shorter job of the same kind may still end before the reservation that keeps this one out
        failed[self._world.kind(job)] = job.limit_s if fits and world.within_caps(job, cost) else 0.0
        if world.is_hopeless(job, cost):
            world.never[job.project_id].add(world.kind(job))
            return
        if fits or not world.within_caps(job, cost):
            return
        if job.project_id not in self._tried:
            self._tried.add(job.project_id)
            if self._make_room(job):
                return
        self._reserve(job)

    def _make_room(self, job: JobView) -> bool:
        """Unless it starts soon anyway."""
        found = self._room.find(job)
        if found is None:
            return False
        reservation = self._world.reservation(job)
        if reservation is not None and reservation.at <= self._soon:
            return False
        hold, asked = self._room.take(job, *found)
        self._world.unreserve(job)
        self._world.keep(job, hold)
        self.holds[job.id] = hold
        self.preempts += asked
        return True

    def _reserve(self, job: JobView, promise: Hold | None = None) -> None:
        """One reservation a class. Only a gang keeps its own from pass to pass: if every blocked job did, shares
        would suffer (docs/scheduler.md)."""
        reservation = self._world.reserve(job)
        if reservation is None:
            return
        if job.gpus > 1:
            at = reservation.at if promise is None else min(promise.promised_at, reservation.at)
            kind = HoldKind.GANG
            self.holds[job.id] = Hold(job.id, kind, reservation.gpu_class, reservation.node_id, (), at)

    def _start(self, job: JobView, start: Start) -> None:
        self.starts.append(start)
        self.started.add(job.id.int)

    def _why(self, job: JobView, rate: float) -> str:
        project, organization = self._world.parties(job)
        if job.urgent:
            return "an operator made it urgent"
        if project.guaranteed(rate) or organization.guaranteed(rate):
            return "its project's guarantee"
        return "the lowest share so far"


def _too_many(project: Party, already: int = 0) -> bool:
    most = project.view.max_running
    return most is not None and project.running - already >= most
