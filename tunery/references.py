"""Every object that the rows refer to: what a backup of these rows must hold."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from tunery import attempt_logs
from tunery.models import AdapterVersion, Attempt, BaseModel, Checkpoint, Dataset, File, Job


@dataclass(frozen=True)
class Reference:
    key: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Log:
    """Chunks below `prefix`; those that begin before `bytes` belong to it. Rows do not know their hashes."""

    prefix: str
    bytes: int


def objects(session: Session) -> Iterator[Reference]:
    """Of every project that this role may see; a key may come twice."""
    for table, shown in ((File, File.deleted_at.is_(None)), (Dataset, Dataset.id.is_not(None))):
        query = select(table.object_key, table.bytes, table.sha256).where(shown)
        yield from (Reference(*row) for row in session.execute(query).tuples())
    for made in (Checkpoint, AdapterVersion):
        query = select(made.object_prefix, made.files).where(made.deleted_at.is_(None))
        for prefix, files in session.execute(query).tuples():
            yield from _below(prefix, files)
    bases = select(BaseModel.object_prefix, BaseModel.card).where(BaseModel.state == "ready")
    for prefix, card in session.execute(bases).tuples():
        yield from _below(prefix or "", (card or {}).get("files", []))


def _below(prefix: str, files: list[dict]) -> Iterator[Reference]:  # type: ignore[type-arg]
    return (Reference(f"{prefix}/{file['name']}", file["bytes"], file["sha256"]) for file in files)


def logs(session: Session) -> Iterator[Log]:
    query = select(Attempt.project_id, Attempt.id, Attempt.log_bytes)
    query = query.where(Attempt.log_bytes > 0, Attempt.logs_deleted_at.is_(None))
    for project_id, attempt_id, size in session.execute(query).tuples():
        yield Log(attempt_logs.chunk_prefix(project_id, attempt_id), size)


def counts(session: Session) -> dict[str, int]:
    """Rows of the kinds that people ask about, for the manifest."""
    tables = {"files": File, "jobs": Job, "checkpoints": Checkpoint, "adapter_versions": AdapterVersion}
    return Counter(
        {name: session.scalar(select(func.count()).select_from(table)) or 0 for name, table in tables.items()}
    )
