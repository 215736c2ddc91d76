"""What devices do while a job trains: read from the kernel, kept with the job under its fence, told once an episode."""

import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import pynvml
import pytest
from sqlalchemy import text

from tests import factories
from tests.factories import FleetNode, Tenant, Work
from tests.fleet import fleet
from tunery import leases, samples
from tunery.contracts.events import Phase
from tunery.samples import Sample
from tunery.states import StopReason
from worker import inventory, processes, sampling
from worker.sampling import Reading, Sampler

LIMITS = {"below": 0.3, "after_s": 60.0}


def sampler(source: Any = None, sessions: Any = None, sample_s: float = 10.0) -> Sampler:
    """Of one GPU, by itself."""
    work: Any = SimpleNamespace(devices=(("cuda", "GPU-1"),), attempt_id=uuid.uuid4(), fence=1)
    given: Any = SimpleNamespace(sample_s=sample_s, underused_below=0.3, underused_after_s=60.0)
    return Sampler(work, sessions, given, source)


def test_an_episode_lasts_until_a_reading_that_is_not_below_the_threshold() -> None:
    one = sampler()
    assert one.judge(Reading(0.0, 1), 100).low_s == 0  # it still loads
    one.hear(factories.metrics(seq=1, step=1))
    lows = [one.judge(Reading(share, 1), at) for at, share in ((110, 0.2), (120, 0.0), (130, 0.1))]
    assert [low.low_s for low in lows] == [10, 20, 30]
    assert lows[-1].low_mean == pytest.approx(0.1) and lows[-1].device == "GPU"
    assert one.judge(Reading(0.3, 1), 140).low_s == 0
    assert one.judge(Reading(0.29, 1), 150).low_s == 10


# ---- what is kept ---------------------------------------------------------------------------------------------------


def store(work: Work, *told: Sample, **limits: float) -> Any:
    for one in told:
        with work.node.transaction() as session:
            samples.store(session, work.attempt_id, work.fence, one, **(LIMITS | limits))
    return factories.look(work).progress


def alerts(work: Work) -> list[Any]:
    with factories.owner(work.node.database) as session:
        query = "SELECT level, message, data FROM events WHERE job_id = :id AND data->>'kind' = :kind ORDER BY seq"
        return list(session.execute(text(query), {"id": work.job_id, "kind": samples.UNDERUSED}))


def test_the_newest_sample_stands_on_the_job_and_all_in_its_series(
    client: httpx.Client, project: Tenant, node: FleetNode, base_model: str
) -> None:
    work = factories.running(project, node)
    for step, share in ((3, 0.5), (4, 0.75)):
        factories.tell(work, factories.metrics(seq=step + 10, step=step))
        seen = store(work, Sample(share, 7_000))
    assert (seen["gpu_utilization"], seen["device_memory_bytes"], seen["underused_since"]) == (0.75, 7_000, None)
    shown = client.get(f"/v1/fine_tuning/jobs/{work.id}").json()["tunery"]["progress"]
    assert (shown["gpu_utilization"], shown["device_memory_bytes"]) == (0.75, 7_000)
    assert shown["sampled_at"] == int(seen["sampled_at"]) and shown["gpu_memory_bytes"] is None
    with factories.owner(work.node.database) as session:
        query = (
            "SELECT c.steps, c.vals FROM metric_chunks c JOIN metric_series m ON m.id = c.series_id "
            "WHERE m.job_id = :id AND m.name = 'system/gpu_utilization' ORDER BY c.first_step"
        )
        rows = session.execute(text(query), {"id": work.job_id}).all()
    assert [(row.steps, row.vals) for row in rows] == [([3], [0.5]), ([4], [0.75])]


def test_an_alert_is_told_once_an_episode(project: Tenant, node: FleetNode, base_model: str) -> None:
    work = factories.running(project, node)
    low = [Sample(0.1, 1, at, 0.12, "GPU") for at in (20.0, 40.0)]
    assert store(work, *low)["underused_since"] is None and alerts(work) == []
    late = Sample(0.1, 1, 60.0, 0.12, "GPU")
    assert store(work, late, late)["underused_since"] is not None  # a lost reply, and the same again
    store(work, Sample(0.2, 1, 80.0, 0.14, "GPU"))
    (alert,) = alerts(work)
    assert alert.level == "warn"
    assert alert.data == {"kind": "gpu_underused", "utilization": 0.12, "below": 0.3, "for_s": 60}
    assert alert.message.startswith("The GPU was 12 % busy in the last 1 min, less than the 30 %")
    assert store(work, Sample(0.9, 1))["underused_since"] is None
    store(work, Sample(0.1, 1, 70.0, 0.1, "GPU"))
    assert len(alerts(work)) == 2


def test_only_what_runs_is_underused(client: httpx.Client, project: Tenant, node: FleetNode, base_model: str) -> None:
    work = factories.running(project, node)
    store(work, Sample(0.1, 1, 60.0, 0.1))

    def shown() -> Any:
        return client.get(f"/v1/fine_tuning/jobs/{work.id}").json()["tunery"]["progress"]["underused_since"]

    assert shown() is not None
    factories.stop(work, StopReason.PREEMPT)
    assert shown() is None


def test_a_new_attempt_begins_a_new_episode(project: Tenant, node: FleetNode, base_model: str) -> None:
    work = factories.running(project, node)
    store(work, Sample(0.1, 1, 60.0, 0.1))
    factories.stop(work, StopReason.PREEMPT)
    again = factories.tell(factories.claim(factories.assign(work, node)), factories.started())
    assert store(again, Sample(0.1, 1, 15.0, 0.1))["underused_since"] is None
    store(again, Sample(0.1, 1, 60.0, 0.1))
    factories.tell(again, factories.started(seq=2))  # stored late, as while the database is slow
    store(again, Sample(0.1, 1, 75.0, 0.1))
    assert len(alerts(again)) == 2


def test_who_was_replaced_stores_nothing(project: Tenant, node: FleetNode, base_model: str) -> None:
    work = factories.running(project, node)
    factories.stop(work, StopReason.PREEMPT)
    with pytest.raises(leases.Fenced):
        store(work, Sample(0.1, 1, 90.0, 0.1))
    assert alerts(work) == [] and "sampled_at" not in factories.look(work).progress


def test_epochs_are_timed_by_their_training_alone(project: Tenant, node: FleetNode, base_model: str) -> None:
    """Evaluation and the time between two attempts are none of it; steps that are done twice took their time twice."""

    def step(seq: int, number: int, at: float) -> Any:
        values = {"train/loss": 1.0, "train/epoch": number / 4}
        more = {"time": at, "values": values, "total_steps": 8}
        return factories.metrics(seq=seq, step=number).model_copy(update=more)

    def phase(seq: int, name: str, at: float) -> Phase:
        return Phase(seq=seq, time=at, phase=name)

    work = factories.running(project, node)
    factories.tell(
        work, phase(2, "training", 100), step(3, 1, 102), step(4, 4, 110), phase(5, "evaluating", 111), step(6, 5, 113)
    )
    assert factories.look(work).progress["epoch_seconds"] == [10]
    factories.stop(work, StopReason.PREEMPT)
    again = factories.tell(factories.claim(factories.assign(work, node)), factories.started())
    factories.tell(again, phase(2, "training", 500), step(3, 5, 503), step(4, 8, 509))
    assert factories.look(again).progress["epoch_seconds"] == [10, 10]


# ---- what is read ---------------------------------------------------------------------------------------------------

SPIN = """
import os, sys, time
if os.fork() == 0:
    while time.process_time() < 0.3: pass
    os._exit(0)
os.wait()
while time.process_time() < 0.3: pass
print("done", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def spun() -> Iterator[str]:
    """The mark of a process and its child that were busy for 0.3 s each; the child is gone."""
    mark = str(uuid.uuid4())
    command = [sys.executable, "-c", SPIN]
    with subprocess.Popen(
        command, env=os.environ | {processes.ATTEMPT: mark}, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None and child.stdout.readline() == b"done\n"
        yield mark
        child.kill()


def test_a_cpu_is_read_off_the_kernel(spun: str) -> None:
    times = iter((1000.0, 1002.0, 1004.0))
    source = sampling.Cpu(spun, cores=1, clock=lambda: next(times))
    seen, after = source.take(), source.take()
    assert seen is not None and after is not None
    assert seen.utilization == pytest.approx(0.3, abs=0.2) and seen.utilization >= 0.28
    assert seen.memory_bytes > 1_000_000
    assert after.utilization == 0
    assert sampling.Cpu(str(uuid.uuid4()), cores=1).take() is None


class Failing:
    """A source whose looks fail from the second on, so many times."""

    def __init__(self, times: int) -> None:
        self.looks, self.taken, self._times = 0, threading.Semaphore(0), times

    def look(self) -> None:
        self.looks += 1
        if 1 < self.looks <= self._times + 1:
            raise OSError("the GPU is lost")

    def take(self) -> Reading:
        self.taken.release()
        return Reading(0.5, 1)


def nobody() -> Any:
    raise OSError("no database here")


def test_a_failed_look_is_a_missing_one() -> None:
    source = Failing(times=3)
    one = sampler(source, nobody, sample_s=0.01)
    one.start()
    for _ in range(20):
        assert source.taken.acquire(timeout=60)
    one.finish()
    assert source.looks >= 19


def test_a_driver_that_fails_on_and_on_is_asked_no_more() -> None:
    source = Failing(times=1_000_000)
    one = sampler(source, nobody, sample_s=0.01)
    one.start()
    one._thread.join(60)
    assert not one._thread.is_alive()
    assert source.looks == 1 + sampling._MOST_FAILED_LOOKS


def test_nobody_waits_for_a_sample_that_hangs() -> None:
    hangs, over = threading.Event(), threading.Event()

    def database() -> Any:
        hangs.set()
        over.wait(60)
        raise OSError("gone")

    one = sampler(Failing(times=0), database, sample_s=0.01)
    one.start()
    assert hangs.wait(60)
    began = time.monotonic()
    one.finish()
    assert time.monotonic() - began < 4  # it was five seconds
    over.set()


def test_the_driver_is_opened_where_it_may_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the thread that looks, once: whoever builds the sampler has no keeper yet."""
    opened: list[int] = []
    monkeypatch.setattr(inventory, "keep_driver_open", lambda: opened.append(threading.get_ident()))
    monkeypatch.setattr(inventory, "readings", lambda _: [])
    work: Any = SimpleNamespace(devices=(("cuda", "GPU-1"),), engine_socket=None)
    source: Any = sampling.source_of(work, None)  # pyright: ignore[reportArgumentType]
    assert opened == []
    looker = threading.Thread(target=lambda: (source.look(), source.look()))
    looker.start()
    looker.join(60)
    assert opened == [looker.ident]


def test_a_lost_gpu_is_not_its_neighbours_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver of two GPUs, of which the first does not answer any more."""

    def by_uuid(uuid: str) -> str:
        if uuid != "GPU-2":
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
        return uuid

    def lost(_index: int) -> str:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)

    driver: dict[str, Any] = {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetCount": lambda: 2,
        "nvmlDeviceGetHandleByIndex": lost,
        "nvmlDeviceGetHandleByUUID": by_uuid,
        "nvmlDeviceGetIndex": lambda _: 1,
        "nvmlDeviceGetUUID": lambda handle: handle,
        "nvmlDeviceGetName": lambda _: "H100",
        "nvmlDeviceGetMemoryInfo": lambda _: SimpleNamespace(used=7, total=80),
        "nvmlDeviceGetUtilizationRates": lambda _: SimpleNamespace(gpu=50),
    }
    for name, answer in driver.items():
        monkeypatch.setattr(pynvml, name, answer)
    assert inventory.readings(["GPU-2"]) == [inventory.Reading(1, "GPU-2", "H100", 7, 80, 0.5)]
    with pytest.raises(pynvml.NVMLError):
        inventory.readings(["GPU-1"])


def test_a_job_whose_device_does_little_says_so_end_to_end() -> None:
    """The fake trainer sleeps between its steps."""
    with fleet() as running:
        running.scheduler()
        running.node(SAMPLE_S="0.2", UNDERUSED_BELOW="0.9", UNDERUSED_AFTER_S="0.5")
        job_id = running.submit("slow", steps=60)
        told = running.until(lambda: [line for line in running.messages(job_id) if "busy in the last" in line], 60)
        assert told[0].startswith("The CPU was ")
        assert running.ends(job_id) == "succeeded"
        assert len([line for line in running.messages(job_id) if "busy in the last" in line]) == 1
        with running.look() as session:
            row = session.execute(text("SELECT progress FROM jobs WHERE id = :id"), {"id": job_id}).scalar_one()
        assert 0 <= row["gpu_utilization"] < 0.9 and row["device_memory_bytes"] > 1_000_000
        assert row["sampled_at"] > 0 and row["underused_since"] is not None
