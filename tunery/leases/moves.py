"""The only module that writes `jobs.state` and `attempts.state`, and what follows from each move.

Every change locks the job, then the attempt, then GPUs by id, so that no two programs can deadlock; under the lock a
plain look at the state is race-free.
"""

import uuid
from dataclasses import dataclass
from typing import Any

from sqlalchemy import func, select, text
from sqlalchemy.orm import Session

from tunery import events, ids, needs, observations, outbox, wake
from tunery.events import Entry
from tunery.models import RESUMABLE, Allocation, Attempt, Checkpoint, Job
from tunery.states import (
    ATTEMPT_MOVES,
    LIVE_ATTEMPT,
    MOVES,
    POLICY,
    TERMINAL,
    AttemptState,
    FailureCode,
    Fault,
    JobState,
    after_failure,
)


@dataclass(frozen=True)
class Held:
    """A job and its live attempt, both locked by this transaction."""

    job: Job
    attempt: Attempt


def release(session: Session, attempt_id: uuid.UUID) -> None:
    """Free the GPUs and the slot of an attempt, and write its usage, split by what is known of its end by now.

    Repeating it changes nothing; after the end of an attempt that was released before, it corrects the split.
    """
    session.execute(text("SELECT settle_attempt(:id)"), {"id": attempt_id})
    wake.scheduler(session)


def lock(session: Session, attempt_id: uuid.UUID) -> Held | None:
    job_id = session.scalar(select(Attempt.job_id).where(Attempt.id == attempt_id))
    if job_id is None:
        return None
    fresh: dict[str, Any] = {"with_for_update": True, "populate_existing": True}
    job, attempt = session.get(Job, job_id, **fresh), session.get(Attempt, attempt_id, **fresh)
    return Held(job, attempt) if job is not None and attempt is not None else None


def live_attempt(session: Session, job_id: uuid.UUID) -> Attempt | None:
    live = select(Attempt).where(Attempt.job_id == job_id, Attempt.state.in_(LIVE_ATTEMPT))
    return session.scalar(live.with_for_update().execution_options(populate_existing=True))


def move_job(session: Session, job: Job, to: JobState) -> None:
    if to not in MOVES.get(JobState(job.state), frozenset()):
        raise RuntimeError(f"a job cannot become {to} from {job.state}")
    job.state = to
    if to is JobState.QUEUED:
        wake.scheduler(session)
    if to in TERMINAL:
        job.finished_at = func.now()
        outbox.send(session, outbox.JOB_ENDED, job.project_id, {"job_id": ids.encode(ids.JOB, job.id), "state": to})


def move_attempt(attempt: Attempt, to: AttemptState) -> None:
    if to not in ATTEMPT_MOVES.get(AttemptState(attempt.state), frozenset()):
        raise RuntimeError(f"an attempt cannot become {to} from {attempt.state}")
    attempt.state = to


def end_attempt(session: Session, attempt: Attempt, to: AttemptState, *, keep_gpus: bool = False) -> None:
    move_attempt(attempt, to)
    attempt.ended_at = func.now()
    attempt.lease_expires_at = None
    session.flush()
    if not keep_gpus or not _holds_gpus(session, attempt.id):
        release(session, attempt.id)  # also of GPUs that went back before: only now it is known how the time was spent


def _holds_gpus(session: Session, attempt_id: uuid.UUID) -> bool:
    query = select(Allocation.id).where(Allocation.owner_attempt == attempt_id, Allocation.released_at.is_(None))
    return session.scalar(query.limit(1)) is not None


def after_stop(session: Session, job: Job, message: str) -> None:
    if job.state == JobState.CANCELLING:
        move_job(session, job, JobState.CANCELLED)
        events.append(session, job, [cancelled_entry()])
    elif job.state == JobState.PAUSING:
        move_job(session, job, JobState.PAUSED)
        events.append(session, job, [Entry("The job is paused", data={"kind": "state", "state": JobState.PAUSED})])
    else:
        move_job(session, job, JobState.QUEUED)
        newest = newest_step(session, job.id)
        resumes = f"; it resumes from its checkpoint at step {newest}" if newest else ""
        told = Entry(
            f"{message}; the job is back in the queue{resumes}", "warn", data={"kind": "requeued", "from_step": newest}
        )
        events.append(session, job, [told])


def out_of_time(session: Session, job: Job) -> str:
    newest = newest_step(session, job.id)
    kept = f"Its checkpoint at step {newest} is kept." if newest else "It had no checkpoint yet."
    return f"The job reached its time limit of {spoken(job.limit_s)}. {kept}"


def spoken(seconds: float) -> str:
    """A time limit in words: `2 h 30 min`."""
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    if whole < 60:
        return f"{whole} s"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def after_fault(session: Session, job: Job, attempt_no: int, code: FailureCode, message: str) -> JobState:
    policy = POLICY[code]
    platform = policy.fault is Fault.PLATFORM
    if job.state == JobState.CANCELLING or (job.state == JobState.PAUSING and platform):
        after_stop(session, job, message)
        return JobState(job.state)
    newest = newest_step(session, job.id)
    if platform:
        job.faults_without_progress = 1 if newest > job.fault_step else job.faults_without_progress + 1
        job.fault_step = newest
    if after_failure(code, job.faults_without_progress) is JobState.QUEUED:
        move_job(session, job, JobState.QUEUED)
        data = {"kind": "retry", "code": code, "attempt": attempt_no, "from_step": newest}
        events.append(
            session,
            job,
            [Entry(f"Attempt {attempt_no} ended: {message} The job is tried again {_from(newest)}", "warn", data=data)],
        )
    else:
        fail_job(session, job, code, message, None)
    return JobState(job.state)


def after_out_of_memory(
    session: Session, held: Held, message: str, peak_bytes: int, *, still_holds_gpu: bool
) -> JobState:
    """The estimate was too low: once, the job is tried again with more memory, and not charged for the first try."""
    job, code = held.job, FailureCode.OUT_OF_MEMORY
    observations.note(session, job, held.attempt, code, peak_bytes)
    if job.state not in (JobState.STARTING, JobState.RUNNING):  # somebody has asked it to stop
        return after_fault(session, job, held.attempt.no, code, message)
    again, numbers = needs.after_out_of_memory(session, job, peak_bytes)
    if not again:
        return after_fault(session, job, held.attempt.no, code, f"{message} {numbers}")
    held.attempt.fault = Fault.PLATFORM
    session.flush()
    if not still_holds_gpu:
        release(session, held.attempt.id)  # again: it splits the time by whose fault it was
    move_job(session, job, JobState.QUEUED)
    newest = newest_step(session, job.id)
    data = {"kind": "retry", "code": code, "attempt": held.attempt.no, "from_step": newest}
    told = f"Attempt {held.attempt.no} ran out of memory. {numbers} The job is tried again {_from(newest)}"
    events.append(session, job, [Entry(told, "warn", data=data | {"gpu_bytes": job.required_bytes})])
    return JobState.QUEUED


def _from(step: int) -> str:
    return f"from its checkpoint at step {step}" if step else "from the beginning"


def newest_step(session: Session, job_id: uuid.UUID) -> int:
    steps = select(func.max(Checkpoint.step)).where(Checkpoint.job_id == job_id, *RESUMABLE)
    return session.scalar(steps) or 0


def fail_job(session: Session, job: Job, code: FailureCode, message: str, param: str | None) -> None:
    move_job(session, job, JobState.FAILED)
    job.error_code, job.error_message, job.error_param = code, message, param
    data = {"kind": "state", "state": JobState.FAILED, "code": code, "fix": POLICY[code].fix}
    events.append(session, job, [Entry(f"The job failed: {message}", "error", data=data)])


def cancel_tasks(session: Session, job_id: uuid.UUID) -> None:
    session.execute(
        text(
            "UPDATE tasks SET state = 'cancelled', finished_at = now(), lease_expires_at = NULL "
            "WHERE job_id = :job AND state IN ('queued', 'leased')"
        ),
        {"job": job_id},
    )


def cancelled_entry() -> Entry:
    return Entry("The job was cancelled", data={"kind": "state", "state": JobState.CANCELLED})


def ring(attempt: Attempt) -> dict[str, str]:
    return {"node_id": str(attempt.node_id), "attempt_id": str(attempt.id)}
