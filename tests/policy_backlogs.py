"""Laws of longer runs: shares of a backlog, what a guarantee is worth, and what more GPUs or weight bring."""

import uuid
from collections import defaultdict
from dataclasses import dataclass, replace
from itertools import permutations

from hypothesis import strategies as st

from scheduler.policy import schedule
from scheduler.simulation import Policy, Simulation, Work
from tests.policy_cluster import EPSILON
from tests.policy_invariants import claim
from tests.policy_worlds import GIB
from tunery.contracts.scheduling import GpuView, JobView, NodeView, Plan, PolicySettings, Snapshot, Tenant

LONGEST_S = 100.0
UNTIL_S = 900.0


@dataclass(frozen=True, slots=True)
class Backlog:
    """Projects that always have 1-GPU jobs waiting. `apart`: each in an organization of its own."""

    gpus: int
    weights: tuple[float, ...]
    tau_s: float
    durations: tuple[int, ...]
    apart: bool

    def run(self, policy: Policy = schedule, check: bool = False) -> Simulation:
        projects = tuple(
            Tenant(uuid.UUID(int=100 + n), uuid.UUID(int=1 + n * self.apart), weight)
            for n, weight in enumerate(self.weights)
        )
        organizations = {one.organization_id: Tenant(one.organization_id, one.organization_id) for one in projects}
        if self.apart:
            organizations = {one.organization_id: replace(one, id=one.organization_id) for one in projects}
        settings = PolicySettings(tau_s=self.tau_s, preemption=False, grace_s=0, depth=4)
        start = Snapshot(
            (), _cluster(self.gpus), projects=projects, organizations=tuple(organizations.values()), settings=settings
        )
        sim = Simulation(start, {}, policy=policy, watch=self._check if check else None)
        for n, project in enumerate(projects):
            for k in range(8 * self.gpus):
                job_id = uuid.UUID(int=1000 * (n + 1) + k)
                job = JobView(job_id, project.organization_id, project.id, 0.0, 1, GIB, limit_s=LONGEST_S)
                sim.arrive(job, Work(self.durations[(k * len(self.weights) + n) % len(self.durations)]))
        sim.run(UNTIL_S)
        return sim

    def backlogged_at(self, sim: Simulation) -> bool:
        return len({job.project_id for job in sim.waiting.values()}) == len(self.weights)

    def slack(self) -> float:
        """By which the first project's service may differ from its share, given I6 for every pair."""
        mine, total = self.weights[0], sum(self.weights)
        return (LONGEST_S + self.tau_s) * sum(1 + other / mine for other in self.weights[1:]) * mine / total

    def _check(self, sim: Simulation, seen: Snapshot, plan: Plan) -> None:
        """I6: nobody is further from anybody than a job and the look-ahead make inevitable."""
        if not self.backlogged_at(sim):
            return
        for one, other in permutations(seen.projects, 2):
            error = sim.service(one.id) / one.weight - sim.service(other.id) / other.weight
            most = (LONGEST_S + self.tau_s) * (1 / one.weight + 1 / other.weight)
            claim("I6", error <= most + EPSILON, "share", one, other, error, most)


@st.composite
def backlogs(draw: st.DrawFn) -> Backlog:
    return Backlog(
        draw(st.integers(1, 4)),
        tuple(draw(st.lists(st.sampled_from([1.0, 2.0, 3.0, 5.0]), min_size=2, max_size=4))),
        draw(st.sampled_from([30.0, 120.0, 600.0])),
        tuple(draw(st.lists(st.integers(50, 100), min_size=3, max_size=12))),
        draw(st.booleans()),
    )


def more_never_hurts(backlog: Backlog, policy: Policy = schedule) -> None:
    """I11: one GPU more does no less work by any time; more weight takes no service away, up to the bound of I6."""
    before = backlog.run(policy)
    wider = replace(backlog, gpus=backlog.gpus + 1).run(policy)
    claim("I11", _work(wider) >= _work(before) - EPSILON, "a GPU more", _work(wider), _work(before))
    heavier = replace(backlog, weights=(2 * backlog.weights[0], *backlog.weights[1:]))
    after = heavier.run(policy)
    if backlog.backlogged_at(before) and heavier.backlogged_at(after):
        first = uuid.UUID(int=100)
        slack = backlog.slack() + heavier.slack()
        served = after.service(first), before.service(first)
        claim("I11", served[0] >= served[1] - slack - EPSILON, "weight", served, slack)


def _work(sim: Simulation) -> float:
    live = sum(sim.now - one.view.started_at for one in sim.live.values())
    return live + sum(fate.used for fate in sim.fates.values())


def _cluster(gpus: int) -> tuple[NodeView, ...]:
    node_id = uuid.UUID(int=50)
    devices = tuple(
        GpuView(uuid.UUID(int=60 + n), node_id, "GPU", "cuda", 80 * GIB, 80 * GIB, "any") for n in range(gpus)
    )
    return (NodeView(node_id, "node", gpus, devices),)


# ---- guarantees ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Claim:
    """A project that asks for no more than its guarantee, of a cluster that others fill with long 1-GPU jobs.

    Others' gangs may hold a promise that was made before, and a promise is kept even against a guarantee.
    """

    gpus: int
    asked: tuple[tuple[int, int], ...]
    """When, and how many GPUs."""
    others: tuple[tuple[int, bool], ...]
    """When, and whether it may be moved off."""
    grace_s: float
    short_s: float
    """Limit of those that may not be moved."""

    def check(self, policy: Policy = schedule) -> float:
        """I9: it is served within what cannot be moved, the least run time and the grace. Returns the longest wait."""
        mine, theirs = uuid.UUID(int=100), uuid.UUID(int=101)
        organization = uuid.UUID(int=1)
        settings = PolicySettings(min_runtime_s=30.0, grace_s=self.grace_s)
        guarantee = float(sum(gpus for _, gpus in self.asked))
        tenants = Tenant(mine, organization, guarantee=guarantee, service=1e6), Tenant(theirs, organization)
        start = Snapshot((), _cluster(self.gpus), projects=tenants, settings=settings)
        sim = Simulation(start, {}, policy=policy, tick_s=10.0)
        for n, (at, movable) in enumerate(self.others):
            lasts_s = 5000.0 if movable else self.short_s
            job = JobView(uuid.UUID(int=1000 + n), organization, theirs, float(at), 1, GIB, limit_s=lasts_s)
            sim.arrive(replace(job, preemptible=movable), Work(lasts_s, stop_s=self.grace_s / 2))
        for n, (at, gpus) in enumerate(self.asked):
            job = JobView(uuid.UUID(int=2000 + n), organization, mine, float(at), gpus, GIB, limit_s=9000.0)
            sim.arrive(job, Work(9000.0))
        sim.run(2000.0)
        most = self.short_s + settings.min_runtime_s + 2 * self.grace_s + 20.0
        waits: dict[uuid.UUID, float] = defaultdict(float)
        for fate in sim.fates.values():
            if fate.job.project_id == mine:
                waits[fate.job.id] = (fate.starts[0] if fate.starts else sim.now) - fate.arrived_at
        claim("I9", all(wait <= most for wait in waits.values()), "guarantee", waits, most)
        return max(waits.values())


@st.composite
def claims(draw: st.DrawFn) -> Claim:
    gpus = draw(st.integers(1, 6))
    asked, left = [], draw(st.integers(1, gpus))
    while left and len(asked) < 3:
        size = draw(st.integers(1, left))
        asked.append((draw(st.integers(40, 90)), size))
        left -= size
    others = draw(st.lists(st.tuples(st.integers(0, 60), st.booleans()), min_size=1, max_size=16))
    return Claim(gpus, tuple(asked), tuple(others), draw(st.sampled_from([0.0, 10.0])), 60.0)
