"""By users, and by the check of their rows."""

import uuid
from collections.abc import Sequence
from datetime import timedelta

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from tunery import events, outbox
from tunery.errors import Conflict, NotFound
from tunery.events import Entry
from tunery.leases.moves import (
    cancel_tasks,
    cancelled_entry,
    end_attempt,
    fail_job,
    live_attempt,
    move_job,
    ring,
)
from tunery.models import Job
from tunery.states import TERMINAL, AttemptState, FailureCode, JobState, StopReason

CANCEL_GRACE_S = 20
"""Nothing is saved for a cancelled job: its trainer has little to do before it goes."""


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
    attempt = live_attempt(session, job_id)
    if state in (JobState.VALIDATING, JobState.QUEUED, JobState.PAUSED):
        if attempt is not None:
            end_attempt(session, attempt, AttemptState.CANCELLED)
        move_job(session, job, JobState.CANCELLED)
        cancel_tasks(session, job_id)
        events.append(session, job, [cancelled_entry()])
        return job
    move_job(session, job, JobState.CANCELLING)
    events.append(session, job, [Entry("The job is being cancelled")])
    if attempt is not None:
        attempt.stop_reason = StopReason.CANCEL
        attempt.stop_by = func.now() + timedelta(seconds=CANCEL_GRACE_S)
        outbox.send(session, outbox.RING_NODE, job.project_id, ring(attempt))
    return job


# ---- by the data check ----------------------------------------------------------------------------------------


def enqueue(session: Session, job: Job, entries: Sequence[Entry]) -> bool:
    """The rows are sound: the job waits for a GPU. False if it was cancelled meanwhile."""
    if job.state != JobState.VALIDATING:
        return False
    move_job(session, job, JobState.QUEUED)
    events.append(session, job, [*entries, Entry("Files validated; the job waits for a GPU")])
    return True


def reject(session: Session, job: Job, code: FailureCode, message: str, param: str) -> bool:
    """The rows are not sound: the job ends. False if it was cancelled meanwhile."""
    if job.state != JobState.VALIDATING:
        return False
    fail_job(session, job, code, message, param)
    return True
