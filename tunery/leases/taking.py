"""By the scheduler and the node: attempts that are to stop, and those whose holder is silent or gone."""

import uuid
from datetime import timedelta

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from tunery import events, outbox
from tunery.events import Entry
from tunery.leases.holding import fail
from tunery.leases.moves import (
    after_stop,
    end_attempt,
    lock,
    ring,
)
from tunery.models import Attempt
from tunery.states import LEASED_ATTEMPT, LIVE_ATTEMPT, AttemptState, FailureCode, Fault, JobState, StopReason


def declare_lost(session: Session, attempt_id: uuid.UUID, grace_s: float) -> bool:
    """The lease ran out `grace_s` ago: the attempt is lost, its job goes on elsewhere. False if that is not so."""
    held = lock(session, attempt_id)
    if held is None or held.attempt.state not in LEASED_ATTEMPT:
        return False
    expired = select(Attempt.lease_expires_at < func.now() - timedelta(seconds=grace_s)).where(Attempt.id == attempt_id)
    if not session.scalar(expired):
        return False
    message = "The worker stopped renewing its lease."
    fail(session, held, FailureCode.WORKER_LOST, message, state=AttemptState.LOST, still_holds_gpu=True)
    return True


def unassign(session: Session, attempt_id: uuid.UUID, why: str = "The assigned node did not answer") -> bool:
    """Nobody claimed the attempt, so nothing runs for it: free what it holds. No fault of the job."""
    held = lock(session, attempt_id)
    if held is None or held.attempt.state != AttemptState.ASSIGNED:
        return False
    held.attempt.failure_code, held.attempt.fault = FailureCode.NOT_CLAIMED, Fault.PLATFORM
    end_attempt(session, held.attempt, AttemptState.LOST)
    events.append(session, held.job, [Entry(f"{why}; the job is assigned again", "warn")])
    return True


def evict(session: Session, attempt_id: uuid.UUID, grace_s: float, why: str) -> bool:
    """Have an attempt checkpoint and be gone in `grace_s`, its job back at its place in the queue. It uses up none of
    the job's pre-emptions. False if it is ending anyway.
    """
    held = lock(session, attempt_id)
    if held is None or held.attempt.stop_reason is not None:
        return False
    if held.attempt.state == AttemptState.ASSIGNED:
        return unassign(session, attempt_id, why)
    if held.attempt.state not in (AttemptState.CLAIMED, AttemptState.RUNNING):
        return False
    held.attempt.stop_reason = StopReason.PREEMPT
    held.attempt.stop_by = func.now() + timedelta(seconds=grace_s)
    outbox.send(session, outbox.RING_NODE, held.job.project_id, ring(held.attempt))
    events.append(session, held.job, [Entry(f"{why}; the job saves a checkpoint and goes on later", "warn")])
    return True


def time_out(session: Session, attempt_id: uuid.UUID, grace_s: float) -> bool:
    """The attempt has held its GPUs for as long as it may: it is asked to checkpoint, and is killed `grace_s` later.

    False if that is not so, or it is to stop anyway.
    """
    held = lock(session, attempt_id)
    if held is None or held.attempt.stop_reason is not None:
        return False
    if held.attempt.state not in (AttemptState.CLAIMED, AttemptState.RUNNING):
        return False
    over = Attempt.assigned_at + func.make_interval(0, 0, 0, 0, 0, 0, Attempt.limit_s) < func.now()
    if not session.scalar(select(over).where(Attempt.id == attempt_id)):
        return False
    held.attempt.stop_reason = StopReason.TIME_LIMIT
    held.attempt.stop_by = func.now() + timedelta(seconds=grace_s)
    outbox.send(session, outbox.RING_NODE, held.job.project_id, ring(held.attempt))
    return True


def abandon(session: Session, attempt_id: uuid.UUID, code: FailureCode, message: str) -> bool:
    """The node has found an attempt's supervisor dead and ended whatever was left of it."""
    held = lock(session, attempt_id)
    if held is None or held.attempt.state not in LEASED_ATTEMPT:
        return False
    fail(session, held, code, message, state=AttemptState.LOST)
    return True


# ---- after a restore -----------------------------------------------------------------------------------------


def interrupt(session: Session, attempt_id: uuid.UUID, message: str) -> bool:
    """Nothing of this attempt runs here, and that is nobody's fault: the job goes on from its newest checkpoint."""
    held = lock(session, attempt_id)
    if held is None or held.attempt.state not in LIVE_ATTEMPT:
        return False
    held.attempt.failure_code, held.attempt.failure_message = FailureCode.WORKER_LOST, message
    held.attempt.fault = Fault.PLATFORM
    end_attempt(session, held.attempt, AttemptState.LOST)
    if held.job.state != JobState.QUEUED:
        after_stop(session, held.job, f"Attempt {held.attempt.no} ended: {message}")
    return True
