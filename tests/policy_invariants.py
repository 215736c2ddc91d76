"""The policy's invariants, each looked at after every pass, by other means than the policy's own."""

import math
import uuid
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable
from dataclasses import replace

from scheduler.policy import schedule
from scheduler.simulation import Policy, Simulation
from tests.policy_cluster import EPSILON, Cluster
from tests.policy_worlds import World, suits
from tunery.contracts.scheduling import (
    Hold,
    HoldKind,
    JobView,
    Plan,
    Reason,
    Snapshot,
    WaitCode,
)

EVERY = ("I1", "I2", "I3", "I4", "I5", "I7", "I8", "I10", "I12", "I13")


class Broken(AssertionError):
    """An invariant does not hold."""


def claim(name: str, holds: bool, *about: object) -> None:
    if not holds:
        raise Broken(name, *about)


class Checker:
    """Wraps a policy and watches a simulation of it. `only`: these invariants."""

    def __init__(self, world: World, policy: Policy = schedule, only: Collection[str] = EVERY) -> None:
        self._world, self._policy, self._only = world, policy, frozenset(only)
        self._promised: dict[uuid.UUID, float] = {}
        self._lost_at = [(at, until) for _, at, until in world.losses]
        self.sim = world.simulation(self._decide, watch=self._after)
        self.happened: set[str] = set()

    def run(self) -> None:
        self.sim.run(until=20_000)
        if "I5" in self._only:
            self._everybody_started()
        if "I12" in self._only:
            self._conserved()
        fates = self.sim.fates.values()
        for name, was in (
            ("gangs", any(len(one.starts) and one.job.gpus > 1 for one in fates)),
            ("pre-emption", bool(self.sim.preempts)),
            ("faults of nodes", any(one.faults for one in fates)),
            ("cancels", any(one.end == "cancelled" for one in fates)),
            ("limits reached", any(one.end == "limit" for one in fates)),
            ("caps", any(not math.isinf(one.cap) for one in self._world.projects)),
            ("guarantees", any(one.guarantee for one in self._world.projects)),
        ):
            if was:
                self.happened.add(name)

    def _decide(self, seen: Snapshot) -> Plan:
        plan = self._policy(seen)
        if "I3" in self._only:
            gangs_are_whole(seen, plan)
        if "I10" in self._only:
            rows = replace(
                seen,
                jobs=seen.jobs[::-1],
                nodes=tuple(replace(node, gpus=node.gpus[::-1]) for node in seen.nodes[::-1]),
                running=seen.running[::-1],
                projects=seen.projects[::-1],
                organizations=seen.organizations[::-1],
                holds=seen.holds[::-1],
                preemptions=seen.preemptions[::-1],
            )
            claim("I10", self._policy(rows) == plan, "depends on the order of rows")
        if "I12" in self._only:
            each_once(seen, plan)
        return plan

    def _after(self, sim: Simulation, seen: Snapshot, plan: Plan) -> None:
        cluster = Cluster(sim, seen, plan.holds)
        if "I1" in self._only:
            nothing_is_overcommitted(cluster)
        if "I2" in self._only:
            caps_are_kept(cluster)
        if "I4" in self._only:
            nothing_is_left_idle(cluster, seen, plan)
        if "I7" in self._only:
            self._promises_are_kept(sim, seen, plan)
        if "I8" in self._only and plan.preempts:  # at once: a policy that takes turns does so for ever
            self._nobody_takes_turns()
        if "I13" in self._only:
            every_wait_is_explained(cluster, sim, seen, plan)
        if any(hold.kind is HoldKind.GANG for hold in plan.holds):
            self.happened.add("gang reservations")
        if any(len(cluster.users(sim.now)[gpu_id]) > 1 for gpu_id in cluster.gpus):
            self.happened.add("shared GPUs")

    # ---- those that need the whole story -----------------------------------------------------------------------------

    def _everybody_started(self) -> None:
        for job in self.sim.waiting.values():
            claim("I5", not self._world.could_ever_run(self.sim.fates[job.id].job), "never started", job)

    def _promises_are_kept(self, sim: Simulation, seen: Snapshot, plan: Plan) -> None:
        """A gang's promise moves earlier only, stays until it starts, and is kept; while no node is lost."""
        if any(at <= sim.now for at, _ in self._lost_at):
            return
        holds = {hold.job_id: hold for hold in plan.holds}
        for job_id, by in list(self._promised.items()):
            fate = sim.fates[job_id]
            if fate.starts or fate.ended_at is not None:
                late = bool(fate.starts) and fate.starts[0] > by + EPSILON
                claim("I7", not late, "started after its promise", fate.job, by, fate.starts)
                del self._promised[job_id]
            else:
                claim("I7", job_id in holds, "lost its reservation", fate.job, by)
                claim("I7", sim.now <= by + EPSILON, "waits after its promise", fate.job, by)
        for hold in plan.holds:
            if hold.kind is HoldKind.GANG:
                before = self._promised.get(hold.job_id, math.inf)
                claim("I7", hold.promised_at <= before + EPSILON, "promise moved", hold, before)
                self._promised[hold.job_id] = hold.promised_at

    def _nobody_takes_turns(self) -> None:
        """All of a world lies within one window."""
        moved = Counter(asked.job_id for _, asked in self.sim.preempts)
        most = self._world.settings.max_preemptions
        claim("I8", all(times <= most for times in moved.values()), "moved too often", moved)
        pairs = {(one.beneficiary, one.victim) for one in self.sim.past}
        claim("I8", not any((other, one) in pairs for one, other in pairs), "took turns", pairs)

    def _conserved(self) -> None:
        """Service is what was delivered, less refunds, plus what waking up cost."""
        sim = self.sim
        for one in self._world.projects:
            fates = [fate for fate in sim.fates.values() if fate.job.project_id == one.id]
            live = sum(
                (sim.now - x.view.started_at) * x.view.rate for x in sim.live.values() if x.view.project_id == one.id
            )
            delivered = sum(fate.used - fate.lost for fate in fates) + live
            given = sim.service(one.id) - sim.credit(one.id)
            claim("I12", math.isclose(delivered, given, abs_tol=1e-6), "service", delivered, given)


# ---- one pass ------------------------------------------------------------------------------------------------------


def nothing_is_overcommitted(cluster: Cluster) -> None:
    for gpu_id, users in cluster.users(cluster.now).items():
        gpu = cluster.gpus[gpu_id]
        claim("I1", sum(one.view.bytes_per_gpu for one in users) <= gpu.usable_bytes, "memory", gpu, users)
        alone = [one for one in users if one.view.exclusive]
        claim("I1", not alone or len(users) == 1, "whole and shared at once", gpu, users)
        claim("I1", len({one.view.project_id for one in users}) == 1, "projects share", gpu, users)
    for node in cluster.nodes:
        claim("I1", cluster.slots(node, cluster.now) >= 0, "slots", node)


def caps_are_kept(cluster: Cluster) -> None:
    for tenant in cluster.tenants.values():
        rate = sum(
            one.view.rate for one in cluster.live if tenant.id in (one.view.project_id, one.view.organization_id)
        )
        claim("I2", rate <= tenant.cap + EPSILON, "cap", tenant, rate)
        count = sum(one.view.project_id == tenant.id for one in cluster.live)
        claim("I2", tenant.max_running is None or count <= tenant.max_running, "running limit", tenant, count)


def gangs_are_whole(seen: Snapshot, plan: Plan) -> None:
    nodes = {node.id: node for node in seen.nodes if node.schedulable}
    jobs = {job.id: job for job in seen.jobs}
    for start in plan.starts:
        job, node = jobs[start.job_id], nodes.get(start.node_id)
        claim("I3", node is not None, "node", start)
        assert node is not None
        gpus = [gpu for gpu in node.gpus if gpu.id in start.gpu_ids]
        claim("I3", len(gpus) == len(set(start.gpu_ids)) == len(start.gpu_ids) == job.gpus, "GPUs", start, job)
        claim("I3", all(suits(gpu, job) for gpu in gpus) and job.labels <= node.labels, "place", start, job)


def nothing_is_left_idle(cluster: Cluster, seen: Snapshot, plan: Plan) -> None:
    """Whoever could start now would delay somebody who cannot, and was seen by the pass."""
    started = {start.job_id for start in plan.starts}
    vacating = {hold.job_id for hold in cluster.held}
    heads = [job for job in _heads(seen.jobs, cluster.settings.depth) if job.id not in started]
    gangs = [hold for hold in plan.holds if hold.kind is HoldKind.GANG]
    blocked: list[tuple[JobView, float]] | None = None
    for job in heads:
        if job.id in vacating:
            continue
        for node, rate in cluster.places(job, cluster.now):
            if not cluster.allows(job, rate, cluster.now):
                continue
            if blocked is None:
                promised = {hold.job_id for hold in gangs}
                ahead = [*heads, *(one for one in seen.jobs if one.id in promised and one not in heads)]
                stuck = [one for one in ahead if not cluster.could_start(one)]
                blocked = [(one, cluster.earliest(one)) for one in stuck]
            later = cluster.with_(job, node)
            delayed = any(
                then.earliest(other) > at + EPSILON
                for other, at in blocked
                if other.id != job.id and not math.isinf(at)
                for then in later
            )
            broken = any(
                cluster.keeps(hold) and not then.keeps(hold)
                for hold in gangs
                if hold.job_id != job.id
                for then in later
            )
            claim("I4", delayed or broken, "could have started", job, node.name)


def _heads(jobs: Iterable[JobView], depth: int) -> list[JobView]:
    queues: dict[uuid.UUID, list[JobView]] = defaultdict(list)
    for job in jobs:
        queues[job.project_id].append(job)
    return [
        job
        for queue in queues.values()
        for job in sorted(queue, key=lambda one: (not one.urgent, -one.priority, one.queued_at, one.id))[:depth]
    ]


def each_once(seen: Snapshot, plan: Plan) -> None:
    started = [start.job_id for start in plan.starts]
    waiting = {job.id for job in seen.jobs}
    claim("I12", len(started) == len(set(started)) and waiting >= set(started), "started twice, or not waiting")
    running = {one.attempt_id for one in seen.running if not one.stopping and not one.ended}
    asked = [one.attempt_id for one in plan.preempts]
    claim("I12", len(asked) == len(set(asked)) and running >= set(asked), "stopped twice, or not running")
    held = [hold.job_id for hold in plan.holds]
    claim("I12", len(held) == len(set(held)) and waiting - set(started) >= set(held), "holds of others")
    for tenants, standings in ((seen.projects, plan.projects), (seen.organizations, plan.organizations)):
        known = {one.id: one for one in tenants}
        for one in standings:
            fresh = one.id not in known or not known[one.id].active
            claim("I12", one.credit == 0 or (one.credit > 0 and fresh and one.active), "credit", one)


def every_wait_is_explained(cluster: Cluster, sim: Simulation, seen: Snapshot, plan: Plan) -> None:
    started = {start.job_id for start in plan.starts}
    left = [job for job in seen.jobs if job.id not in started]
    claim(
        "I13", len({(one.project_id, one.shape) for one in plan.explanations}) == len(plan.explanations), "two reasons"
    )
    reasons = plan.reasons(left)
    holds = {hold.job_id: hold for hold in plan.holds}
    heads = {job.id for job in _heads(seen.jobs, cluster.settings.depth)}
    for job in left:
        reason = reasons[job.id]
        claim("I13", _true(cluster, seen, job, reason, holds.get(job.id), job.id in heads), "false", job, reason)


def _true(
    cluster: Cluster, seen: Snapshot, job: JobView, reason: Reason, hold: Hold | None, seen_by_pass: bool
) -> bool:
    numbers, now = dict(reason.numbers), cluster.now
    if hold is not None:
        code = WaitCode.PREEMPTING if hold.kind is HoldKind.PREEMPTION else WaitCode.HOLDS
        return reason.code is code and hold.promised_at <= float(numbers["by"]) < hold.promised_at + 60
    asked = [node for node in seen.nodes if job.labels <= node.labels]
    asked = [node for node in asked if any(job.gpu_class in (None, gpu.gpu_class) for gpu in node.gpus)]
    large = [node for node in asked if sum(suits(gpu, job) for gpu in node.gpus) >= job.gpus]
    able = [node for node in large if node.schedulable]
    free = [len(cluster.empty(node, job, now)) for node in able]
    project, organization = cluster.tenants[job.project_id], cluster.tenants.get(job.organization_id)
    fits = bool(cluster.places(job, now))
    match reason.code:
        case WaitCode.NO_NODE:
            return not seen.nodes
        case WaitCode.NO_SUCH_PLACE:
            return not asked
        case WaitCode.TOO_LARGE:
            return bool(asked) and not large
        case WaitCode.UNAVAILABLE:
            return bool(large) and not able
        case WaitCode.BLOCKED:
            return bool(project.blocked)
        case WaitCode.RUNNING_LIMIT:
            return project.max_running is not None and cluster.running(project.id, now) >= project.max_running
        case WaitCode.PROJECT_CAP:
            return cluster.rate(project.id, now) + _most(seen, job) > project.cap + EPSILON
        case WaitCode.ORGANIZATION_CAP:
            assert organization is not None
            return cluster.rate(organization.id, now) + _most(seen, job) > organization.cap + EPSILON
        case WaitCode.BUSY:
            return bool(able) and sum(free) < job.gpus
        case WaitCode.FRAGMENTED:
            return sum(free) >= job.gpus and max(free) < job.gpus and numbers["free"] == sum(free)
        case WaitCode.NO_SLOT:
            return any(number >= job.gpus for number in free) and not fits
        case WaitCode.RESERVED:
            return fits or job.shareable
        case WaitCode.BEHIND:
            return not seen_by_pass
        case _:
            return False


def _most(seen: Snapshot, job: JobView) -> float:
    return job.gpus * max((gpu.cost for node in seen.nodes for gpu in node.gpus), default=1.0)
