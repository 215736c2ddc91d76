"""What happened to a job, in the order that Postgres gave it."""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from tunery.ids import uuid7
from tunery.models import Event, Job


@dataclass(frozen=True)
class Entry:
    """One line of a job's history. `at` is None for now."""

    message: str
    level: str = "info"
    type: str = "message"
    data: dict[str, Any] | None = None
    at: datetime | None = None


def append(session: Session, job: Job, entries: Sequence[Entry]) -> None:
    """Add entries to a job whose row this transaction holds FOR UPDATE (or has just made)."""
    for entry in entries:
        job.event_seq += 1
        row = Event(project_id=job.project_id, job_id=job.id, seq=job.event_seq, id=uuid7())
        row.level, row.type, row.message, row.data = entry.level, entry.type, entry.message, entry.data
        if entry.at is not None:
            row.created_at = entry.at
        session.add(row)


def page(
    session: Session, project_id: uuid.UUID, job_id: uuid.UUID, *, after: uuid.UUID | None, limit: int
) -> tuple[list[Event], bool]:
    """Newest first, those older than the event `after`; and whether there are more."""
    mine = (Event.project_id == project_id, Event.job_id == job_id)
    query = select(Event).where(*mine).order_by(Event.seq.desc()).limit(limit + 1)
    if after is not None:
        query = query.where(Event.seq < select(Event.seq).where(*mine, Event.id == after).scalar_subquery())
    rows = list(session.scalars(query))
    return rows[:limit], len(rows) > limit
