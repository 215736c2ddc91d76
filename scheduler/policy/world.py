"""The snapshot as a pass changes it: what is free where, who holds it until when, and what each tenant has."""

import math
import uuid
from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from scheduler.policy.parts import EPSILON, Kind, Node, Occupant, Party, Place, Reservation
from tunery.contracts.scheduling import EngineView, Hold, JobView, Snapshot, Start

_ENGINES = uuid.UUID("6f2b1f0e-6c2c-5a53-9a5a-3f2f3f0c7d11")


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
    longest: dict[uuid.UUID, dict[Kind, JobView]] = field(default_factory=dict)
    """By project and kind: the first job with the longest limit."""
    classes: frozenset[str] = frozenset()
    """Of the devices that may take work."""
    reservations: dict[str, Reservation] = field(default_factory=dict)
    """By GPU class."""
    kept: dict[uuid.UUID, tuple[JobView, Hold]] = field(default_factory=dict)
    """Pre-emption holds, by job."""
    _coming_to: dict[uuid.UUID, dict[uuid.UUID, Occupant]] = field(default_factory=lambda: defaultdict(dict))
    """By node and job: what those for whom devices are kept will be there."""
    engines: list[EngineView] = field(default_factory=list)
    sizes: tuple[int, ...] = ()
    _nowhere: set[tuple[Kind, uuid.UUID | None]] = field(default_factory=set)
    """Kinds that fit on no node; room only shrinks in a pass. What shares fits by project."""
    never: dict[uuid.UUID, set[Kind]] = field(default_factory=lambda: defaultdict(set))
    """By project: kinds that could not start even if nobody else were there."""
    _kinds: dict[tuple[object, ...], Kind] = field(default_factory=dict)
    _costs: dict[tuple[int, int, str | None, frozenset[tuple[str, str]]], float] = field(default_factory=dict)
    _byte: float | None = None

    # ---- what is asked of it ---------------------------------------------------------------------------------

    def kind(self, job: JobView) -> Kind:
        """Jobs of one kind fit the same places. As `contracts.scheduling.shape`, but quick."""
        key = job.engine_key if self.snapshot.settings.engines else None
        shared = job.shareable or key is not None
        size = job.required_bytes if shared else bisect_left(self.sizes, job.required_bytes)
        kind = job.gpus, size, job.gpu_class, job.labels, job.shareable, key, job.urgent
        return self._kinds.setdefault(kind, len(self._kinds))

    def shares(self, job: JobView) -> bool:
        """It may hold less than a whole device."""
        settings = self.snapshot.settings
        return job.gpus == 1 and (
            (settings.sharing and job.shareable) or (settings.engines and job.engine_key is not None)
        )

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

    def cheapest(self, job: JobView) -> float | None:
        """What a second costs on the cheapest place that is free for it now, caps and reservations apart."""
        return min((place.rate for _, place in self._places(job)), default=None) if self.fits(job) else None

    def cost(self, job: JobView) -> float:
        """Of a second, on the cheapest class that could take it. What shares a device costs less: at least its share
        of the memory of the largest; with an engine that may be there already, nothing is certain."""
        if self.shares(job):
            joins = self.snapshot.settings.engines and job.engine_key is not None
            return 0.0 if joins else job.required_bytes * self._cheapest_byte()
        least = self._least(job)
        return least if math.isfinite(least) else float(job.gpus)

    def _least(self, job: JobView) -> float:
        """What a second costs on the cheapest devices of its own that could take it; infinity if none could."""
        key = job.gpus, bisect_left(self.sizes, job.required_bytes), job.gpu_class, job.labels
        if (found := self._costs.get(key)) is None:
            prices = [
                price
                for node in self.nodes.values()
                if node.could_run(job)
                for price, mask in node.classes.values()
                if (node.suitable(job) & mask).bit_count() >= job.gpus
            ]
            found = self._costs[key] = job.gpus * min(prices, default=math.inf)
        return found

    def _cheapest_byte(self) -> float:
        if self._byte is None:
            every = (gpu.view.cost / gpu.view.usable_bytes for node in self.nodes.values() for gpu in node.gpus)
            self._byte = min(every, default=0.0)
        return self._byte

    def within_caps(self, job: JobView, cost: float) -> bool:
        project, organization = self.parties(job)
        return not project.capped(cost) and not organization.capped(cost)

    def is_hopeless(self, job: JobView, cost: float) -> bool:
        """It could not start even if nobody else were there: no such device, or a cap below its cost."""
        least = self._least(job)
        project, organization = self.parties(job)
        return math.isinf(least) or cost > min(project.view.cap, organization.view.cap) + EPSILON

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
        others = [one for one in self.reservations.values() if one.job.id != job.id]
        if not self._may_at(job, place.rate, kept.at, others):
            return False
        if place.node_id != kept.node_id:
            return True
        node = self.nodes[kept.node_id]
        free, slots = self._free_at(node, kept.job, kept.at)
        free &= node.classes[kept.gpu_class][1]
        wanted = sum(one.node_id == kept.node_id and self._lasts(one, kept.at) for one in others)
        return (free & ~place.mask).bit_count() >= kept.job.gpus and slots > wanted

    def _lasts(self, one: Reservation, at: float) -> bool:
        """Whether it has begun by then and may still run."""
        return one.at <= at < one.at + one.job.limit_s + self.snapshot.settings.grace_s

    def _may_at(self, job: JobView, rate: float, at: float, reservations: list[Reservation]) -> bool:
        """Run then, by the limits of its project and organization, beside what still runs and all of these that do:
        two by two they may fit where all of them together do not."""
        for party in self.parties(job):
            if not party.limited:
                continue
            near = [
                one
                for one in reservations
                if self._lasts(one, at) and any(other is party for other in self.parties(one.job))
            ]
            if party.rate_at(at) + rate + sum(one.rate for one in near) > party.view.cap + EPSILON:
                return False
            most = party.view.max_running
            if most is not None and party.running_at(at) + 1 + len(near) > most:
                return False
        return True

    def renew(self, job: JobView, hold: Hold) -> None:
        """The reservation that it had, while its node is there."""
        node = self.nodes.get(hold.node_id)
        if node is not None and hold.gpu_class in node.classes:
            rate = self._alone(job, node.classes[hold.gpu_class][0])
            self.reservations[hold.gpu_class] = Reservation(job, hold.promised_at, hold.node_id, hold.gpu_class, rate)

    def reserve(self, job: JobView) -> Reservation | None:
        """Its reservation, kept from now on instead of the one that it had."""
        self.unreserve(job)
        if self.classes <= self.reservations.keys():
            return None
        found = self.reservation(job)
        if found is not None:
            self.reservations[found.gpu_class] = found
        return found

    def unreserve(self, job: JobView) -> None:
        for name, one in list(self.reservations.items()):
            if one.job.id == job.id:
                del self.reservations[name]

    def _free_at(self, node: Node, job: JobView, at: float) -> tuple[int, int]:
        """Devices of a node that the job could use then, and slots, if everybody runs to the limit."""
        staying, slots = node.foreign, node.slots
        if node.kept:
            for one in self._coming(node):
                if one.until > at:
                    staying |= one.mask
                    slots -= 1
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
        others = [one for one in self.reservations.values() if one.job.id != job.id] if reserved else []
        taken = {one.gpu_class for one in others}
        moments: dict[float, list[float]] = {}
        may: dict[tuple[float, float], bool] = {}
        best: tuple[float, int, str] | None = None
        found: Reservation | None = None
        for node in self.nodes.values():
            if not node.could_run(job):
                continue
            for name, (price, mask) in node.classes.items():
                if name in taken or (node.suitable(job) & mask).bit_count() < job.gpus:
                    continue
                rate = self._alone(job, price)
                if rate not in moments:
                    moments[rate] = self._moments(job, rate, others)
                least = moments[rate][0]
                ends = {*moments[rate], *(one.until for one in node.occupants if one.until > least)}
                if node.kept:
                    ends.update(one.until for one in self._coming(node) if one.until > least)
                for at in sorted(ends):
                    if math.isinf(at) or (best is not None and at > best[0]):
                        break
                    if others and (rate, at) not in may:
                        may[rate, at] = self._may_from(job, rate, at, others)
                    if others and not may[rate, at]:
                        continue
                    free, slots = self._free_at(node, job, at)
                    slots -= sum(one.node_id == node.view.id and self._lasts(one, at) for one in others)
                    if slots > 0 and (left := (free & mask).bit_count() - job.gpus) >= 0:
                        key = at, left, node.view.name
                        if best is None or key < best:
                            best, found = key, Reservation(job, at, node.view.id, name, rate)
                        break
        return found

    def _alone(self, job: JobView, price: float) -> float:
        """What a second costs it on devices of this price that nobody else is on."""
        return min(price, self.cost(job)) if self.shares(job) else job.gpus * price

    def _moments(self, job: JobView, rate: float, others: list[Reservation]) -> list[float]:
        """When its project and organization may have so much more, if everybody runs to the limit, and when more of
        them ends, those included that hold reservations: what only one of the two may use is the first one's."""
        parties = self.parties(job)
        least = max(self.snapshot.now, parties[0].turn_at(), *(party.room_at(rate) for party in parties))
        if not others:
            return [least]
        ends = {one.until for party in parties if party.limited for one in party.occupants}
        ends.update(one.at + one.job.limit_s + self.snapshot.settings.grace_s for one in others)
        return [least, *(at for at in sorted(ends) if at > least)]

    def _may_from(self, job: JobView, rate: float, at: float, others: list[Reservation]) -> bool:
        """From then to its end."""
        until = at + job.limit_s + self.snapshot.settings.grace_s
        moments = [at, *(one.at for one in others if at < one.at < until)]
        return all(self._may_at(job, rate, moment, others) for moment in moments)

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
        self.unreserve(job)
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
            party.take(one, len(taken))
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
        node, settings = self.nodes[hold.node_id], self.snapshot.settings
        mask = node.mask(hold.gpu_ids)
        until = max(self.snapshot.now, hold.promised_at) + job.limit_s + settings.grace_s
        one = Occupant(until, mask, job.project_id, self._rate_of(hold))
        self.kept[job.id] = job, hold
        self._coming_to[hold.node_id][job.id] = one
        node.kept |= mask
        for party in self.parties(job):
            party.take(one, len(hold.gpu_ids))

    def let_go(self, job_id: uuid.UUID) -> None:
        """The opposite of `keep`."""
        if (found := self.kept.pop(job_id, None)) is None:
            return
        job, hold = found
        node = self.nodes[hold.node_id]
        node.kept &= ~node.mask(hold.gpu_ids)
        self._nowhere.clear()
        one = self._coming_to[hold.node_id].pop(job_id)
        for party in self.parties(job):
            party.leave(one, len(hold.gpu_ids))

    def _coming(self, node: Node) -> Iterable[Occupant]:
        """Those for whom devices of the node are kept."""
        return self._coming_to[node.view.id].values()

    def _rate_of(self, hold: Hold) -> float:
        node = self.nodes[hold.node_id]
        return sum(node.index[gpu_id].view.cost for gpu_id in hold.gpu_ids)
