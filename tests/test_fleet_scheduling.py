"""Pre-emption and time limits end to end: real scheduler, nodes and supervisors, a trainer that needs no torch."""

import uuid

import pytest
from sqlalchemy import text

from tests.fleet import Fleet, fleet
from tunery import queue
from tunery.contracts.scheduling import Hold, HoldKind, Plan, Preempt, PreemptKind
from tunery.db import make_engine, make_sessions, transaction
from tunery.models import Attempt, Job, Leader


@pytest.fixture(scope="module")
def running():
    with fleet() as started:
        started.scheduler()
        started.node(STOP_GRACE_S="240")  # what counts is the scheduler's deadline
        yield started


def preempt(running: Fleet, victim: uuid.UUID, beneficiary: uuid.UUID) -> None:
    """What a pass decides when a share is owed, carried out by the same functions as the leader's own decision."""
    sessions = make_sessions(make_engine(running.url("tunery_scheduler")))
    with running.look() as session:
        epoch = session.get_one(Leader, 1).epoch
    attempt = running.attempts(victim)[-1]
    with transaction(sessions) as session:
        world = queue.snapshot(session, 60)
        gpu_ids = next(view.gpu_ids for view in world.running if view.attempt_id == attempt.id)
        hold = Hold(beneficiary, HoldKind.PREEMPTION, "cpu", attempt.node_id, gpu_ids, world.now + 60)
    plan = Plan(preempts=(Preempt(attempt.id, victim, beneficiary, PreemptKind.FAIR_SHARE),), holds=(hold,))
    with transaction(sessions) as session:
        assert queue.record(session, epoch, plan, queue.Mirror(), grace_s=30) == [attempt.id]


def change(running: Fleet, statement: str, **values: object) -> None:
    with running.look() as session:
        session.execute(text(statement), values)


def test_a_preempted_job_makes_room_and_goes_on_at_its_step(running: Fleet) -> None:
    victim = running.submit("slow", steps=60)
    running.until(lambda: running.step(victim) >= 12)
    beneficiary = running.submit("ok", steps=5)
    running.until(lambda: running.state(beneficiary) == "queued")
    # whichever of its rules the policy looks at, the beneficiary comes first
    change(running, "UPDATE jobs SET urgent = true WHERE id = :id", id=beneficiary)
    preempt(running, victim, beneficiary)
    assert running.ends(beneficiary) == "succeeded"
    assert running.ends(victim) == "succeeded"
    first, second = running.attempts(victim)
    assert (first.state, first.stop_reason, first.preempted_for) == ("preempted", "preempt", beneficiary)
    assert second.start_step >= 12
    (other,) = running.attempts(beneficiary)
    assert first.ended_at is not None and other.ended_at is not None
    assert first.ended_at <= other.claimed_at <= other.ended_at <= second.claimed_at  # type: ignore[operator]
    trained = [step for _, steps in running.steps_trained(victim) for step in steps]
    assert trained == list(range(1, 61)), "every step once: nothing was lost, nothing done twice"
    told = next(message for message in running.messages(victim) if "stopped for a job" in message)
    assert f"resumes from its checkpoint at step {second.start_step}" in told


def test_a_default_limit_doubles_and_the_job_ends_well(running: Fleet) -> None:
    job_id = running.submit("slow", steps=40)
    running.until(lambda: running.step(job_id) >= 5)
    change(running, "UPDATE jobs SET limit_s = 60, time_limit_s = NULL WHERE id = :id", id=job_id)
    change(running, "UPDATE attempts SET limit_s = 0.1 WHERE job_id = :id", id=job_id)
    running.until(lambda: running.attempts(job_id)[0].state == "preempted")
    assert running.ends(job_id) == "succeeded"
    with running.look() as session:
        assert session.get_one(Job, job_id).limit_s == 120
    first, second = running.attempts(job_id)
    assert first.stop_reason == "time_limit" and second.start_step >= 5


def test_a_limit_of_the_users_own_ends_the_job_with_a_checkpoint(running: Fleet) -> None:
    job_id = running.submit("slow", steps=600)
    running.until(lambda: running.step(job_id) >= 5)
    change(running, "UPDATE jobs SET limit_s = 60, time_limit_s = 60 WHERE id = :id", id=job_id)
    change(running, "UPDATE attempts SET limit_s = 0.1 WHERE job_id = :id", id=job_id)
    assert running.ends(job_id) == "failed"
    with running.look() as session:
        job = session.get_one(Job, job_id)
        assert (job.error_code, job.trained_tokens) == ("time_limit", None)
        assert session.get_one(Attempt, running.attempts(job_id)[0].id).fault == "user"
    assert running.newest_checkpoint(job_id) >= 5
    running.until(running.nothing_held)


def test_a_deaf_trainer_is_killed_when_its_time_to_stop_is_over(running: Fleet) -> None:
    """By the scheduler's deadline; the node's own would come too late for this test."""
    victim = running.submit("deaf", steps=600)
    running.until(lambda: running.step(victim) >= 2)
    attempt = running.attempts(victim)[-1]
    statement = "UPDATE attempts SET stop_reason = 'preempt', stop_by = now() + interval '1 second' WHERE id = :id"
    change(running, statement, id=attempt.id)
    running.until(lambda: running.attempts(victim)[0].state == "preempted")
    with running.look() as session:
        query = text("SELECT extract(epoch FROM ended_at - stop_by) FROM attempts WHERE id = :id")
        late = session.scalar(query, {"id": attempt.id})
    assert late is not None and late >= 0
