"""What is given up, and when. Rows first: each function hides rows and writes down the objects that go with them.

A job that has not ended never loses what it needs: its newest checkpoints, and the one that a live attempt continues
from, keep their state. The job's row is locked first, as by whoever assigns it.
"""

import uuid
from collections.abc import Sequence
from datetime import timedelta

from sqlalchemy import and_, delete, func, or_, select
from sqlalchemy.orm import Session

from tunery import attempt_logs, trash
from tunery.models import RESUMABLE, Attempt, Checkpoint, Dataset, File, Job
from tunery.states import LIVE_ATTEMPT, TERMINAL

BATCH = 200
DATASET_GRACE = timedelta(hours=1)
"""Rows just checked may not have reached their job yet."""
_RESULT = ("adapter_", "model", "config.json", "generation_config.json", "tokenizer", "special_tokens", "chat_template")


def is_result(name: str) -> bool:
    """Whether a checkpoint's file is what the user trained, not what only another attempt could use."""
    return name.rsplit("/", 1)[-1].startswith(_RESULT)


def jobs_with_old_state(session: Session, keep: int, days: float) -> list[uuid.UUID]:
    """Jobs with checkpoints whose optimizer state may go: ended `days` ago, or with more than `keep` newer ones."""
    rank = func.row_number().over(partition_by=Checkpoint.job_id, order_by=Checkpoint.step.desc())
    resumable = select(Checkpoint.id, Checkpoint.job_id, rank.label("rank")).where(*RESUMABLE).subquery()
    ended = and_(Job.state.in_(TERMINAL), Job.finished_at < func.now() - timedelta(days=days))
    needed = select(Attempt.resume_checkpoint_id).where(
        Attempt.resume_checkpoint_id == resumable.c.id, Attempt.state.in_(LIVE_ATTEMPT)
    )
    query = select(Job.id).join(resumable, resumable.c.job_id == Job.id)
    query = query.where(or_(ended, resumable.c.rank > keep), ~needed.exists())
    return list(session.scalars(query.distinct().limit(BATCH)))


def drop_state(session: Session, job_id: uuid.UUID, keep: int, days: float) -> int:
    """Give up the optimizer states of one job that nobody will continue from; how many."""
    job = session.get(Job, job_id, with_for_update=True, populate_existing=True)
    if job is None:
        return 0
    rows = select(Checkpoint).where(Checkpoint.job_id == job_id, *RESUMABLE).order_by(Checkpoint.step.desc())
    found = list(session.scalars(rows.execution_options(populate_existing=True)))
    over = session.scalar(select(Job.finished_at < func.now() - timedelta(days=days)).where(Job.id == job_id))
    live = select(Attempt.resume_checkpoint_id).where(Attempt.job_id == job_id, Attempt.state.in_(LIVE_ATTEMPT))
    needed = set(session.scalars(live))
    droppable = found if job.state in TERMINAL and over else found[keep:]
    dropped = [checkpoint for checkpoint in droppable if checkpoint.id not in needed]
    for checkpoint in dropped:
        kept = [file for file in checkpoint.files if is_result(file["name"])]
        gone = [file["name"] for file in checkpoint.files if file not in kept]
        trash.add(session, job.project_id, (f"{checkpoint.object_prefix}/{name}" for name in gone))
        checkpoint.files, checkpoint.bytes = kept, sum(file["bytes"] for file in kept)
        checkpoint.state_deleted_at = func.now()
        if not kept:
            checkpoint.deleted_at = func.now()
    return len(dropped)


def expire_files(session: Session) -> int:
    """Hide files whose time is over and that no job still needs; how many."""
    used = or_(Job.training_file_id == File.id, Job.validation_file_id == File.id)
    needed = select(Job.id).where(Job.project_id == File.project_id, used, Job.state.not_in(TERMINAL)).exists()
    query = select(File).where(File.expires_at < func.now(), File.deleted_at.is_(None), ~needed).limit(BATCH)
    files = list(session.scalars(query.with_for_update(skip_locked=True)))
    for file in files:
        file.deleted_at = func.now()
        trash.add(session, file.project_id, [file.object_key])
    return len(files)


def forget_datasets(session: Session) -> int:
    """Delete checked rows that no job refers to and whose file is gone; how many."""
    jobs = select(Job.id).where(
        Job.project_id == Dataset.project_id,
        or_(Job.train_dataset_id == Dataset.id, Job.validation_dataset_id == Dataset.id),
    )
    source = select(File.id).where(
        File.project_id == Dataset.project_id, File.sha256 == Dataset.source_sha256, File.deleted_at.is_(None)
    )
    old = Dataset.created_at < func.now() - DATASET_GRACE
    wanted = select(Dataset.id).where(~jobs.exists(), ~source.exists(), old).limit(BATCH)
    gone = session.execute(
        delete(Dataset).where(Dataset.id.in_(wanted)).returning(Dataset.project_id, Dataset.object_key)
    ).all()
    for row in gone:
        trash.add(session, row.project_id, [row.object_key])
    return len(gone)


def expire_logs(session: Session, days: float) -> int:
    """Give up the logs of attempts that ended so long ago; how many."""
    old = (Attempt.ended_at < func.now() - timedelta(days=days), Attempt.logs_deleted_at.is_(None))
    attempts: Sequence[Attempt] = list(session.scalars(select(Attempt).where(*old).limit(BATCH)))
    for attempt in attempts:
        attempt.logs_deleted_at = func.now()
        trash.add(session, attempt.project_id, [attempt_logs.chunk_prefix(attempt.project_id, attempt.id)])
    return len(attempts)
