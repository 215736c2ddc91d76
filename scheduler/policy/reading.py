"""From a snapshot to the world of a pass. The order of its rows does not matter: everything is sorted here."""

import math
from itertools import pairwise
from operator import attrgetter

from scheduler.policy.parts import Gpu, Kind, Node, Occupant, Party
from scheduler.policy.world import World
from tunery.contracts.scheduling import Hold, HoldKind, JobView, NodeView, RunningView, Snapshot, Tenant


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
    held = {hold.job_id.int for hold in snapshot.holds}  # a UUID's own comparison is slow
    waiting = {job.id.int: job for job in snapshot.jobs if job.id.int in held} if held else {}
    for hold in sorted(snapshot.holds, key=lambda hold: hold.job_id):
        if hold.kind is HoldKind.PREEMPTION and _still_good(world, hold):
            job = waiting.get(hold.job_id.int)
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
    by_number: dict[int, list[JobView]] = {}  # a UUID's own hash is slow
    for job in snapshot.jobs:
        queue = by_number.get(number := job.project_id.int)
        if queue is None:
            by_number[number] = world.queues[job.project_id] = queue = []
        queue.append(job)
    known = [(one.project_id, one.organization_id) for one in snapshot.running]
    known += [(project_id, queue[0].organization_id) for project_id, queue in world.queues.items()]
    for project_id, organization_id in known:
        if project_id not in world.projects:
            world.projects[project_id] = Party(Tenant(project_id, organization_id))
        if organization_id not in world.organizations:
            world.organizations[organization_id] = Party(Tenant(organization_id, organization_id))
    for project_id, queue in world.queues.items():
        _sort(queue)
        world.kinds[project_id], world.longest[project_id] = _kinds(world, queue)
        world.projects[project_id].waits = world.organizations[queue[0].organization_id].waits = True


def _kinds(world: World, queue: list[JobView]) -> tuple[list[Kind], dict[Kind, JobView]]:
    """Of each job, and of each kind the job with the longest limit."""
    kinds: list[Kind] = []
    longest: dict[Kind, JobView] = {}
    for job in queue:
        kinds.append(kind := world.kind(job))
        other = longest.get(kind)
        if other is None or job.limit_s > other.limit_s:
            longest[kind] = job
    return kinds, longest


def _sort(queue: list[JobView]) -> None:
    """Urgent first, then by priority, then the oldest. Sorts are stable, and a plain attribute is a quick key."""
    queue.sort(key=attrgetter("queued_at"))
    if any(one.queued_at == other.queued_at for one, other in pairwise(queue)):
        queue.sort(key=lambda job: (job.queued_at, job.id.int))
    if any(job.priority for job in queue):
        queue.sort(key=attrgetter("priority"), reverse=True)
    if any(job.urgent for job in queue):
        queue.sort(key=attrgetter("urgent"), reverse=True)


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
                party.take(one, len(view.gpu_ids))
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
