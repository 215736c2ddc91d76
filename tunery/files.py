"""Files as uploaded. The row is written once the object is complete; before that, nothing exists."""

import uuid
from typing import Literal

from sqlalchemy import func, or_, select
from sqlalchemy.orm import Session

from tunery import ids, trash
from tunery.errors import Conflict, NotFound
from tunery.models import File, Job
from tunery.states import TERMINAL

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


def get(session: Session, project_id: uuid.UUID, file_id: str, *, param: str = "file_id", keep: bool = False) -> File:
    """Raises NotFound, also for another project's file. `keep`: nobody deletes it before this transaction ends."""
    try:
        wanted = ids.decode(ids.FILE, file_id)
    except NotFound:
        wanted = None
    query = select(File).where(File.project_id == project_id, File.id == wanted, File.deleted_at.is_(None))
    if keep:
        query = query.with_for_update(read=True, key_share=True)
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
    """Hide the file and have its object deleted; jobs that used it keep pointing at its row.

    Raises:
        NotFound: no such file in this project.
        Conflict: a job that has not ended uses it.
    """
    file = get(session, project_id, file_id)
    # a submit holds its files FOR KEY SHARE: it either comes first and is found below, or finds the file gone
    session.refresh(file, with_for_update=True)
    if file.deleted_at is not None:
        raise NotFound(f"No such File object: {file_id[:80]}", param="file_id")
    uses = or_(Job.training_file_id == file.id, Job.validation_file_id == file.id)
    live = select(Job.id, Job.state).where(Job.project_id == project_id, Job.state.not_in(TERMINAL), uses)
    if (job := session.execute(live.order_by(Job.id).limit(1)).first()) is not None:
        name = ids.encode(ids.JOB, job.id)
        fix = f"Wait until the job has ended, or cancel it: tunery jobs cancel {name}"
        raise Conflict(f"The job {name}, which is {job.state}, uses this file.", param="file_id", fix=fix)
    file.deleted_at = func.now()
    trash.add(session, project_id, [file.object_key])
    session.flush()
    return file
