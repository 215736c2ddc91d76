"""Where a trainer's log lies: chunks below the attempt's prefix, each named by the offset of its first byte."""

import uuid

from sqlalchemy import update
from sqlalchemy.orm import Session

from tunery.leases import Fenced
from tunery.models import Attempt


def chunk_prefix(project_id: uuid.UUID, attempt_id: uuid.UUID) -> str:
    return f"a/{project_id}/{attempt_id}/logs/"


def chunk_key(project_id: uuid.UUID, attempt_id: uuid.UUID, offset: int) -> str:
    """Twelve digits sort like numbers."""
    return f"{chunk_prefix(project_id, attempt_id)}{offset:012d}"


def note_size(session: Session, attempt_id: uuid.UUID, fence: int, size: int) -> None:
    """So many bytes are stored. Allowed after the end too: the last lines are the ones people need. Raises Fenced."""
    mine = (Attempt.id == attempt_id, Attempt.fence == fence)
    found = session.execute(update(Attempt).where(*mine).values(log_bytes=size).returning(Attempt.id))
    if found.first() is None:
        raise Fenced
