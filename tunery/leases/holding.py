"""By whoever runs an attempt. It shows its fence with each call; whoever was replaced finds a higher one, or a state
that is no longer live, and is told `Fenced`.
"""

import uuid
from dataclasses import dataclass
from datetime import timedelta

from sqlalchemy import func, text
from sqlalchemy.orm import Session

from tunery import events, observations
from tunery.events import Entry
from tunery.leases.moves import (
    Held,
    after_fault,
    after_out_of_memory,
    after_stop,
    end_attempt,
    lock,
    move_attempt,
    move_job,
    out_of_time,
    release,
    spoken,
)
from tunery.states import LEASED_ATTEMPT, POLICY, AttemptState, FailureCode, JobState, StopReason


class Fenced(Exception):
    """The attempt is no longer this caller's: it was taken away, ended, or never claimed. Stop at once."""


def claim(session: Session, attempt_id: uuid.UUID, claimed_by: str, lease_s: float) -> Held | None:
    """Take an assigned attempt and start its job, or learn that it is not to be had. The idempotency point."""
    held = lock(session, attempt_id)
    if held is None:
        return None
    if held.attempt.state == AttemptState.CLAIMED and held.attempt.claimed_by == claimed_by:
        return held  # a retry after a lost reply
    if held.attempt.state != AttemptState.ASSIGNED:
        return None
    if held.job.state != JobState.QUEUED or held.job.fence != held.attempt.fence:
        return None
    move_attempt(held.attempt, AttemptState.CLAIMED)
    held.attempt.claimed_by = claimed_by
    held.attempt.claimed_at = func.now()
    held.attempt.lease_expires_at = func.now() + timedelta(seconds=lease_s)
    move_job(session, held.job, JobState.STARTING)
    return held


@dataclass(frozen=True)
class Asked:
    """Whoever runs the attempt should stop, and has so many seconds; None is as many as it usually has."""

    reason: StopReason
    within_s: float | None = None


def renew(session: Session, attempt_id: uuid.UUID, fence: int, lease_s: float) -> Asked | None:
    """Keep the lease; the reply says whether the attempt should stop. Raises Fenced."""
    row = session.execute(
        text(
            "UPDATE attempts SET lease_expires_at = now() + make_interval(secs => :ttl), state = CASE "
            "WHEN stop_reason IS NOT NULL AND state IN ('claimed', 'running') THEN 'stopping' ELSE state END "
            "WHERE id = :id AND fence = :fence AND state IN ('claimed', 'running', 'stopping', 'publishing') "
            "RETURNING stop_reason, extract(epoch FROM stop_by - now())::float8 AS within_s"
        ),
        {"ttl": lease_s, "id": attempt_id, "fence": fence},
    ).first()
    if row is None:
        raise Fenced
    if row.stop_reason is None:
        return None
    # a newer scheduler may know reasons that we do not; all of them ask for a checkpoint
    reason = StopReason(row.stop_reason) if row.stop_reason in set(StopReason) else StopReason.PREEMPT
    return Asked(reason, row.within_s)


def hold(session: Session, attempt_id: uuid.UUID, fence: int) -> Held:
    """Lock an attempt that this caller still holds. Raises Fenced."""
    held = lock(session, attempt_id)
    if held is None or held.attempt.fence != fence or held.attempt.state not in LEASED_ATTEMPT:
        raise Fenced
    return held


def mark_running(session: Session, held: Held) -> None:
    """The trainer has said its first word."""
    if held.attempt.state == AttemptState.CLAIMED:
        move_attempt(held.attempt, AttemptState.RUNNING)
        held.attempt.started_at = func.now()
    if held.job.state == JobState.STARTING:
        move_job(session, held.job, JobState.RUNNING)
        if held.job.started_at is None:
            held.job.started_at = func.now()


def begin_publishing(session: Session, held: Held, *, still_holds_gpu: bool = False) -> None:
    """Training is over and the trainer gone: the GPU goes back, the lease stays while the result is stored."""
    if held.attempt.state == AttemptState.PUBLISHING:
        return  # a retry after a lost reply
    mark_running(session, held)
    move_attempt(held.attempt, AttemptState.PUBLISHING)
    session.flush()
    if not still_holds_gpu:
        release(session, held.attempt.id)


def succeed(
    session: Session, held: Held, tokens: int, peak_memory_bytes: int = 0, *, still_holds_gpu: bool = False
) -> None:
    """The result is published in this same transaction. What the run took is kept: estimates will learn from it."""
    held.attempt.details = (held.attempt.details or {}) | {"peak_memory_bytes": peak_memory_bytes}
    end_attempt(session, held.attempt, AttemptState.SUCCEEDED, keep_gpus=still_holds_gpu)
    move_job(session, held.job, JobState.SUCCEEDED)
    held.job.trained_tokens = tokens
    observations.note(session, held.job, held.attempt, observations.SUCCEEDED, peak_memory_bytes, tokens)
    told = [
        Entry(f"New fine-tuned model created: {held.job.model_name}"),
        Entry("The job has successfully completed", data={"kind": "state", "state": JobState.SUCCEEDED}),
    ]
    events.append(session, held.job, told)


def stopped(session: Session, held: Held, reason: StopReason, *, still_holds_gpu: bool = False) -> None:
    """The trainer stopped because it was asked to; what follows depends on what the user wants by now."""
    job, attempt = held.job, held.attempt
    late = reason is StopReason.TIME_LIMIT and JobState(job.state) in (JobState.STARTING, JobState.RUNNING)
    if late and job.time_limit_s is not None:
        fail(session, held, FailureCode.TIME_LIMIT, out_of_time(session, job), still_holds_gpu=still_holds_gpu)
        return
    state = AttemptState.CANCELLED if job.state == JobState.CANCELLING else AttemptState.PREEMPTED
    end_attempt(session, attempt, state, keep_gpus=still_holds_gpu)
    if late:
        before, job.limit_s = job.limit_s, job.limit_s * 2
        limits = f"the default time limit of {spoken(before)}, which is {spoken(job.limit_s)} from now on"
        told = f"Attempt {attempt.no} stopped: it reached {limits}"
    elif reason is StopReason.PREEMPT and attempt.preempted_at is not None:
        told = f"Attempt {attempt.no} stopped for a job that comes first by its project's share"
    else:
        told = f"Attempt {attempt.no} stopped ({reason})"
    after_stop(session, job, told)


def give_back(session: Session, held: Held, reason: str) -> None:
    """Nothing was started for the attempt, and not through the job's fault: it waits again, uncharged."""
    held.attempt.claimed_at = None  # what was never used has no usage
    end_attempt(session, held.attempt, AttemptState.PREEMPTED)
    held.attempt.failure_message = reason
    after_stop(session, held.job, f"Attempt {held.attempt.no} was not started: {reason}")


def fail(
    session: Session,
    held: Held,
    code: FailureCode,
    message: str,
    *,
    state: AttemptState = AttemptState.FAILED,
    still_holds_gpu: bool = False,
    peak_memory_bytes: int = 0,
) -> JobState:
    """End an attempt that failed; its code decides whether the job is tried again.

    `still_holds_gpu`: nobody has seen the trainer die, so its GPUs wait for the node to say so.
    """
    held.attempt.failure_code, held.attempt.failure_message = code, message
    held.attempt.fault = POLICY[code].fault
    end_attempt(session, held.attempt, state, keep_gpus=still_holds_gpu)
    if code is FailureCode.OUT_OF_MEMORY:
        return after_out_of_memory(session, held, message, peak_memory_bytes, still_holds_gpu=still_holds_gpu)
    return after_fault(session, held.job, held.attempt.no, code, message)
