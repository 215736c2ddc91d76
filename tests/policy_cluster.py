"""What is free after a pass, by other means than the policy's own: the invariants ask this."""

import math
import uuid
from collections import Counter, defaultdict
from collections.abc import Iterable

from scheduler.simulation import Live, Simulation
from tests.policy_worlds import suits
from tunery.contracts.scheduling import GpuView, Hold, HoldKind, JobView, NodeView, Snapshot

EPSILON = 1e-6


class Cluster:
    """What is free after a pass: counted anew from who runs and what is held."""

    def __init__(self, sim: Simulation, seen: Snapshot, holds: Iterable[Hold]) -> None:
        self.now, self.settings = sim.now, sim.settings
        self.nodes = [node for node in seen.nodes if node.schedulable]
        self.gpus = {gpu.id: gpu for node in seen.nodes for gpu in node.gpus}
        self.live = list(sim.live.values())
        self.tenants = {one.id: one for one in (*seen.projects, *seen.organizations)}
        holds = list(holds)
        self.held = [hold for hold in holds if hold.kind is HoldKind.PREEMPTION]
        self.gangs = [hold for hold in holds if hold.kind is HoldKind.GANG]
        self.waiting = sim.waiting
        before = Counter(view.node_id for view in seen.running)
        self.capacity = {node.id: node.free_slots + before[node.id] for node in seen.nodes}

    def until(self, one: Live) -> float:
        end = one.view.started_at + one.view.limit_s + self.settings.grace_s
        end = end if one.view.stops_at is None else min(end, one.view.stops_at)
        return max(end, math.nextafter(self.now, math.inf))

    def users(self, at: float) -> dict[uuid.UUID, list[Live]]:
        """Of each device, then, if everybody runs to the limit."""
        found: dict[uuid.UUID, list[Live]] = defaultdict(list)
        for one in self.live:
            if at <= self.now or self.until(one) > at:
                for gpu_id in one.view.gpu_ids:
                    found[gpu_id].append(one)
        return found

    def slots(self, node: NodeView, at: float) -> int:
        used = sum(one.view.node_id == node.id and (at <= self.now or self.until(one) > at) for one in self.live)
        return self.capacity[node.id] - used

    def rate(self, tenant_id: uuid.UUID, at: float) -> float:
        """Of what runs then, and of what devices are kept for."""
        live = (
            one.view.rate
            for one in self.live
            if tenant_id in (one.view.project_id, one.view.organization_id) and (at <= self.now or self.until(one) > at)
        )
        kept = (
            sum(self.gpus[gpu_id].cost for gpu_id in hold.gpu_ids)
            for hold in self.held
            if hold.job_id in self.waiting
            and tenant_id in (self.waiting[hold.job_id].project_id, self.waiting[hold.job_id].organization_id)
        )
        return sum(live) + sum(kept)

    def running(self, project_id: uuid.UUID, at: float) -> int:
        live = sum(one.view.project_id == project_id and (at <= self.now or self.until(one) > at) for one in self.live)
        return live + sum(
            hold.job_id in self.waiting and self.waiting[hold.job_id].project_id == project_id for hold in self.held
        )

    def empty(self, node: NodeView, job: JobView, at: float) -> list[GpuView]:
        used = self.users(at)
        kept = {gpu_id for hold in self.held if hold.job_id != job.id for gpu_id in hold.gpu_ids}
        return [gpu for gpu in node.gpus if gpu.id not in used and gpu.id not in kept and suits(gpu, job)]

    def places(self, job: JobView, at: float) -> list[tuple[NodeView, float]]:
        """Nodes that have a place of its own for it, and what a second there would cost."""
        found = []
        for node in self.nodes:
            if not job.labels <= node.labels or self.slots(node, at) < 1:
                continue
            for name in {gpu.gpu_class for gpu in node.gpus}:
                alike = [gpu for gpu in self.empty(node, job, at) if gpu.gpu_class == name]
                if len(alike) >= job.gpus:
                    rate = sum(gpu.cost for gpu in alike[: job.gpus])
                    if job.shareable and job.gpus == 1 and self.settings.sharing:
                        rate *= job.required_bytes / alike[0].usable_bytes
                    found.append((node, rate))
        return found

    def allows(self, job: JobView, rate: float, at: float) -> bool:
        """Caps, budget and running limit of its project and organization."""
        project = self.tenants[job.project_id]
        full = project.max_running is not None and self.running(job.project_id, at) >= project.max_running
        if full or project.blocked:
            return False
        both = (self.tenants[one] for one in (job.project_id, job.organization_id) if one in self.tenants)
        return all(self.rate(one.id, at) + rate <= one.cap + EPSILON for one in both)

    def could_start(self, job: JobView) -> bool:
        """Reservations apart."""
        return any(self.allows(job, rate, self.now) for _, rate in self.places(job, self.now))

    def keeps(self, hold: Hold) -> bool:
        """Whether a gang can start where and when it was promised, beside all who were promised something by then."""
        job, at = self.waiting[hold.job_id], hold.promised_at
        return any(
            node.id == hold.node_id and self.allows(job, rate, at) and self._beside_gangs(hold, rate)
            for node, rate in self.places(job, at)
        )

    def _beside_gangs(self, hold: Hold, rate: float) -> bool:
        job, at = self.waiting[hold.job_id], hold.promised_at
        costs = {gpu.gpu_class: gpu.cost for gpu in self.gpus.values()}
        others = [
            (self.waiting[one.job_id], costs[one.gpu_class])
            for one in self.gangs
            if one.job_id in self.waiting
            and one.job_id != hold.job_id
            and one.promised_at <= at < one.promised_at + self.waiting[one.job_id].limit_s + self.settings.grace_s
        ]
        for tenant_id in (job.project_id, job.organization_id):
            if (tenant := self.tenants.get(tenant_id)) is None:
                continue
            same = [(one, cost) for one, cost in others if tenant_id in (one.project_id, one.organization_id)]
            if self.rate(tenant_id, at) + rate + sum(one.gpus * cost for one, cost in same) > tenant.cap + EPSILON:
                return False
            if tenant.max_running is not None and self.running(tenant_id, at) + len(same) >= tenant.max_running:
                return False
        return True

    def earliest(self, job: JobView) -> float:
        """When it fits if everybody runs to the limit."""
        for at in sorted({self.now, *(self.until(one) for one in self.live)}):
            if any(self.allows(job, rate, at) for _, rate in self.places(job, at)):
                return at
        return math.inf

    def with_(self, job: JobView, node: NodeView) -> "list[Cluster]":
        """The same, had it started there: one for each choice of devices that matters (which class)."""
        made = []
        for name in sorted({gpu.gpu_class for gpu in node.gpus}):
            alike = [gpu for gpu in self.empty(node, job, self.now) if gpu.gpu_class == name][: job.gpus]
            if len(alike) == job.gpus:
                made.append(_Started(self, job, node, alike))
        return list(made)


class _Started(Cluster):
    def __init__(self, before: Cluster, job: JobView, node: NodeView, gpus: list[GpuView]) -> None:
        self.now, self.settings, self.nodes, self.gpus = before.now, before.settings, before.nodes, before.gpus
        self.tenants, self.held, self.gangs = before.tenants, before.held, before.gangs
        self.waiting, self.capacity = before.waiting, before.capacity
        self.live = before.live
        self._job, self._node, self._own = job, node, gpus
        self._rate = sum(gpu.cost for gpu in gpus)
        if job.shareable and job.gpus == 1 and self.settings.sharing:
            self._rate *= job.required_bytes / gpus[0].usable_bytes

    def _stays(self, at: float) -> bool:
        return self.now + self._job.limit_s + self.settings.grace_s > at

    def empty(self, node: NodeView, job: JobView, at: float) -> list[GpuView]:
        taken = {gpu.id for gpu in self._own} if self._stays(at) else set()
        return [gpu for gpu in super().empty(node, job, at) if gpu.id not in taken]

    def slots(self, node: NodeView, at: float) -> int:
        return super().slots(node, at) - (node.id == self._node.id and self._stays(at))

    def rate(self, tenant_id: uuid.UUID, at: float) -> float:
        mine = tenant_id in (self._job.project_id, self._job.organization_id) and self._stays(at)
        return super().rate(tenant_id, at) + (self._rate if mine else 0.0)

    def running(self, project_id: uuid.UUID, at: float) -> int:
        return super().running(project_id, at) + (project_id == self._job.project_id and self._stays(at))

    def earliest(self, job: JobView) -> float:
        own_end = self.now + self._job.limit_s + self.settings.grace_s
        for at in sorted({self.now, own_end, *(self.until(one) for one in self.live)}):
            if any(self.allows(job, rate, at) for _, rate in self.places(job, at)):
                return at
        return math.inf
