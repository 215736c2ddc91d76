"""Objects that no row refers to any more: written down in the transaction that hides the row, deleted later.

Whoever deletes reads a batch first and asks for holds second, in one transaction. A backup takes its hold first and its
snapshot second. So an object that a batch holds although a hold came in between was hidden before that backup's
snapshot, and the backup does not want it.
"""

import uuid
from collections.abc import Iterable, Sequence

from sqlalchemy import delete, func, insert, select
from sqlalchemy.orm import Session

from tunery.models import DeletionHold, ObjectDeletion


def add(session: Session, project_id: uuid.UUID, keys: Iterable[str]) -> None:
    """Have these objects deleted once this transaction has committed. A key with a slash at its end is a prefix."""
    if rows := [{"project_id": project_id, "key": key} for key in keys]:
        session.execute(insert(ObjectDeletion), rows)


def held(session: Session) -> bool:
    """Whether somebody is copying objects now."""
    return session.scalar(select(DeletionHold.holder).where(DeletionHold.expires_at > func.now()).limit(1)) is not None


def batch(session: Session, limit: int) -> Sequence[tuple[int, str]]:
    """The oldest entries, by id; none while anything is held."""
    oldest = select(ObjectDeletion.id, ObjectDeletion.key).order_by(ObjectDeletion.id).limit(limit)
    found = [(row.id, row.key) for row in session.execute(oldest)]
    return [] if held(session) else found


def done(session: Session, ids: Sequence[int]) -> None:
    session.execute(delete(ObjectDeletion).where(ObjectDeletion.id.in_(ids)))
