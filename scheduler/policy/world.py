"""The snapshot as a pass changes it: what is free where, who holds it until when, and what each tenant has.

Devices of a node are numbered by size, and sets of them are bit masks: a pass over a thousand GPUs asks some hundred
thousand times which of a node's devices are free.
"""

import math
import uuid
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from operator import attrgetter

from tunery.contracts.scheduling import (
    EngineView,
    GpuView,
    Hold,
    HoldKind,
    JobView,
    NodeView,
    RunningView,
    Snapshot,
    Start,
    Tenant,
)

Kind = tuple[int, int, str | None, frozenset[tuple[str, str]], bool, str | None, bool]

EPSILON = 1e-9
"""Rates are sums of fractions."""
_ENGINES = uuid.UUID("6f2b1f0e-6c2c-5a53-9a5a-3f2f3f0c7d11")


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
    occupants: list[Occupant] = field(default_factory=list)

    def score(self, tau_s: float) -> float:
        return (self.service + tau_s * self.rate) / self.view.weight

    def capped(self, cost: float) -> bool:
        return self.rate + cost > self.view.cap + EPSILON

    def guaranteed(self, cost: float) -> bool:
        return self.rate + cost <= self.view.guarantee + EPSILON

    def room_at(self, cost: float) -> float:
        """When it may take so much more, if everybody runs to the limit; infinity if never."""
        rate = self.rate
        if rate + cost <= self.view.cap + EPSILON:
            return -math.inf
        for one in sorted(self.occupants, key=lambda one: one.until):
            rate -= one.rate
            if rate + cost <= self.view.cap + EPSILON:
                return one.until
        return math.inf

    def rate_at(self, at: float) -> float:
        """Then, of what runs now."""
        return self.rate - sum(one.rate for one in self.occupants if one.until <= at)


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


@dataclass(slots=True)
class World:
    snapshot: Snapshot
    nodes: dict[uuid.UUID, Node] = field(default_factory=dict)
    """Those that may take work, by name."""
    projects: dict[uuid.UUID, Party] = field(default_factory=dict)
    organizations: dict[uuid.UUID, Party] = field(default_factory=dict)
    queues: dict[uuid.UUID, list[JobView]] = field(default_factory=dict)
    """What waits, by project, in the project's own order."""
    kinds: dict[uuid.UUID, list[Kind]] = field(default_factory=dict)
    """Of the same jobs in the same order."""
    classes: frozenset[str] = frozenset()
    """Of the devices that may take work."""
    reservations: dict[str, Reservation] = field(default_factory=dict)
    """By GPU class."""
    kept: dict[uuid.UUID, tuple[JobView, Hold]] = field(default_factory=dict)
    """Pre-emption holds, by job."""
    engines: list[EngineView] = field(default_factory=list)
    sizes: tuple[int, ...] = ()
    _nowhere: set[tuple[Kind, uuid.UUID | None]] = field(default_factory=set)
    """Kinds that fit on no node; room only shrinks in a pass. What shares fits by project."""
    _costs: dict[tuple[int, str | None, frozenset[tuple[str, str]]], float] = field(default_factory=dict)

    # ---- what is asked of it ---------------------------------------------------------------------------------

    def kind(self, job: JobView) -> Kind:
        """Jobs of one kind fit the same places. As `contracts.scheduling.shape`, but quick."""
        key = job.engine_key if self.snapshot.settings.engines else None
        shared = job.shareable or key is not None
        size = job.required_bytes if shared else bisect_left(self.sizes, job.required_bytes)
        return job.gpus, size, job.gpu_class, job.labels, job.shareable, key, job.urgent

    def shares(self, job: JobView) -> bool:
        """It may hold less than a whole device."""
        return job.shareable or (self.snapshot.settings.engines and job.engine_key is not None)

    def parties(self, job: JobView) -> tuple[Party, Party]:
        """The job's project and organization."""
        return self.projects[job.project_id], self.organizations[job.organization_id]

    def place(self, job: JobView) -> Place | None:
        """Where it fits now, reservations and caps respected: the fewest GPUs left over, then the least memory."""
        if self.kept and job.id in self.kept:
            return self._kept_place(job)
        best: tuple[object, ...] | None = None
        chosen: Place | None = None
        key: tuple[object, ...] = ()
        kind = self.kind(job), job.project_id if self.shares(job) else None
        if kind in self._nowhere:
            return None
        for key, place in self._places(job):
            better = best is None or key < best
            if better and self.within_caps(job, place.rate) and self.admits(job, place, self.ends_at(job)):
                best, chosen = key, place
        if not key:
            self._nowhere.add(kind)
        return chosen

    def fits(self, job: JobView) -> bool:
        """As `place`, but for reservations and caps."""
        kind = self.kind(job), job.project_id if self.shares(job) else None
        if kind in self._nowhere:
            return False
        if any(True for _ in self._places(job)):
            return True
        self._nowhere.add(kind)
        return False

    def cost(self, job: JobView) -> float:
        """Of a second, on the cheapest class that could take it. What shares a device costs less; how much less
        depends on the device."""
        if self.shares(job):
            return 0.0
        key = job.gpus, job.gpu_class, job.labels
        if (found := self._costs.get(key)) is None:
            rates = [
                cost
                for node in self.nodes.values()
                if job.labels <= node.view.labels
                for name, (cost, _) in node.classes.items()
                if job.gpu_class in (None, name)
            ]
            found = self._costs[key] = job.gpus * min(rates, default=1.0)
        return found

    def within_caps(self, job: JobView, cost: float) -> bool:
        project, organization = self.parties(job)
        return not project.capped(cost) and not organization.capped(cost)

    def ends_at(self, job: JobView) -> float:
        """When it is gone at the latest, if it starts now."""
        return self.snapshot.now + job.limit_s + self.snapshot.settings.grace_s

    def admits(self, job: JobView, place: Place, until: float) -> bool:
        """Whether a start there leaves every reservation its GPUs at its time."""
        return all(
            until <= kept.at or kept.job.id == job.id or self._leaves_room(kept, job, place)
            for kept in self.reservations.values()
        )

    def _leaves_room(self, kept: Reservation, job: JobView, place: Place) -> bool:
        theirs, mine = self.parties(kept.job), self.parties(job)
        cost = self.cost(kept.job)
        for party, other in zip(theirs, mine, strict=True):
            if party is other and party.rate_at(kept.at) + place.rate + cost > party.view.cap + EPSILON:
                return False
        if place.node_id != kept.node_id:
            return True
        free, slots = self._free_at(self.nodes[kept.node_id], kept.job, kept.at)
        return (free & ~place.mask).bit_count() >= kept.job.gpus and slots > 1

    def _free_at(self, node: Node, job: JobView, at: float) -> tuple[int, int]:
        """Devices of a node that the job could use then, and slots, if everybody runs to the limit."""
        staying, slots = node.foreign | node.kept, node.slots
        for one in node.occupants:
            if one.until > at:
                staying |= one.mask
            else:
                slots += 1
        return node.suitable(job) & ~staying, slots

    def reservation(self, job: JobView, *, reserved: bool = True) -> Reservation | None:
        """The earliest time and node at which it fits if everybody runs to the limit; None if that never comes.

        `reserved`: a class that another job has reserved is not to be had.
        """
        project, organization = self.parties(job)
        cost, now = self.cost(job), self.snapshot.now
        least = max(now, project.room_at(cost), organization.room_at(cost))
        if math.isinf(least):
            return None
        best: tuple[float, int, str] | None = None
        found: Reservation | None = None
        for node in self.nodes.values():
            if not node.could_run(job):
                continue
            for at in sorted({least, *(one.until for one in node.occupants if one.until > least)}):
                if math.isinf(at) or (best is not None and at > best[0]):
                    break
                free, slots = self._free_at(node, job, at)
                free = self._one_class(node, job, free, reserved)
                if slots and free.bit_count() >= job.gpus:
                    key = at, free.bit_count() - job.gpus, node.view.name
                    if best is None or key < best:
                        name = node.taken(free)[0].view.gpu_class
                        best, found = key, Reservation(job, at, node.view.id, name)
                    break
        return found

    def _one_class(self, node: Node, job: JobView, free: int, reserved: bool) -> int:
        """Of those, the devices of one class that the job may reserve."""
        best = 0
        for name, (_, mask) in sorted(node.classes.items()):
            taken = self.reservations.get(name) if reserved else None
            if taken is None or taken.job.id == job.id:
                best = max(best, free & mask, key=int.bit_count)
        return best

    # ---- places ------------------------------------------------------------------------------------------------

    def _places(self, job: JobView) -> Iterator[tuple[tuple[object, ...], Place]]:
        """Every node's best place for it, each with the key that the smallest is taken by."""
        settings = self.snapshot.settings
        shares = job.shareable and job.gpus == 1 and settings.sharing
        joins = job.gpus == 1 and settings.engines and job.engine_key and not self._dedicated(job)
        for node in self.nodes.values():
            if not node.slots or not job.labels <= node.view.labels:
                continue
            if joins:
                yield from self._engines_on(node, job)
            if shares:
                yield from self._beside(node, job)
            fitting = node.empty & ~node.kept & node.suitable(job)
            if fitting.bit_count() < job.gpus:
                continue
            for _, mask in node.classes.values():
                alike = fitting & mask
                if alike.bit_count() >= job.gpus:
                    yield self._whole(node, job, alike, shares, bool(joins))

    def _dedicated(self, job: JobView) -> bool:
        return self.projects[job.project_id].view.dedicated

    def _whole(
        self, node: Node, job: JobView, fitting: int, shares: bool, opens: bool
    ) -> tuple[tuple[object, ...], Place]:
        """Empty devices of one class, the smallest that are large enough."""
        taken = node.taken(fitting)[: job.gpus]
        waste = sum(gpu.view.usable_bytes - job.required_bytes for gpu in taken)
        rate = sum(gpu.view.cost for gpu in taken)
        if shares or opens:
            rate *= job.required_bytes / taken[0].view.usable_bytes
        engine = uuid.uuid5(_ENGINES, str(job.id)) if opens else None
        mask = sum(gpu.bit for gpu in taken)
        place = Place(node.view.id, mask, job.required_bytes, not shares and not opens, rate, engine)
        return (fitting.bit_count() - job.gpus, waste, rate, node.view.name), place

    def _beside(self, node: Node, job: JobView) -> Iterator[tuple[tuple[object, ...], Place]]:
        """Devices that jobs of its own project share already."""
        for gpu in node.gpus:
            if gpu.held_by == job.project_id and gpu.free >= job.required_bytes and not gpu.bit & node.kept:
                if job.gpu_class not in (None, gpu.view.gpu_class):
                    continue
                rate = gpu.view.cost * job.required_bytes / gpu.view.usable_bytes
                key = -1, gpu.free - job.required_bytes, rate, node.view.name
                yield key, Place(node.view.id, gpu.bit, job.required_bytes, False, rate)

    def _engines_on(self, node: Node, job: JobView) -> Iterator[tuple[tuple[object, ...], Place]]:
        """The base is there already: a job brings its own bytes only."""
        for engine in self.engines:
            if engine.node_id != node.view.id or engine.key != job.engine_key:
                continue
            gpu = node.index.get(engine.gpu_id)
            if gpu is None or engine.organization_id != job.organization_id or gpu.free < job.engine_bytes:
                continue
            rate = gpu.view.cost * job.engine_bytes / gpu.view.usable_bytes
            key = -2, gpu.free - job.engine_bytes, rate, node.view.name
            yield key, Place(node.view.id, gpu.bit, job.engine_bytes, False, rate, engine.id)

    def _kept_place(self, job: JobView) -> Place | None:
        """The GPUs that others were moved off, once they are empty."""
        _, hold = self.kept[job.id]
        node = self.nodes[hold.node_id]
        mask = node.mask(hold.gpu_ids)
        if not node.slots or mask & ~node.empty:
            return None
        return Place(hold.node_id, mask, job.required_bytes, True, sum(gpu.view.cost for gpu in node.taken(mask)))

    # ---- what a pass does to it --------------------------------------------------------------------------------

    def start(self, job: JobView, place: Place, why: str) -> Start:
        node, parties = self.nodes[place.node_id], self.parties(job)
        self.let_go(job.id)
        taken = node.taken(place.mask)
        for gpu in taken:
            gpu.free = 0 if place.exclusive else gpu.free - place.bytes_per_gpu
            if not place.exclusive and place.engine_id is None:
                gpu.held_by = job.project_id
        node.empty &= ~place.mask
        node.slots -= 1
        if place.engine_id is not None and all(one.id != place.engine_id for one in self.engines):
            first, key = taken[0].view.id, job.engine_key or ""
            self.engines.append(EngineView(place.engine_id, place.node_id, first, job.organization_id, key))
        one = Occupant(self.ends_at(job), place.mask, job.project_id, place.rate)
        insort(node.occupants, one, key=lambda other: other.until)
        for party in parties:
            _count(party, place.rate, 1, len(taken))
            party.occupants.append(one)
        ids = tuple(gpu.view.id for gpu in taken)
        return Start(
            job.id,
            place.node_id,
            ids,
            place.bytes_per_gpu,
            place.exclusive,
            place.engine_id,
            place.rate,
            job.limit_s,
            why,
        )

    def keep(self, job: JobView, hold: Hold) -> None:
        """GPUs that are being vacated: nobody else gets them, and its tenants count them as theirs."""
        node = self.nodes[hold.node_id]
        self.kept[job.id] = job, hold
        node.kept |= node.mask(hold.gpu_ids)
        for party in self.parties(job):
            _count(party, self._rate_of(hold), 1, len(hold.gpu_ids))

    def let_go(self, job_id: uuid.UUID) -> None:
        """The opposite of `keep`."""
        if (found := self.kept.pop(job_id, None)) is None:
            return
        job, hold = found
        node = self.nodes[hold.node_id]
        node.kept &= ~node.mask(hold.gpu_ids)
        self._nowhere.clear()
        for party in self.parties(job):
            _count(party, -self._rate_of(hold), -1, -len(hold.gpu_ids))

    def _rate_of(self, hold: Hold) -> float:
        node = self.nodes[hold.node_id]
        return sum(node.index[gpu_id].view.cost for gpu_id in hold.gpu_ids)


def _count(party: Party, rate: float, running: int, gpus: int) -> None:
    party.rate += rate
    party.running += running
    party.gpus += gpus


def suits(gpu: GpuView, job: JobView) -> bool:
    """Empty, it could hold the job."""
    return gpu.usable_bytes >= job.required_bytes and job.gpu_class in (None, gpu.gpu_class)


# ---- from a snapshot -------------------------------------------------------------------------------------------


def build(snapshot: Snapshot) -> World:
    """Order of rows does not matter: everything is sorted here."""
    world = World(snapshot)
    for view in sorted(snapshot.nodes, key=lambda node: (node.name, node.id)):
        if view.schedulable:
            world.nodes[view.id] = _node(view)
    world.sizes = tuple(sorted({gpu.usable_bytes for node in snapshot.nodes for gpu in node.gpus}))
    world.classes = frozenset(name for node in world.nodes.values() for name in node.classes)
    world.engines = sorted(snapshot.engines, key=lambda engine: engine.id)
    _add_tenants(world)
    _add_running(world)
    for hold in sorted(snapshot.holds, key=lambda hold: hold.job_id):
        if hold.kind is HoldKind.PREEMPTION and _still_good(world, hold):
            job = next((one for one in snapshot.jobs if one.id == hold.job_id), None)
            if job is not None:
                world.keep(job, hold)
    return world


def _node(view: NodeView) -> Node:
    ordered = sorted(view.gpus, key=lambda gpu: (gpu.usable_bytes, gpu.id))
    gpus = [Gpu(gpu, 1 << place, gpu.free_bytes, gpu.held_by) for place, gpu in enumerate(ordered)]
    empty = sum(gpu.bit for gpu in gpus if gpu.free == gpu.view.usable_bytes)
    classes: dict[str, tuple[float, int]] = {}
    for gpu in gpus:
        _, mask = classes.get(gpu.view.gpu_class, (0.0, 0))
        classes[gpu.view.gpu_class] = gpu.view.cost, mask | gpu.bit
    classes = dict(sorted(classes.items()))
    everything = sum(gpu.bit for gpu in gpus)
    index = {gpu.view.id: gpu for gpu in gpus}
    node = Node(view, view.free_slots, gpus, index, empty, classes, _sizes=[gpu.view.usable_bytes for gpu in gpus])
    for name, mask in ((None, everything), *((name, mask) for name, (_, mask) in classes.items())):
        node._by_size[name] = [mask & ~((1 << place) - 1) for place in range(len(gpus) + 1)]
    return node


def _add_tenants(world: World) -> None:
    """A tenant that the snapshot has no row of weighs 1 and has no limits."""
    snapshot = world.snapshot
    for view in sorted(snapshot.projects, key=lambda one: one.id):
        world.projects[view.id] = Party(view, service=view.service)
    for view in sorted(snapshot.organizations, key=lambda one: one.id):
        world.organizations[view.id] = Party(view, service=view.service)
    for job in snapshot.jobs:
        queue = world.queues.get(job.project_id)
        if queue is None:
            queue = world.queues[job.project_id] = []
        queue.append(job)
    known = [(one.project_id, one.organization_id) for one in snapshot.running]
    known += [(project_id, queue[0].organization_id) for project_id, queue in world.queues.items()]
    for project_id, organization_id in known:
        if project_id not in world.projects:
            world.projects[project_id] = Party(Tenant(project_id, organization_id))
        if organization_id not in world.organizations:
            world.organizations[organization_id] = Party(Tenant(organization_id, organization_id))
    for project_id, queue in world.queues.items():
        queue.sort(key=attrgetter("queued_at"))
        ranked = any(job.priority or job.urgent for job in queue)
        if ranked or any(one.queued_at == other.queued_at for one, other in pairwise(queue)):
            queue.sort(key=_own_order)
        world.kinds[project_id] = [world.kind(job) for job in queue]
        world.projects[project_id].waits = world.organizations[queue[0].organization_id].waits = True


def _own_order(job: JobView) -> tuple[bool, int, float, int]:
    return not job.urgent, -job.priority, job.queued_at, job.id.int


def _add_running(world: World) -> None:
    snapshot = world.snapshot
    soonest = math.nextafter(snapshot.now, math.inf)
    for view in sorted(snapshot.running, key=lambda one: one.attempt_id.int):
        until = math.inf if view.ended and view.stops_at is None else _until(view, snapshot.settings.grace_s)
        node = world.nodes.get(view.node_id)
        # what should be gone by now, and is not, may be gone any moment
        one = Occupant(max(until, soonest), node.mask(view.gpu_ids) if node else 0, view.project_id, 0.0, view)
        if node is not None:
            node.occupants.append(one)
        if not view.ended:
            one.rate = view.rate
            for party in (world.projects[view.project_id], world.organizations[view.organization_id]):
                _count(party, view.rate, 1, len(view.gpu_ids))
                party.occupants.append(one)
    for node in world.nodes.values():
        node.occupants.sort(key=lambda one: one.until)
        known = 0
        for one in node.occupants:
            known |= one.mask
        node.foreign = sum(gpu.bit for gpu in node.gpus) & ~node.empty & ~known


def _until(view: RunningView, grace_s: float) -> float:
    end = view.started_at + view.limit_s + grace_s
    return min(end, view.stops_at) if view.stops_at is not None else end


def _still_good(world: World, hold: Hold) -> bool:
    """Its node is there, nobody else was promised its GPUs, and they come back in time."""
    node = world.nodes.get(hold.node_id)
    if node is None or world.snapshot.now > hold.promised_at + world.snapshot.settings.grace_s:
        return False
    return all(gpu_id in node.index and not node.index[gpu_id].bit & node.kept for gpu_id in hold.gpu_ids)
