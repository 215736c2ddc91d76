"""A GPU that somebody else is on gets no trainer: the attempt goes back uncharged, the GPU comes back when clean."""

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import select

from tests import factories
from tests.factories import Database, FleetNode, Tenant
from tunery import leases, nodes
from tunery.contracts.events import Failed, Finished
from tunery.db import transaction
from tunery.models import Attempt, Gpu, Job, Node, Usage
from tunery.nodes import Assigned
from tunery.states import POLICY, AttemptState, FailureCode, Fault, Policy
from worker import launch_guard
from worker.ending import NoOutcome
from worker.launch_guard import GIB
from worker.launch_guard import Usage as GpuUsage
from worker.node import Node as NodeProcess
from worker.supervisor import Supervisor

CLEAN = GpuUsage(80 * GIB, GIB // 2, ())
CUDA_ERROR = Failed(code=FailureCode.INTERNAL, message="CUDA error: unspecified launch failure")
FINISHED = Finished(path="/x", files=[], tokens=1, metrics={}, peak_memory_bytes=1)


class FakeDriver:
    """NVML's place without a GPU."""

    def __init__(self, **usage: GpuUsage | None) -> None:
        self.usages = {name.replace("_", "-"): one for name, one in usage.items()}

    def usage(self, device: str) -> GpuUsage | None:
        return self.usages[device]

    def ailment(self, device: str) -> str | None:
        return "fell off" if self.usages[device] is None else None


@pytest.fixture(autouse=True)
def _catalogue(base_model: str) -> None:
    """Every job here is on this model."""


@pytest.fixture
def neighbour() -> Iterator[tuple[uuid.UUID, int]]:
    """An attempt of ours that has a process."""
    attempt = uuid.uuid4()
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=-1, env={"TUNERY_ATTEMPT": str(attempt)})
    yield attempt, process.pid
    process.communicate(b"\n")


def test_what_makes_a_gpu_unclean(neighbour: tuple[uuid.UUID, int]) -> None:
    attempt, pid = neighbour
    me, gone = os.getpid(), 1 << 22
    driver = FakeDriver(
        clean=CLEAN,
        foreign=GpuUsage(80 * GIB, 10 * GIB, (me,)),
        vanished=GpuUsage(80 * GIB, 10 * GIB, (gone,)),
        left_over=GpuUsage(80 * GIB, 10 * GIB, ()),
        shared=GpuUsage(80 * GIB, 60 * GIB, (pid,)),
        crowded=GpuUsage(80 * GIB, 60 * GIB, (pid, me)),
        host_pids=GpuUsage(80 * GIB, 60 * GIB, (pid, gone)),
        fallen=None,
    )
    found = launch_guard.look(driver, [("cuda", name) for name in driver.usages], [attempt])
    assert set(found) == {"foreign", "vanished", "left-over", "crowded", "fallen"}
    assert f"process {me} (" in found["foreign"]
    assert "10.0 GiB" in found["left-over"]
    assert launch_guard.look(driver, [("cuda", "shared")]) != {}, "a process of an attempt that holds nothing here"


def test_without_a_gpu_nobody_is_asked() -> None:
    assert launch_guard.look(FakeDriver(), [("cpu", "cpu")]) == {}


def test_the_attempt_goes_back_uncharged_and_the_gpu_waits(
    project: Tenant, node: FleetNode, database: Database
) -> None:
    work = factories.claimed(project, node)
    driver = FakeDriver(GPU_0=GpuUsage(80 * GIB, 10 * GIB, (os.getpid(),)))
    supervisor: Any = Supervisor.__new__(Supervisor)
    supervisor._driver, supervisor._sessions = driver, database.sessions("tunery_worker", node_id=node.id)
    supervisor._settings = SimpleNamespace(outage_grace_s=5)
    supervisor._work = SimpleNamespace(
        attempt_id=work.attempt_id, fence=work.fence, devices=(("cuda", "GPU-0"),), engine_socket=None
    )
    assert supervisor._refused_by_device()
    with factories.owner(database) as session:
        job, attempt = session.get_one(Job, work.job_id), session.get_one(Attempt, work.attempt_id)
        assert (job.state, job.faults_without_progress, attempt.state) == ("queued", 0, "preempted")
        assert "belongs to no attempt" in (attempt.failure_message or "")
        assert session.scalars(select(Usage.id).where(Usage.attempt_id == work.attempt_id)).all() == []
        gpu = session.scalars(select(Gpu).where(Gpu.node_id == node.id)).one()
        assert (gpu.state, gpu.reserved_bytes) == ("dirty", 0)
        assert "belongs to no attempt" in session.get_one(Node, node.id).info["dirty"]["GPU-0"]
    with pytest.raises(leases.Fenced), transaction(supervisor._sessions) as session:
        leases.hold(session, work.attempt_id, work.fence)

    process: Any = NodeProcess.__new__(NodeProcess)
    process._id, process._sessions, process._driver = node.id, supervisor._sessions, driver
    process._look_again([("cuda", "GPU-0")])
    assert state(database, node) == "dirty"
    driver.usages["GPU-0"] = CLEAN
    process._look_again([("cuda", "GPU-0")])
    assert state(database, node) == "healthy"


def state(database: Database, node: FleetNode) -> str:
    with factories.owner(database) as session:
        return session.scalars(select(Gpu.state).where(Gpu.node_id == node.id)).one()


def test_a_gpu_that_falls_off_gets_no_more_work_ends_what_hangs_on_it_and_may_come_back(
    project: Tenant, node: FleetNode, database: Database
) -> None:
    """F22, as the node sees it: a trainer whose GPU is gone may never return from its last call."""
    work = factories.running(project, node)
    driver = FakeDriver(GPU_0=CLEAN)
    process: Any = NodeProcess.__new__(NodeProcess)
    process._id, process._driver = node.id, driver
    process._sessions = database.sessions("tunery_worker", node_id=node.id)

    def look() -> str:
        with transaction(process._sessions) as session:
            gpus = nodes.gpus(session, node.id)
        process._examine(gpus)
        return state(database, node)

    assert look() == "healthy"
    hung = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(600)"], env={"TUNERY_ATTEMPT": str(work.attempt_id)}
    )
    try:
        driver.usages["GPU-0"] = None
        assert (look(), look()) == ("unhealthy", "unhealthy")
        hung.wait(10)
    finally:
        hung.kill()
    with factories.owner(database) as session:
        assert session.get_one(Node, node.id).info["dirty"] == {"GPU-0": "fell off"}
    driver.usages["GPU-0"] = CLEAN
    assert look() == "healthy"


@pytest.mark.parametrize("outcome", [NoOutcome(-9, FailureCode.TRAINER_CRASHED), CUDA_ERROR, FINISHED])
def test_a_gpu_that_fell_off_is_what_ended_the_attempt_and_not_the_user(outcome: Any) -> None:
    """F22, as the supervisor sees it: whatever the trainer says of it, unless it had finished before."""
    supervisor: Any = Supervisor.__new__(Supervisor)
    supervisor._stop, supervisor._work = None, SimpleNamespace(devices=(("cuda", "GPU-0"),))
    supervisor._driver = FakeDriver(GPU_0=CLEAN)
    assert supervisor._blame(outcome) is outcome
    supervisor._driver = FakeDriver(GPU_0=None)
    blamed = supervisor._blame(outcome)
    assert blamed is outcome if outcome is FINISHED else blamed.code == FailureCode.GPU_LOST
    assert POLICY[FailureCode.GPU_LOST] == Policy(Fault.PLATFORM, True, POLICY[FailureCode.GPU_LOST].fix)


def test_what_was_assigned_before_the_disk_was_seen_full_goes_back_uncharged(
    project: Tenant, node: FleetNode, database: Database, tmp_path: Path
) -> None:
    """F18: it would fail here again and again, until its job has no tries left."""
    work = factories.assigned(project, node)
    process: Any = NodeProcess.__new__(NodeProcess)
    process._sessions, process._full = database.sessions("tunery_worker", node_id=node.id), True
    process._supervisors, process._attempts = {}, tmp_path
    process._look_after(Assigned(work.attempt_id, AttemptState.ASSIGNED, None))
    job, attempt = factories.look(work), factories.attempt(work)
    assert (job.state, job.faults_without_progress, attempt.failure_code) == ("queued", 0, "not_claimed")
