"""The registry. A version is a row that points at immutable, hash-verified objects; nothing is ever copied."""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from tunery import ids, trash
from tunery.contracts.events import FileEntry
from tunery.errors import NotFound
from tunery.leases import Held
from tunery.models import Adapter, AdapterVersion

WEIGHTS = "adapter_model.safetensors"
_SHOWN = AdapterVersion.deleted_at.is_(None)


@dataclass(frozen=True)
class Published:
    """A finished attempt's output, stored under `prefix` and read back."""

    prefix: str
    files: Sequence[FileEntry]
    metrics: dict[str, Any]


def publish(session: Session, held: Held, output: Published) -> AdapterVersion:
    """Insert the version. In the same transaction the attempt and the job succeed, or nothing has happened."""
    job = held.job
    name = job.suffix or f"{job.model_name.split(':')[1]}-{ids.short(job.id)}"
    made = insert(Adapter).values(id=ids.uuid7(), project_id=job.project_id, name=name)
    session.execute(made.on_conflict_do_nothing(index_elements=["project_id", "name"]))
    named = select(Adapter).where(Adapter.project_id == job.project_id, Adapter.name == name)
    adapter = session.scalars(named).one()
    # two jobs of one suffix may finish together; the lock makes their numbers differ, the constraint proves it
    session.execute(select(func.pg_advisory_xact_lock(func.hashtextextended(str(adapter.id), 0))))
    newest = (
        session.scalar(select(func.max(AdapterVersion.version)).where(AdapterVersion.adapter_id == adapter.id)) or 0
    )
    version = AdapterVersion(
        project_id=job.project_id,
        adapter_id=adapter.id,
        version=newest + 1,
        model_name=job.model_name,
        job_id=job.id,
        attempt_id=held.attempt.id,
        base_model_id=job.base_model_id,
        object_prefix=output.prefix,
        files=[file.model_dump() for file in output.files],
        bytes=sum(file.bytes for file in output.files),
        sha256=next(file.sha256 for file in output.files if file.name == WEIGHTS),
        metrics=output.metrics,
    )
    session.add(version)
    session.flush()
    return version


def page(
    session: Session, project_id: uuid.UUID, *, after: uuid.UUID | None, limit: int
) -> tuple[list[tuple[Adapter, list[AdapterVersion]]], bool]:
    """Adapters newest first with their versions, newest first; and whether there are more."""
    query = select(Adapter).where(Adapter.project_id == project_id, _has_versions())
    query = query.order_by(Adapter.id.desc()).limit(limit + 1)
    if after is not None:
        query = query.where(Adapter.id < after)
    rows = list(session.scalars(query))
    return [(adapter, versions(session, adapter)) for adapter in rows[:limit]], len(rows) > limit


def get(session: Session, project_id: uuid.UUID, name_or_id: str) -> Adapter:
    """By name, by id, or by the name of a model it holds. Raises NotFound."""
    mine = select(Adapter).where(Adapter.project_id == project_id, _has_versions())
    found = session.scalar(mine.where(Adapter.name == name_or_id))
    if found is None and name_or_id.startswith(ids.ADAPTER):
        found = session.scalar(mine.where(Adapter.id == ids.decode(ids.ADAPTER, name_or_id)))
    if found is None and (version := by_model_name(session, project_id, name_or_id)) is not None:
        found = session.get(Adapter, version.adapter_id)
    if found is None:
        raise NotFound(
            f"No adapter '{name_or_id[:80]}' in this project.",
            param="adapter",
            fix="`tunery adapters list` shows them.",
        )
    return found


def versions(session: Session, adapter: Adapter) -> list[AdapterVersion]:
    query = select(AdapterVersion).where(AdapterVersion.adapter_id == adapter.id, _SHOWN)
    return list(session.scalars(query.order_by(AdapterVersion.version.desc())))


def version(session: Session, adapter: Adapter, number: int) -> AdapterVersion:
    """Raises NotFound."""
    mine = (AdapterVersion.adapter_id == adapter.id, AdapterVersion.version == number, _SHOWN)
    query = select(AdapterVersion).where(*mine)
    if (found := session.scalar(query)) is None:
        raise NotFound(f"Adapter '{adapter.name}' has no version {number}.", param="version")
    return found


def by_model_name(session: Session, project_id: uuid.UUID, name: str) -> AdapterVersion | None:
    mine = (AdapterVersion.project_id == project_id, AdapterVersion.model_name == name, _SHOWN)
    return session.scalar(select(AdapterVersion).where(*mine))


def delete(session: Session, project_id: uuid.UUID, model_name: str) -> None:
    """Hide a version and have its files deleted; its number is not given again. Raises NotFound."""
    found = by_model_name(session, project_id, model_name)
    if found is None:
        raise NotFound(f"The model '{model_name[:80]}' does not exist.", param="model", code="model_not_found")
    found.deleted_at = func.now()
    trash.add(session, project_id, (f"{found.object_prefix}/{file['name']}" for file in found.files))


def of_jobs(
    session: Session, project_id: uuid.UUID, job_ids: Sequence[uuid.UUID]
) -> dict[uuid.UUID, tuple[AdapterVersion, str]]:
    """What several jobs published, and their adapters' names."""
    query = (
        select(AdapterVersion, Adapter.name)
        .join(Adapter, Adapter.id == AdapterVersion.adapter_id)
        .where(AdapterVersion.project_id == project_id, AdapterVersion.job_id.in_(job_ids), _SHOWN)
    )
    return {version.job_id: (version, name) for version, name in session.execute(query)}


def tuned_models(session: Session, project_id: uuid.UUID) -> list[AdapterVersion]:
    """Every version of this project, newest first: what `GET /v1/models` lists beside the base models."""
    query = select(AdapterVersion).where(AdapterVersion.project_id == project_id, _SHOWN)
    return list(session.scalars(query.order_by(AdapterVersion.id.desc())))


def _has_versions() -> ColumnElement[bool]:
    """An adapter whose versions were all deleted is only a name that is taken up again by the next one."""
    return select(AdapterVersion.id).where(AdapterVersion.adapter_id == Adapter.id, _SHOWN).exists()
