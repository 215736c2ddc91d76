"""What work leaves behind: base models, checkpoints, adapters, events, metrics."""

import uuid
from typing import Any

from sqlalchemy import (
    ARRAY,
    BigInteger,
    CheckConstraint,
    Double,
    ForeignKey,
    Identity,
    Index,
    UniqueConstraint,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Mapped, mapped_column

from tunery.db import Base
from tunery.models.columns import Created, Id, Json, Moment, one_of, project_key, same_project


class BaseModel(Base):
    """An entry of the catalogue, the deployment's own: every project may train on it."""

    __tablename__ = "base_models"
    __table_args__ = (
        one_of("state", ("importing", "ready", "failed")),
        CheckConstraint("(state = 'ready') = (object_prefix IS NOT NULL)", name="ready_has_files"),
    )

    id: Mapped[Id]
    name: Mapped[str] = mapped_column(unique=True)
    state: Mapped[str] = mapped_column(default="importing")
    request: Mapped[Json]
    hub_id: Mapped[str | None]
    revision: Mapped[str | None]
    source: Mapped[str | None]
    license: Mapped[str | None]
    parameters: Mapped[int | None] = mapped_column(BigInteger)
    bytes: Mapped[int | None] = mapped_column(BigInteger)
    card: Mapped[dict[str, Any] | None] = mapped_column(JSONB)
    """Shape (layers, widths, vocabulary) and files (name, bytes, sha256), as the import wrote them."""
    object_prefix: Mapped[str | None]
    error: Mapped[str | None]
    created_at: Mapped[Created]


class Checkpoint(Base):
    """A complete, hashed, resumable state of a job at a step. The hashes here are checked before any load."""

    __tablename__ = "checkpoints"
    __table_args__ = (
        project_key(),
        # a damaged one that was discarded does not stand in the way of the same step, trained again
        Index("one_checkpoint_a_step", "job_id", "step", unique=True, postgresql_where=text("deleted_at IS NULL")),
        same_project("job_id", "jobs"),
        same_project("attempt_id", "attempts"),
        Index("ix_checkpoints_attempt", "attempt_id", "created_at"),
    )

    id: Mapped[Id]
    project_id: Mapped[uuid.UUID]
    job_id: Mapped[uuid.UUID]
    attempt_id: Mapped[uuid.UUID]
    step: Mapped[int] = mapped_column(BigInteger)
    object_prefix: Mapped[str]
    files: Mapped[list[dict[str, Any]]] = mapped_column(JSONB)
    bytes: Mapped[int] = mapped_column(BigInteger)
    metrics: Mapped[Json]
    created_at: Mapped[Created]
    deleted_at: Mapped[Moment | None]
    state_deleted_at: Mapped[Moment | None]
    """From then on only the user's result is left in `files`: no attempt can continue from here."""


RESUMABLE = (Checkpoint.deleted_at.is_(None), Checkpoint.state_deleted_at.is_(None))


class Adapter(Base):
    __tablename__ = "adapters"
    __table_args__ = (project_key(), UniqueConstraint("project_id", "name"))

    id: Mapped[Id]
    project_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("projects.id"))
    name: Mapped[str]
    created_at: Mapped[Created]


class AdapterVersion(Base):
    """An immutable published result. The row is the publication: no role may change it, only hide it."""

    __tablename__ = "adapter_versions"
    __table_args__ = (
        project_key(),
        UniqueConstraint("job_id"),  # at most one version a job, whatever its attempts did
        UniqueConstraint("adapter_id", "version"),
        UniqueConstraint("project_id", "model_name"),
        same_project("adapter_id", "adapters"),
        same_project("job_id", "jobs"),
        same_project("attempt_id", "attempts"),
    )

    id: Mapped[Id]
    project_id: Mapped[uuid.UUID]
    adapter_id: Mapped[uuid.UUID]
    version: Mapped[int]
    model_name: Mapped[str]
    job_id: Mapped[uuid.UUID]
    attempt_id: Mapped[uuid.UUID]
    base_model_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("base_models.id"))
    object_prefix: Mapped[str]
    files: Mapped[list[dict[str, Any]]] = mapped_column(JSONB)
    bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str]
    """Of the weights file."""
    metrics: Mapped[Json]
    created_at: Mapped[Created]
    deleted_at: Mapped[Moment | None]


class Event(Base):
    __tablename__ = "events"
    __table_args__ = (same_project("job_id", "jobs"), one_of("level", ("info", "warn", "error")))

    project_id: Mapped[uuid.UUID]
    job_id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    seq: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    """Given by Postgres from `jobs.event_seq`: the only durable order."""
    id: Mapped[uuid.UUID] = mapped_column(unique=True)
    level: Mapped[str] = mapped_column(default="info")
    type: Mapped[str] = mapped_column(default="message")
    message: Mapped[str]
    data: Mapped[dict[str, Any] | None] = mapped_column(JSONB)
    created_at: Mapped[Created]


class MetricSeries(Base):
    __tablename__ = "metric_series"
    __table_args__ = (UniqueConstraint("job_id", "name"), same_project("job_id", "jobs"), project_key())

    id: Mapped[int] = mapped_column(BigInteger, Identity(always=True), primary_key=True)
    project_id: Mapped[uuid.UUID]
    job_id: Mapped[uuid.UUID]
    name: Mapped[str]


class MetricChunk(Base):
    """A run of points of one series: 16 bytes a point where a row each would take 84 (measured)."""

    __tablename__ = "metric_chunks"
    __table_args__ = (
        same_project("series_id", "metric_series"),
        Index("ix_metric_chunks_project", "project_id", "series_id", text("first_step")),
    )

    project_id: Mapped[uuid.UUID]
    series_id: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    attempt_no: Mapped[int] = mapped_column(primary_key=True)
    first_step: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    steps: Mapped[list[int]] = mapped_column(ARRAY(BigInteger))
    vals: Mapped[list[float]] = mapped_column(ARRAY(Double))
    at: Mapped[Created]
