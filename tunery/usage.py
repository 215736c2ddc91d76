"""Bytes that a project keeps in the object store, by kind, and the limit on them."""

import uuid
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Select, func, literal, select, union_all
from sqlalchemy.orm import Session

from tunery.errors import QuotaExceeded
from tunery.models import AdapterVersion, Attempt, Checkpoint, Dataset, File, Project

KINDS = ("files", "datasets", "checkpoints", "adapters", "logs")
COUNTED = frozenset({"files", "datasets", "checkpoints", "adapters"})
"""Logs are capped and expire by themselves: they are shown, and count against nobody."""


@dataclass(frozen=True)
class Used:
    """Objects of one kind."""

    count: int
    bytes: int


@dataclass(frozen=True)
class StorageUsage:
    kinds: dict[str, Used]
    limit_bytes: int

    @property
    def counted_bytes(self) -> int:
        """What the limit is compared with."""
        return sum(used.bytes for kind, used in self.kinds.items() if kind in COUNTED)

    @property
    def room_bytes(self) -> int:
        return self.limit_bytes - self.counted_bytes


def by_project(session: Session) -> dict[uuid.UUID, dict[str, Used]]:
    """Bytes of each kind, of every project that this role may see."""
    rows = union_all(
        _sum("files", File, File.bytes, File.deleted_at.is_(None)),
        _sum("datasets", Dataset, Dataset.bytes),
        _sum("checkpoints", Checkpoint, Checkpoint.bytes, Checkpoint.deleted_at.is_(None)),
        _sum("adapters", AdapterVersion, AdapterVersion.bytes, AdapterVersion.deleted_at.is_(None)),
        _sum("logs", Attempt, Attempt.log_bytes, Attempt.logs_deleted_at.is_(None), Attempt.log_bytes > 0),
    )
    found: dict[uuid.UUID, dict[str, Used]] = {}
    for project_id, kind, count, size in session.execute(rows).tuples():
        found.setdefault(project_id, dict.fromkeys(KINDS, Used(0, 0)))[kind] = Used(count, int(size))
    return found


def storage(session: Session, project_id: uuid.UUID, default_limit: int) -> StorageUsage:
    """What one project keeps, and how much it may. The session sees that project alone."""
    kinds = by_project(session).get(project_id) or dict.fromkeys(KINDS, Used(0, 0))
    own = session.scalar(select(Project.max_storage_bytes).where(Project.id == project_id))
    return StorageUsage(kinds, default_limit if own is None else own)


def refuse_if_full(session: Session, project_id: uuid.UUID, default_limit: int, more: int = 1) -> None:
    """Raises QuotaExceeded when `more` bytes would not fit. Jobs that run are never stopped by it.

    Others of this project wait until this transaction ends: two that fit alone must fit together.
    """
    key = func.hashtextextended(f"storage:{project_id}", 0)
    session.execute(select(func.pg_advisory_xact_lock(key)))
    used = storage(session, project_id, default_limit)
    if more > used.room_bytes:
        raise exceeded(used)


def exceeded(used: StorageUsage) -> QuotaExceeded:
    kinds = ", ".join(f"{kind} {item.bytes:,}" for kind, item in used.kinds.items() if kind in COUNTED)
    return QuotaExceeded(
        f"The project stores {used.counted_bytes:,} of at most {used.limit_bytes:,} bytes ({kinds}): "
        "there is no room for this.",
        fix="Delete files, jobs or models that are no longer needed, or ask your operator for more room.",
        code="storage_quota_exceeded",
    )


def _sum(kind: str, table: Any, size: Any, *where: ColumnElement[bool]) -> Select[Any, str, int, Any]:
    total = func.coalesce(func.sum(size), 0)
    return select(table.project_id, literal(kind), func.count(), total).where(*where).group_by(table.project_id)
