"""What the scheduler has said of a project's queue, read for a page of its jobs."""

import uuid
from collections.abc import Sequence

from sqlalchemy.orm import Session

from api.schemas.waits import Told
from tunery import forecasts, jobs
from tunery.jobs import Job
from tunery.states import JobState


def told(session: Session, project_id: uuid.UUID, rows: Sequence[Job], *, first: bool = False) -> Told:
    """Nothing is read for a page on which no job waits. `first`: they are the first of the queue, in its order."""
    waiting = [row.id for row in rows if row.state == JobState.QUEUED]
    if not waiting:
        return Told()
    return Told(
        jobs.queue_view(session, project_id),
        forecasts.of_project(session, project_id),
        {job_id: rank for rank, job_id in enumerate(waiting, 1)}
        if first
        else jobs.queue_ranks(session, project_id, waiting),
    )
