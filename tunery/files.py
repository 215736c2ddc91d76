"""Files as uploaded. The row is written once the object is complete; before that, nothing exists."""

import uuid
from typing import Literal

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from tunery import ids
from tunery.errors import NotFound
from tunery.models import File

PURPOSES = ("assistants", "batch", "fine-tune", "vision", "user_data", "evals")


def object_key(project_id: uuid.UUID, file_id: uuid.UUID) -> str:
    """Minted by us: a user's file name never becomes part of a path."""
    return f"u/{project_id}/{file_id}"


def record(
    session: Session, project_id: uuid.UUID, file_id: uuid.UUID, *, filename: str, purpose: str, size: int, sha256: str
) -> File:
    file = File(id=file_id, project_id=project_id, filename=filename, purpose=purpose, bytes=size, sha256=sha256)
    file.object_key = object_key(project_id, file_id)
    session.add(file)
    session.flush()
    session.refresh(file)
    return file


def get(session: Session, project_id: uuid.UUID, file_id: str, *, param: str = "file_id") -> File:
    """Raises NotFound, also for another project's file."""
    try:
        wanted = ids.decode(ids.FILE, file_id)
    except NotFound:
        wanted = None
    query = select(File).where(File.project_id == project_id, File.id == wanted, File.deleted_at.is_(None))
    file = session.scalar(query) if wanted else None
    if file is None:
        fix = "Upload the file first; `tunery files list` shows what this project has."
        raise NotFound(f"No such File object: {file_id[:80]}", param=param, fix=fix)
    return file


def page(
    session: Session,
    project_id: uuid.UUID,
    *,
    after: uuid.UUID | None,
    limit: int,
    order: Literal["asc", "desc"] = "desc",
    purpose: str | None = None,
) -> tuple[list[File], bool]:
    """This project's files by age; and whether there are more."""
    ascending = order == "asc"
    query = select(File).where(File.project_id == project_id, File.deleted_at.is_(None))
    query = query.order_by(File.id if ascending else File.id.desc()).limit(limit + 1)
    if purpose is not None:
        query = query.where(File.purpose == purpose)
    if after is not None:
        query = query.where(File.id > after if ascending else File.id < after)
    rows = list(session.scalars(query))
    return rows[:limit], len(rows) > limit


def delete(session: Session, project_id: uuid.UUID, file_id: str) -> File:
    """Hide the file; jobs that used it keep pointing at its row. The caller removes the object after commit."""
    file = get(session, project_id, file_id)
    file.deleted_at = func.now()
    session.flush()
    return file
