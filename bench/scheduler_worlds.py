"""Clusters and workloads for `bench.scheduler_sim`; every draw comes from a fixed seed."""

import math
import random
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from scheduler.simulation import Simulation, Work
from tunery.contracts.scheduling import GpuView, JobView, NodeView, Plan, PolicySettings, Snapshot, Tenant

ORGANIZATION = uuid.UUID(int=1)
_BYTES = 80 << 30


@dataclass(frozen=True, slots=True)
class Asked:
    """One job of a workload. Seconds; `project` counts from 0."""

    project: int
    gpus: int
    duration_s: float
    limit_s: float
    at: float


@dataclass(frozen=True, slots=True)
class Costs:
    """Of an attempt, beside its training: what a pre-emption makes it pay again."""

    load_s: float = 0.0
    stop_s: float = 0.0
    checkpoint_s: float = math.inf


def project_id(number: int) -> uuid.UUID:
    return uuid.UUID(int=100 + number)


def cluster(nodes: Sequence[int]) -> tuple[NodeView, ...]:
    """Nodes with so many GPUs each, all alike."""
    made = []
    for number, gpus in enumerate(nodes):
        node_id = uuid.UUID(int=10_000 + number)
        ids = [uuid.UUID(int=1_000_000 + 100 * number + gpu) for gpu in range(gpus)]
        devices = tuple(GpuView(one, node_id, "GPU", "cuda", _BYTES, _BYTES, "any") for one in ids)
        made.append(NodeView(node_id, f"node-{number:03}", gpus, devices))
    return tuple(made)


def simulation(
    nodes: Sequence[int],
    weights: Sequence[float],
    asked: Sequence[Asked],
    policy: Callable[[Snapshot], Plan],
    settings: PolicySettings,
    costs: Costs | None = None,
    watch: Callable[[Simulation, Snapshot, Plan], object] | None = None,
) -> Simulation:
    """Nobody may have more than the whole cluster at once. With pre-emption, a pass comes at least every minute."""
    costs, cap = costs or Costs(), float(sum(nodes))
    tenants = tuple(Tenant(project_id(n), ORGANIZATION, weight, cap=cap) for n, weight in enumerate(weights))
    start = Snapshot((), cluster(nodes), projects=tenants, settings=settings)
    tick_s = 60.0 if settings.preemption else math.inf
    made = Simulation(start, {}, policy=policy, watch=watch, tick_s=tick_s)
    for number, one in enumerate(asked):
        job_id, project = uuid.UUID(int=10_000_000 + number), project_id(one.project)
        job = JobView(job_id, ORGANIZATION, project, one.at, one.gpus, _BYTES, limit_s=one.limit_s + costs.load_s)
        made.arrive(job, Work(one.duration_s, costs.load_s, costs.checkpoint_s, costs.stop_s))
    return made


# ---- the five small ones -------------------------------------------------------------------------------------------


def late_comer() -> list[Asked]:
    """A: one GPU; 200 jobs of a minute, and ten seconds later 20 of somebody else."""
    return [Asked(0, 1, 60, 60, 0)] * 200 + [Asked(1, 1, 60, 60, 10)] * 20


def two_at_once() -> list[Asked]:
    """A2: eight GPUs; two idle projects submit 40 jobs of an hour each at the same moment."""
    return [Asked(0, 1, 3600, 3600, 0)] * 40 + [Asked(1, 1, 3600, 3600, 0)] * 40


def gangs_in_a_stream() -> list[Asked]:
    """B: ten 8-GPU jobs against another project's stream of 1-GPU jobs that fills the node for good."""
    draw, asked = random.Random(1), []
    for number in range(3000):
        duration_s = draw.uniform(60, 600)
        asked.append(Asked(0, 1, duration_s, 2 * duration_s, number * 20.0))
    return asked + [Asked(1, 8, 600, 1200, 100.0 + gang * 4000) for gang in range(10)]


def always_backlogged() -> list[Asked]:
    """C: three projects with more 1-GPU jobs of 10 to 100 s than ever run."""
    draw = random.Random(3)
    return [Asked(project, 1, draw.randint(10, 100), 100, 0) for project in range(3) for _ in range(1200)]


def heavy_tails() -> list[Asked]:
    """E: four projects, log-normal durations, 1 to 8 GPUs, limits 1 to 4 times too long."""
    draw, asked, at = random.Random(7), [], 0.0
    for _ in range(1500):
        at += draw.expovariate(1 / 130.0)
        gpus = draw.choices([1, 2, 4, 8], [0.6, 0.2, 0.12, 0.08])[0]
        duration_s = min(20000, draw.lognormvariate(6.6, 1.2))
        project = draw.choices([0, 1, 2, 3], [5, 2, 2, 1])[0]
        asked.append(Asked(project, gpus, duration_s, duration_s * draw.uniform(1, 4), at))
    return asked


# ---- a trace -------------------------------------------------------------------------------------------------------

TRACE_NODES, TRACE_PROJECTS, TRACE_DAYS = 16, 20, 7
_DAY_S = 86400.0


def helios_like(load: float) -> list[Asked]:
    """A week on 16 nodes of 8 GPUs, 20 projects; no job of a real trace is in it, only the shape of one.

    The shape is that of the Helios clusters (Hu et al., SC '21): more than half of the jobs on one GPU; a median of a
    few minutes and a mean many times that; larger jobs last longer, so that an eighth of the jobs takes half of the GPU
    time; days and nights; a few projects that submit most, and sweeps: many alike jobs of one project at once. Limits
    are what people ask for: 1.2 to 5 times what is needed, at least half an hour. `load`: GPU time asked, of all.
    """
    draw = random.Random(20)
    weights = [1 / (rank + 1) for rank in range(TRACE_PROJECTS)]
    room_s, asked_s = load * TRACE_NODES * 8 * TRACE_DAYS * _DAY_S, 0.0
    asked: list[Asked] = []
    while asked_s < room_s:
        at = draw.uniform(0, TRACE_DAYS) * _DAY_S
        if draw.random() > _busy(at):
            continue
        project = draw.choices(range(TRACE_PROJECTS), weights)[0]
        gpus = draw.choices([1, 2, 4, 8], [0.55, 0.15, 0.15, 0.15])[0]
        typical_s = 180.0 * gpus**0.4
        sweep = 1 if draw.random() < 0.8 else min(64, 2 + int(draw.paretovariate(0.9)))
        common = draw.gauss(0, 2.0)
        for _ in range(sweep):
            duration_s = min(2 * _DAY_S, max(10.0, typical_s * math.exp(common + draw.gauss(0, 1.5))))
            limit_s = max(1800.0, duration_s * draw.uniform(1.2, 5))
            asked.append(Asked(project, gpus, duration_s, limit_s, at))
            asked_s += gpus * duration_s
            at += draw.expovariate(1.0)
    return sorted(asked, key=lambda one: one.at)


def _busy(at: float) -> float:
    """Twice as many by day as at night."""
    return 0.675 + 0.325 * math.sin(2 * math.pi * at / _DAY_S)
