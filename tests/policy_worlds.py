"""Worlds for the policy's property tests: clusters, tenants and jobs, and what befalls them."""

import math
import uuid
from collections import Counter
from dataclasses import dataclass

from hypothesis import strategies as st

from scheduler.policy import schedule
from scheduler.simulation import Policy as Policy
from scheduler.simulation import Simulation, Work
from tunery.contracts.scheduling import GpuView, JobView, NodeView, PolicySettings, Snapshot, Tenant

GIB = 1 << 30
SEEN: Counter[str] = Counter()
"""In how many worlds what happened."""


@dataclass(frozen=True, slots=True)
class Planned:
    job: JobView
    work: Work
    cancelled_at: float | None


@dataclass(frozen=True, slots=True)
class World:
    nodes: tuple[NodeView, ...]
    projects: tuple[Tenant, ...]
    organizations: tuple[Tenant, ...]
    jobs: tuple[Planned, ...]
    losses: tuple[tuple[uuid.UUID, float, float], ...]
    settings: PolicySettings

    def simulation(self, policy: Policy = schedule, **more: object) -> Simulation:
        start = Snapshot(
            (), self.nodes, projects=self.projects, organizations=self.organizations, settings=self.settings
        )
        made = Simulation(start, {}, policy=policy, tick_s=20.0, **more)  # type: ignore[arg-type]
        for one in self.jobs:
            made.arrive(one.job, one.work)
            if one.cancelled_at is not None:
                made.cancel(one.job.id, one.cancelled_at)
        for node_id, at, until in self.losses:
            made.lose(node_id, at, until)
        return made

    def could_ever_run(self, job: JobView) -> bool:
        """With the whole cluster empty."""
        tenants = [
            one for one in (*self.projects, *self.organizations) if one.id in (job.project_id, job.organization_id)
        ]
        if any(one.blocked or one.max_running == 0 for one in tenants):
            return False
        for node in self.nodes:
            for name in {gpu.gpu_class for gpu in node.gpus}:
                alike = [gpu for gpu in node.gpus if gpu.gpu_class == name and suits(gpu, job)]
                if len(alike) < job.gpus or not job.labels <= node.labels:
                    continue
                rate = sum(sorted(gpu.cost for gpu in alike)[: job.gpus])
                if job.shareable and job.gpus == 1:
                    rate = min(gpu.cost * job.required_bytes / gpu.usable_bytes for gpu in alike)
                if all(rate <= one.cap + 1e-9 for one in tenants):
                    return True
        return False


def suits(gpu: GpuView, job: JobView) -> bool:
    return gpu.usable_bytes >= job.required_bytes and job.gpu_class in (None, gpu.gpu_class)


def _id(kind: int, number: int) -> uuid.UUID:
    return uuid.UUID(int=(kind << 64) + number + 1)


@st.composite
def worlds(draw: st.DrawFn, least_jobs: int = 1) -> World:
    """One class or two, one organization or two, gangs, shared GPUs, limits of every kind."""
    nodes = tuple(_node(draw, number) for number in range(draw(st.integers(1, 3))))
    organizations = tuple(
        Tenant(_id(2, n), _id(2, n), cap=draw(st.sampled_from([math.inf, math.inf, 4.0])))
        for n in range(draw(st.integers(1, 2)))
    )
    projects = tuple(_project(draw, number, organizations) for number in range(draw(st.integers(1, 4))))
    jobs = tuple(_job(draw, number, projects, nodes) for number in range(draw(st.integers(least_jobs, 24))))
    losses = []
    if draw(st.integers(0, 3)) == 0:
        at = draw(st.integers(1, 300))
        losses.append((draw(st.sampled_from(nodes)).id, float(at), float(at + draw(st.integers(5, 200)))))
    settings = PolicySettings(
        tau_s=draw(st.sampled_from([0.0, 60.0, 600.0])),
        depth=draw(st.sampled_from([2, 100, 100])),
        preemption=draw(st.integers(0, 3)) > 0,
        min_runtime_s=draw(st.sampled_from([0.0, 20.0])),
        grace_s=draw(st.sampled_from([0.0, 5.0, 20.0])),
        sharing=draw(st.integers(0, 3)) > 0,
    )
    return World(nodes, projects, organizations, jobs, tuple(losses), settings)


def _node(draw: st.DrawFn, number: int) -> NodeView:
    own = _id(1, number)
    first = draw(st.sampled_from([(80, "h100", 1.0)] * 3 + [(40, "a100", 0.5)]))
    others = draw(st.sampled_from([first] * 5 + [(80, "h100", 1.0)]))  # devices of two classes in one node are rare
    devices = tuple(
        GpuView(_id(4, 16 * number + n), own, name, "cuda", large * GIB, large * GIB, name, cost)
        for n in range(draw(st.integers(1, 4)))
        for large, name, cost in [others if n >= 2 else first]
    )
    labels = draw(st.sampled_from([frozenset(), frozenset({("rack", "b")})]))
    return NodeView(own, f"node-{number}", draw(st.sampled_from([1, 2, 8, 8, 8])), devices, labels)


def _project(draw: st.DrawFn, number: int, organizations: tuple[Tenant, ...]) -> Tenant:
    guarantee = draw(st.sampled_from([0.0, 1.0, 2.0])) if number else 0.0
    return Tenant(
        _id(3, number),
        draw(st.sampled_from(organizations)).id,
        weight=draw(st.sampled_from([1.0, 1.0, 2.0, 4.0])),
        guarantee=guarantee,
        cap=draw(st.sampled_from([math.inf, math.inf, math.inf, 3.0, 2.0])),
        max_running=draw(st.sampled_from([None, None, None, 2])),
    )


def _job(draw: st.DrawFn, number: int, projects: tuple[Tenant, ...], nodes: tuple[NodeView, ...]) -> Planned:
    project = draw(st.sampled_from((projects[0], *projects)))
    duration_s = float(draw(st.integers(5, 200)))
    spare_s = draw(st.sampled_from([-20, 0, 10, 100]))
    job = JobView(
        _id(5, number),
        project.organization_id,
        project.id,
        float(draw(st.integers(0, 10) if project is projects[0] else st.integers(5, 90))),
        draw(st.sampled_from([1, 1, 1, 1, 2, 2, 3, 4])),
        draw(st.sampled_from([10, 30, 30, 60])) * GIB,
        priority=draw(st.sampled_from([0, 0, 0, 1])),
        urgent=draw(st.integers(0, 15)) == 0,
        limit_s=max(1.0, duration_s + spare_s),
        gpu_class=draw(st.sampled_from([None, None, None, "h100"])),
        labels=frozenset({("rack", "b")}) if draw(st.integers(0, 9)) == 0 else frozenset(),
        shareable=draw(st.integers(0, 2)) == 0,
        preemptible=draw(st.integers(0, 5)) > 0,
    )
    work = Work(
        duration_s,
        load_s=draw(st.sampled_from([0.0, 0.0, 5.0])),
        checkpoint_s=draw(st.sampled_from([math.inf, 15.0])),
        stop_s=draw(st.sampled_from([0.0, 2.0, 40.0])),
    )
    cancelled_at = job.queued_at + draw(st.integers(0, 100)) if draw(st.integers(0, 7)) == 0 else None
    return Planned(job, work, cancelled_at)
