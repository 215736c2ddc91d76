"""Killing things in the middle of a job. What was checkpointed is never trained again, and one version comes out."""

import os
import signal
import subprocess
import sys
import uuid

import pytest
from redis import Redis
from rq import Queue
from rq.serializers import JSONSerializer
from sqlalchemy import select

from tests.fleet import ROOT, Fleet, fleet
from tests.servers import servers
from tunery import ids, leases, queue
from tunery.contracts.scheduling import Start
from tunery.dispatch import queue_name
from tunery.models import Attempt, Checkpoint, Engine, Gpu, Node, Slot
from tunery.states import AttemptState, FailureCode


@pytest.fixture
def running():
    with fleet() as started:
        started.scheduler()
        yield started


def kill_trainer(running: Fleet, attempt: Attempt) -> None:
    for pid in running.trainer_pids(attempt.id):
        os.kill(pid, signal.SIGKILL)


def kill_supervisor(running: Fleet, attempt: Attempt) -> None:
    os.kill(running.supervisor_pid(attempt.id), signal.SIGKILL)


@pytest.mark.parametrize("victim", [kill_trainer, kill_supervisor])
def test_a_killed_trainer_or_supervisor_costs_only_the_steps_since_the_checkpoint(running, victim):
    running.node()
    job_id = running.submit("slow", steps=30)
    running.until(lambda: running.newest_checkpoint(job_id) >= 10 and running.step(job_id) > 12)
    (attempt,) = running.attempts(job_id)
    victim(running, attempt)
    assert running.ends(job_id) == "succeeded"
    assert_resumed_exactly(running, job_id)


def test_a_job_does_not_notice_that_its_node_process_dies(running):
    node = running.node()
    job_id = running.submit("slow", steps=40)
    running.until(lambda: running.step(job_id) > 3)
    node.kill()
    node.wait()
    before = running.step(job_id)
    running.until(lambda: running.step(job_id) > before + 5)
    running.node()
    assert running.ends(job_id) == "succeeded"
    assert [attempt.state for attempt in running.attempts(job_id)] == ["succeeded"]
    running.until(running.nothing_held, 10)
    running.until(running.nothing_left, 10)


def test_a_job_is_lost_and_goes_on_when_its_whole_node_falls_silent(running):
    node = running.node("a")
    job_id = running.submit("slow", steps=40)
    running.until(lambda: running.newest_checkpoint(job_id) >= 10)
    (attempt,) = running.attempts(job_id)
    node.kill()
    os.kill(running.supervisor_pid(attempt.id, "a"), signal.SIGKILL)
    running.node("b")
    assert running.ends(job_id) == "succeeded"
    first, second = running.attempts(job_id)
    assert (first.state, first.failure_code) == ("lost", "worker_lost")
    assert second.node_id != first.node_id
    assert_versions_and_steps(running, job_id)


def test_a_poke_right_after_the_claim_does_not_end_the_supervisor(running):
    running.node()
    job_id = running.submit("ok", steps=3)
    claimed = select(Attempt.id).where(Attempt.job_id == job_id, Attempt.state == "claimed")

    def look():
        with running.look() as session:
            return session.scalar(claimed)

    os.kill(running.supervisor_pid(running.until(look)), signal.SIGUSR1)
    assert running.ends(job_id) == "succeeded"
    assert len(running.attempts(job_id)) == 1


def test_a_checkpoint_whose_object_is_gone_gives_way_to_an_older_one(running):
    node = running.node()
    job_id = running.submit("slow", steps=40)
    running.until(lambda: running.newest_checkpoint(job_id) >= 20)
    node.kill()
    node.wait()
    (attempt,) = running.attempts(job_id)
    os.kill(running.supervisor_pid(attempt.id), signal.SIGKILL)
    newest = running.newest_checkpoint(job_id)
    with running.look() as session:
        lost = select(Checkpoint).where(Checkpoint.job_id == job_id, Checkpoint.step == newest)
        prefix = session.scalars(lost).one().object_prefix
    for key in list(running.storage.keys(f"{prefix}/")):
        running.storage.delete(key)
    orphan = running.home / "node" / "attempts" / str(uuid.uuid4())
    (orphan / "checkpoints").mkdir(parents=True)
    running.node()
    assert running.ends(job_id) == "succeeded"
    made = running.attempts(job_id)
    assert [one.failure_code for one in made] == ["worker_lost", "corrupt_checkpoint", None]
    assert made[2].start_step == newest - 10
    assert not orphan.exists()


def test_a_suspended_supervisor_is_fenced_and_its_trainer_is_gone(running):
    running.node()
    job_id = running.submit("slow", steps=60)
    running.until(lambda: running.newest_checkpoint(job_id) >= 10)
    (attempt,) = running.attempts(job_id)
    supervisor = running.supervisor_pid(attempt.id)
    os.kill(supervisor, signal.SIGSTOP)
    running.until(lambda: running.attempts(job_id)[0].state == "lost", 20)
    os.kill(supervisor, signal.SIGCONT)
    running.until(lambda: not running.trainer_pids(attempt.id), 20)
    assert running.ends(job_id) == "succeeded"
    assert_resumed_exactly(running, job_id)


def test_a_killed_scheduler_is_replaced_within_its_lease(running):
    running.node()
    job_id = running.submit("slow", steps=30)
    running.until(lambda: running.step(job_id) > 3)
    running.processes[0].kill()
    running.scheduler()
    later = running.submit("ok", steps=2)
    assert running.ends(job_id) == "succeeded"
    assert running.ends(later) == "succeeded"


def test_jobs_start_and_finish_while_redis_has_forgotten_everything(running):
    running.node()
    redis = Redis.from_url(servers().redis_url)
    job_id = running.submit("slow", steps=15)
    redis.flushall()
    running.until(lambda: running.step(job_id) > 2)
    redis.flushall()
    assert running.ends(job_id) == "succeeded"
    assert len(running.attempts(job_id)) == 1


def test_two_supervisors_of_one_attempt_run_it_once(running):
    running.node()
    job_id = running.submit("slow", steps=20)
    attempt = running.until(lambda: running.attempts(job_id))[0]
    environment = dict(os.environ) | {"TUNERY_NODE_ID": str(attempt.node_id)} | _node_environment(running)
    other = subprocess.run(
        [sys.executable, "-m", "worker.supervisor", str(attempt.id)], env=environment, cwd=ROOT, timeout=60
    )
    assert other.returncode == 0
    assert running.ends(job_id) == "succeeded"
    assert [(attempt.no, attempt.state) for attempt in running.attempts(job_id)] == [(1, "succeeded")]
    assert len(running.versions(job_id)) == 1


def test_a_hostile_message_is_thrown_away_and_the_doorbell_still_rings(running, tmp_path):
    running.node()
    job_id = running.submit("ok", steps=1)
    running.ends(job_id)
    node_id = running.attempts(job_id)[0].node_id
    redis, proof = Redis.from_url(servers().redis_url), tmp_path / "proof"
    hostile = Queue(queue_name(node_id), connection=redis, serializer=JSONSerializer)
    hostile.enqueue("os.system", f"touch {proof}")
    hostile.enqueue("worker.ring.ring", "x", on_success="os.getcwd")
    garbage = f"rq:job:{uuid.uuid4()}"
    redis.hset(garbage, mapping={"data": b"\x80garbage", "created_at": "2026-01-01T00:00:00Z"})
    redis.rpush(hostile.key, garbage.removeprefix("rq:job:"))
    later = running.submit("ok", steps=1)
    assert running.ends(later) == "succeeded"
    running.until(lambda: hostile.count == 0, 10)
    assert not proof.exists()
    assert "refused a message" in (running.home / "worker.log").read_text()


def test_an_engine_holds_attempts_of_two_projects_and_one_of_them_can_be_fenced_alone(running):
    """The seam takes an engine: three attempts, one connection each; one finishes, one is fenced, then it dies."""
    running.node()
    other = running.project("second")
    engine_id, process = _start_engine(running)
    quick = running.submit("ok", steps=5)
    fenced, survivor = (running.submit("slow", steps=60, project_id=project) for project in (running.project_id, other))
    running.processes[0].send_signal(signal.SIGSTOP)  # this test places jobs itself
    for job_id in (quick, fenced, survivor):
        _place_in_engine(running, engine_id, job_id)
    assert running.ends(quick) == "succeeded"
    running.until(lambda: min(running.newest_checkpoint(fenced), running.newest_checkpoint(survivor)) >= 10)

    (victim,) = running.attempts(fenced)
    with running.look() as session:
        held = leases.hold(session, victim.id, victim.fence)
        leases.fail(session, held, FailureCode.WORKER_LOST, "fenced by the test", state=AttemptState.LOST)
    engine_says = running.home / "engine.log"
    running.until(lambda: f"detach {_wire(victim)}" in engine_says.read_text(), 10)
    assert process.poll() is None, "an engine is never killed with one of its attempts"
    at = running.step(survivor)
    running.until(lambda: running.step(survivor) > at + 3)

    process.kill()
    running.processes[0].send_signal(signal.SIGCONT)  # from here on, the scheduler places them: dedicated, elsewhere
    assert running.ends(survivor) == "succeeded"
    assert running.ends(fenced) == "succeeded"
    first, *_, last = running.attempts(survivor)
    assert (first.failure_code, first.engine_id, last.engine_id) == ("engine_lost", engine_id, None)
    for job_id in (fenced, survivor):
        assert_versions_and_steps(running, job_id)


def assert_resumed_exactly(running: Fleet, job_id: uuid.UUID) -> None:
    assert_versions_and_steps(running, job_id)
    running.until(running.nothing_held, 10)
    running.until(running.nothing_left, 10)


def assert_versions_and_steps(running: Fleet, job_id: uuid.UUID) -> None:
    """One version; fences rise; each attempt begins right behind the newest checkpoint of the ones before."""
    assert len(running.versions(job_id)) == 1
    made = running.attempts(job_id)
    assert len(made) >= 2
    assert [attempt.fence for attempt in made] == sorted({attempt.fence for attempt in made})
    steps = dict(running.steps_trained(job_id))
    for attempt in made[1:]:
        assert attempt.start_step >= 10
        assert steps[attempt.no][0] == attempt.start_step + 1


def _start_engine(running: Fleet) -> tuple[uuid.UUID, subprocess.Popen[bytes]]:
    path = running.home / "engine.sock"
    with (running.home / "engine.log").open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.fake_trainer", "--engine", str(path)], cwd=ROOT, stdout=out, stderr=out
        )
    running.processes.append(process)
    running.until(path.exists)
    node_id = running.until(lambda: _node_id(running))
    with running.look() as session:
        engine = Engine(organization_id=running.organization_id, node_id=node_id, base_model_id=running.base_id)
        engine.precision, engine.socket, engine.state = "bf16", str(path), "up"
        session.add(engine)
        session.flush()
        for no in range(1, 4):
            session.add(Slot(node_id=node_id, no=no))
        return engine.id, process


def _node_id(running: Fleet) -> uuid.UUID | None:
    with running.look() as session:
        return session.scalar(select(Node.id))


def _place_in_engine(running: Fleet, engine_id: uuid.UUID, job_id: uuid.UUID) -> None:
    """What the scheduler will do once it knows engines: the same decision, carried out by the same function."""
    running.until(lambda: running.state(job_id) == "queued")
    with running.look() as session:
        gpu = session.scalars(select(Gpu)).one()
        start = Start(job_id, gpu.node_id, (gpu.id,), bytes_per_gpu=1 << 20, exclusive=False, engine_id=engine_id)
        assert queue.assign(session, start) is not None


def _wire(attempt: Attempt) -> str:
    return ids.encode(ids.ATTEMPT, attempt.id)


def _node_environment(running: Fleet) -> dict[str, str]:
    return {
        "TUNERY_DATABASE_URL": running.url("tunery_worker"),
        "TUNERY_REDIS_URL": servers().redis_url,
        "TUNERY_HOME": str(running.home / "node"),
        "TUNERY_TRAINER_MODULE": "tests.fake_trainer",
        "TUNERY_MODEL_STORE": str(running.home / "models"),
    } | servers().s3_node.environment()


def test_a_job_out_of_memory_gets_one_more_try_with_more(running):
    """F20."""
    running.node()
    job = running.submit("out-of-memory", steps=5)
    assert running.ends(job) == "failed"
    first, second = running.attempts(job)
    assert first.failure_code == second.failure_code == "out_of_memory"
    assert any("ran out of memory" in told and "are reserved" in told for told in running.messages(job))
    assert running.until(running.nothing_held)
