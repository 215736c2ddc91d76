"""The only module that writes `jobs.state` and `attempts.state`.

Every change locks the job, then the attempt, then GPUs by id, so that no two programs can deadlock; under the lock
a plain look at the state is race-free. A writer that holds an attempt shows its fence; whoever was replaced
finds a higher one, or a state that is no longer live, and is told `Fenced`.
"""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy import func, select, text
from sqlalchemy.orm import Session

from tunery import events, ids, needs, observations, outbox, wake
from tunery.errors import Conflict, NotFound
from tunery.events import Entry
from tunery.models import RESUMABLE, Attempt, Checkpoint, Job
from tunery.states import (
    ATTEMPT_MOVES,
    LEASED_ATTEMPT,
    LIVE_ATTEMPT,
    MOVES,
    POLICY,
    TERMINAL,
    AttemptState,
    FailureCode,
    Fault,
    JobState,
    StopReason,
    after_failure,
)

CANCEL_GRACE_S = 20
"""Nothing is saved for a cancelled job: its trainer has little to do before it goes."""


class Fenced(Exception):
    """The attempt is no longer this caller's: it was taken away, ended, or never claimed. Stop at once."""


@dataclass(frozen=True)
class Held:
    """A job and its live attempt, both locked by this transaction."""

    job: Job
    attempt: Attempt


# ---- by whoever runs an attempt ---------------------------------------------------------------------------


def claim(session: Session, attempt_id: uuid.UUID, claimed_by: str, lease_s: float) -> Held | None:
    """Take an assigned attempt and start its job, or learn that it is not to be had. The idempotency point."""
    held = _lock(session, attempt_id)
    if held is None:
        return None
    if held.attempt.state == AttemptState.CLAIMED and held.attempt.claimed_by == claimed_by:
        return held  # a retry after a lost reply
    if held.attempt.state != AttemptState.ASSIGNED:
        return None
    if held.job.state != JobState.QUEUED or held.job.fence != held.attempt.fence:
        return None
    _move_attempt(held.attempt, AttemptState.CLAIMED)
    held.attempt.claimed_by = claimed_by
    held.attempt.claimed_at = func.now()
    held.attempt.lease_expires_at = func.now() + timedelta(seconds=lease_s)
    _move_job(session, held.job, JobState.STARTING)
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
    held = _lock(session, attempt_id)
    if held is None or held.attempt.fence != fence or held.attempt.state not in LEASED_ATTEMPT:
        raise Fenced
    return held


def mark_running(session: Session, held: Held) -> None:
    """The trainer has said its first word."""
    if held.attempt.state == AttemptState.CLAIMED:
        _move_attempt(held.attempt, AttemptState.RUNNING)
        held.attempt.started_at = func.now()
    if held.job.state == JobState.STARTING:
        _move_job(session, held.job, JobState.RUNNING)
        if held.job.started_at is None:
            held.job.started_at = func.now()


def begin_publishing(session: Session, held: Held, *, still_holds_gpu: bool = False) -> None:
    """Training is over and the trainer gone: the GPU goes back, the lease stays while the result is stored."""
    if held.attempt.state == AttemptState.PUBLISHING:
        return  # a retry after a lost reply
    mark_running(session, held)
    _move_attempt(held.attempt, AttemptState.PUBLISHING)
    session.flush()
    if not still_holds_gpu:
        release(session, held.attempt.id)


def succeed(
    session: Session, held: Held, tokens: int, peak_memory_bytes: int = 0, *, still_holds_gpu: bool = False
) -> None:
    """The result is published in this same transaction. What the run took is kept: estimates will learn from it."""
    held.attempt.details = (held.attempt.details or {}) | {"peak_memory_bytes": peak_memory_bytes}
    _end_attempt(session, held.attempt, AttemptState.SUCCEEDED, keep_gpus=still_holds_gpu)
    _move_job(session, held.job, JobState.SUCCEEDED)
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
        fail(session, held, FailureCode.TIME_LIMIT, _out_of_time(session, job), still_holds_gpu=still_holds_gpu)
        return
    state = AttemptState.CANCELLED if job.state == JobState.CANCELLING else AttemptState.PREEMPTED
    _end_attempt(session, attempt, state, keep_gpus=still_holds_gpu)
    if late:
        before, job.limit_s = job.limit_s, job.limit_s * 2
        limits = f"the default time limit of {spoken(before)}, which is {spoken(job.limit_s)} from now on"
        told = f"Attempt {attempt.no} stopped: it reached {limits}"
    elif reason is StopReason.PREEMPT and attempt.preempted_at is not None:
        told = f"Attempt {attempt.no} stopped for a job that comes first by its project's share"
    else:
        told = f"Attempt {attempt.no} stopped ({reason})"
    _after_stop(session, job, told)


def give_back(session: Session, held: Held, reason: str) -> None:
    """Nothing was started for the attempt, and not through the job's fault: it waits again, uncharged."""
    held.attempt.claimed_at = None  # what was never used has no usage
    _end_attempt(session, held.attempt, AttemptState.PREEMPTED)
    held.attempt.failure_message = reason
    _after_stop(session, held.job, f"Attempt {held.attempt.no} was not started: {reason}")


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
    _end_attempt(session, held.attempt, state, keep_gpus=still_holds_gpu)
    if code is FailureCode.OUT_OF_MEMORY:
        return _after_out_of_memory(session, held, message, peak_memory_bytes)
    return _after_fault(session, held.job, held.attempt.no, code, message)


def release(session: Session, attempt_id: uuid.UUID) -> None:
    """Free the GPUs and the slot of an attempt, and write its usage, split by what is known of its end by now.

    Repeating it changes nothing; after the end of an attempt that was released before, it corrects the split.
    """
    session.execute(text("SELECT settle_attempt(:id)"), {"id": attempt_id})
    wake.scheduler(session)


# ---- by the scheduler and the node, about attempts whose holder is silent ------------------------------------


def declare_lost(session: Session, attempt_id: uuid.UUID, grace_s: float) -> bool:
    """The lease ran out `grace_s` ago: the attempt is lost, its job goes on elsewhere. False if that is not so."""
    held = _lock(session, attempt_id)
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
    held = _lock(session, attempt_id)
    if held is None or held.attempt.state != AttemptState.ASSIGNED:
        return False
    held.attempt.failure_code, held.attempt.fault = FailureCode.NOT_CLAIMED, Fault.PLATFORM
    _end_attempt(session, held.attempt, AttemptState.LOST)
    events.append(session, held.job, [Entry(f"{why}; the job is assigned again", "warn")])
    return True


def evict(session: Session, attempt_id: uuid.UUID, grace_s: float, why: str) -> bool:
    """Have an attempt checkpoint and be gone in `grace_s`, its job back at its place in the queue. It uses up none of
    the job's pre-emptions. False if it is ending anyway.
    """
    held = _lock(session, attempt_id)
    if held is None or held.attempt.stop_reason is not None:
        return False
    if held.attempt.state == AttemptState.ASSIGNED:
        return unassign(session, attempt_id, why)
    if held.attempt.state not in (AttemptState.CLAIMED, AttemptState.RUNNING):
        return False
    held.attempt.stop_reason = StopReason.PREEMPT
    held.attempt.stop_by = func.now() + timedelta(seconds=grace_s)
    outbox.send(session, outbox.RING_NODE, held.job.project_id, _ring(held.attempt))
    events.append(session, held.job, [Entry(f"{why}; the job saves a checkpoint and goes on later", "warn")])
    return True


def time_out(session: Session, attempt_id: uuid.UUID, grace_s: float) -> bool:
    """The attempt has held its GPUs for as long as it may: it is asked to checkpoint, and is killed `grace_s` later.

    False if that is not so, or it is to stop anyway.
    """
    held = _lock(session, attempt_id)
    if held is None or held.attempt.stop_reason is not None:
        return False
    if held.attempt.state not in (AttemptState.CLAIMED, AttemptState.RUNNING):
        return False
    over = Attempt.assigned_at + func.make_interval(0, 0, 0, 0, 0, 0, Attempt.limit_s) < func.now()
    if not session.scalar(select(over).where(Attempt.id == attempt_id)):
        return False
    held.attempt.stop_reason = StopReason.TIME_LIMIT
    held.attempt.stop_by = func.now() + timedelta(seconds=grace_s)
    outbox.send(session, outbox.RING_NODE, held.job.project_id, _ring(held.attempt))
    return True


def abandon(session: Session, attempt_id: uuid.UUID, code: FailureCode, message: str) -> bool:
    """The node has found an attempt's supervisor dead and ended whatever was left of it."""
    held = _lock(session, attempt_id)
    if held is None or held.attempt.state not in LEASED_ATTEMPT:
        return False
    fail(session, held, code, message, state=AttemptState.LOST)
    return True


# ---- after a restore -----------------------------------------------------------------------------------------


def interrupt(session: Session, attempt_id: uuid.UUID, message: str) -> bool:
    """Nothing of this attempt runs here, and that is nobody's fault: the job goes on from its newest checkpoint."""
    held = _lock(session, attempt_id)
    if held is None or held.attempt.state not in LIVE_ATTEMPT:
        return False
    held.attempt.failure_code, held.attempt.failure_message = FailureCode.WORKER_LOST, message
    held.attempt.fault = Fault.PLATFORM
    _end_attempt(session, held.attempt, AttemptState.LOST)
    if held.job.state != JobState.QUEUED:
        _after_stop(session, held.job, f"Attempt {held.attempt.no} ended: {message}")
    return True


# ---- by users -----------------------------------------------------------------------------------------------


def cancel(session: Session, project_id: uuid.UUID, job_id: uuid.UUID) -> Job:
    """End a job that has not started, or ask whoever runs it to stop. Cancelling twice is once.

    Raises:
        NotFound: no such job in this project.
        Conflict: it has already succeeded or failed.
    """
    job = session.scalar(select(Job).where(Job.project_id == project_id, Job.id == job_id).with_for_update())
    if job is None:
        raise NotFound("No such fine-tuning job.")
    state = JobState(job.state)
    if state in (JobState.CANCELLED, JobState.CANCELLING):
        return job
    if state in TERMINAL:
        raise Conflict(f"The job has already {state}; it cannot be cancelled.", fix="Nothing needs to be done.")
    attempt = _live_attempt(session, job_id)
    if state in (JobState.VALIDATING, JobState.QUEUED, JobState.PAUSED):
        if attempt is not None:
            _end_attempt(session, attempt, AttemptState.CANCELLED)
        _move_job(session, job, JobState.CANCELLED)
        _cancel_tasks(session, job_id)
        events.append(session, job, [_cancelled_entry()])
        return job
    _move_job(session, job, JobState.CANCELLING)
    events.append(session, job, [Entry("The job is being cancelled")])
    if attempt is not None:
        attempt.stop_reason = StopReason.CANCEL
        attempt.stop_by = func.now() + timedelta(seconds=CANCEL_GRACE_S)
        outbox.send(session, outbox.RING_NODE, job.project_id, _ring(attempt))
    return job


# ---- by the data check ----------------------------------------------------------------------------------------


def enqueue(session: Session, job: Job, entries: Sequence[Entry]) -> bool:
    """The rows are sound: the job waits for a GPU. False if it was cancelled meanwhile."""
    if job.state != JobState.VALIDATING:
        return False
    _move_job(session, job, JobState.QUEUED)
    events.append(session, job, [*entries, Entry("Files validated; the job waits for a GPU")])
    return True


def reject(session: Session, job: Job, code: FailureCode, message: str, param: str) -> bool:
    """The rows are not sound: the job ends. False if it was cancelled meanwhile."""
    if job.state != JobState.VALIDATING:
        return False
    _fail_job(session, job, code, message, param)
    return True


# ---- helpers, in call order -------------------------------------------------------------------------------------


def _lock(session: Session, attempt_id: uuid.UUID) -> Held | None:
    job_id = session.scalar(select(Attempt.job_id).where(Attempt.id == attempt_id))
    if job_id is None:
        return None
    fresh: dict[str, Any] = {"with_for_update": True, "populate_existing": True}
    job, attempt = session.get(Job, job_id, **fresh), session.get(Attempt, attempt_id, **fresh)
    return Held(job, attempt) if job is not None and attempt is not None else None


def _live_attempt(session: Session, job_id: uuid.UUID) -> Attempt | None:
    live = select(Attempt).where(Attempt.job_id == job_id, Attempt.state.in_(LIVE_ATTEMPT))
    return session.scalar(live.with_for_update().execution_options(populate_existing=True))


def _move_job(session: Session, job: Job, to: JobState) -> None:
    if to not in MOVES.get(JobState(job.state), frozenset()):
        raise RuntimeError(f"a job cannot become {to} from {job.state}")
    job.state = to
    if to is JobState.QUEUED:
        wake.scheduler(session)
    if to in TERMINAL:
        job.finished_at = func.now()
        outbox.send(session, outbox.JOB_ENDED, job.project_id, {"job_id": ids.encode(ids.JOB, job.id), "state": to})


def _move_attempt(attempt: Attempt, to: AttemptState) -> None:
    if to not in ATTEMPT_MOVES.get(AttemptState(attempt.state), frozenset()):
        raise RuntimeError(f"an attempt cannot become {to} from {attempt.state}")
    attempt.state = to


def _end_attempt(session: Session, attempt: Attempt, to: AttemptState, *, keep_gpus: bool = False) -> None:
    _move_attempt(attempt, to)
    attempt.ended_at = func.now()
    attempt.lease_expires_at = None
    session.flush()
    if not keep_gpus:
        release(session, attempt.id)


def _after_stop(session: Session, job: Job, message: str) -> None:
    if job.state == JobState.CANCELLING:
        _move_job(session, job, JobState.CANCELLED)
        events.append(session, job, [_cancelled_entry()])
    elif job.state == JobState.PAUSING:
        _move_job(session, job, JobState.PAUSED)
        events.append(session, job, [Entry("The job is paused", data={"kind": "state", "state": JobState.PAUSED})])
    else:
        _move_job(session, job, JobState.QUEUED)
        newest = _newest_step(session, job.id)
        resumes = f"; it resumes from its checkpoint at step {newest}" if newest else ""
        told = Entry(
            f"{message}; the job is back in the queue{resumes}", "warn", data={"kind": "requeued", "from_step": newest}
        )
        events.append(session, job, [told])


def _out_of_time(session: Session, job: Job) -> str:
    newest = _newest_step(session, job.id)
    kept = f"Its checkpoint at step {newest} is kept." if newest else "It had no checkpoint yet."
    return f"The job reached its time limit of {spoken(job.limit_s)}. {kept}"


def spoken(seconds: float) -> str:
    """A time limit in words: `2 h 30 min`."""
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    if whole < 60:
        return f"{whole} s"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def _after_fault(session: Session, job: Job, attempt_no: int, code: FailureCode, message: str) -> JobState:
    policy = POLICY[code]
    platform = policy.fault is Fault.PLATFORM
    if job.state == JobState.CANCELLING or (job.state == JobState.PAUSING and platform):
        _after_stop(session, job, message)
        return JobState(job.state)
    newest = _newest_step(session, job.id)
    if platform:
        job.faults_without_progress = 1 if newest > job.fault_step else job.faults_without_progress + 1
        job.fault_step = newest
    if after_failure(code, job.faults_without_progress) is JobState.QUEUED:
        _move_job(session, job, JobState.QUEUED)
        data = {"kind": "retry", "code": code, "attempt": attempt_no, "from_step": newest}
        events.append(
            session,
            job,
            [Entry(f"Attempt {attempt_no} ended: {message} The job is tried again {_from(newest)}", "warn", data=data)],
        )
    else:
        _fail_job(session, job, code, message, None)
    return JobState(job.state)


def _after_out_of_memory(session: Session, held: Held, message: str, peak_bytes: int) -> JobState:
    """The estimate was too low: once, the job is tried again with more memory. That is its only retry of this kind."""
    job, code = held.job, FailureCode.OUT_OF_MEMORY
    observations.note(session, job, held.attempt, code, peak_bytes)
    if job.state not in (JobState.STARTING, JobState.RUNNING):  # somebody has asked it to stop
        return _after_fault(session, job, held.attempt.no, code, message)
    again, numbers = needs.after_out_of_memory(session, job, peak_bytes)
    if not again:
        return _after_fault(session, job, held.attempt.no, code, f"{message} {numbers}")
    _move_job(session, job, JobState.QUEUED)
    newest = _newest_step(session, job.id)
    data = {"kind": "retry", "code": code, "attempt": held.attempt.no, "from_step": newest}
    told = f"Attempt {held.attempt.no} ran out of memory. {numbers} The job is tried again {_from(newest)}"
    events.append(session, job, [Entry(told, "warn", data=data | {"gpu_bytes": job.required_bytes})])
    return JobState.QUEUED


def _from(step: int) -> str:
    return f"from its checkpoint at step {step}" if step else "from the beginning"


def _newest_step(session: Session, job_id: uuid.UUID) -> int:
    steps = select(func.max(Checkpoint.step)).where(Checkpoint.job_id == job_id, *RESUMABLE)
    return session.scalar(steps) or 0


def _fail_job(session: Session, job: Job, code: FailureCode, message: str, param: str | None) -> None:
    _move_job(session, job, JobState.FAILED)
    job.error_code, job.error_message, job.error_param = code, message, param
    data = {"kind": "state", "state": JobState.FAILED, "code": code, "fix": POLICY[code].fix}
    events.append(session, job, [Entry(f"The job failed: {message}", "error", data=data)])


def _cancel_tasks(session: Session, job_id: uuid.UUID) -> None:
    session.execute(
        text(
            "UPDATE tasks SET state = 'cancelled', finished_at = now(), lease_expires_at = NULL "
            "WHERE job_id = :job AND state IN ('queued', 'leased')"
        ),
        {"job": job_id},
    )


def _cancelled_entry() -> Entry:
    return Entry("The job was cancelled", data={"kind": "state", "state": JobState.CANCELLED})


def _ring(attempt: Attempt) -> dict[str, str]:
    return {"node_id": str(attempt.node_id), "attempt_id": str(attempt.id)}
