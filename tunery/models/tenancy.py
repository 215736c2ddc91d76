"""Who there is and what they asked for: organizations, projects, keys, files, datasets, jobs."""

import uuid
from datetime import datetime
from typing import Any

from sqlalchemy import (
    ARRAY,
    BigInteger,
    CheckConstraint,
    DateTime,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    LargeBinary,
    Text,
    UniqueConstraint,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Mapped, mapped_column

from tunery.db import Base
from tunery.models.columns import Created, Id, Json, Moment, one_of, project_key, same_project
from tunery.states import TERMINAL, JobState

_TERMINAL_SQL = ", ".join(f"'{state}'" for state in sorted(TERMINAL))


class _Share:
    """What an organization or a project may have of the GPUs. Rates: GPUs times their class's cost."""

    weight: Mapped[float] = mapped_column(default=1.0, server_default="1")
    """Twice the weight gets twice the share while both have work waiting."""
    guarantee: Mapped[float] = mapped_column(default=0.0, server_default="0")
    """Served before anybody's share is looked at, up to this rate."""
    cap: Mapped[float | None]
    """Rate that is never exceeded; None is no cap."""
    service: Mapped[float] = mapped_column(default=0.0, server_default="0")
    """Cost of ended attempts, less what was refunded; `release_attempt` adds to it. What runs now comes on top."""
    active: Mapped[bool] = mapped_column(default=False, server_default=text("false"))
    """Had something waiting or running at the scheduler's last pass."""


_SHARE_SANE = (
    CheckConstraint("weight > 0", name="weight_positive"),
    CheckConstraint("guarantee >= 0 AND guarantee <= coalesce(cap, 'Infinity')", name="guarantee_below_cap"),
)


class Organization(_Share, Base):
    __tablename__ = "organizations"
    __table_args__ = tuple(check.copy() for check in _SHARE_SANE)

    id: Mapped[Id]
    name: Mapped[str] = mapped_column(Text, unique=True)
    created_at: Mapped[Created]


class Project(_Share, Base):
    """The tenant: keys, files, jobs, adapters and isolation belong to it."""

    __tablename__ = "projects"
    __table_args__ = (
        UniqueConstraint("organization_id", "id"),
        UniqueConstraint("organization_id", "name"),
        one_of("status", ("active", "archived")),
        CheckConstraint("max_storage_bytes >= 0", name="storage_positive"),
        *(check.copy() for check in _SHARE_SANE),
    )

    id: Mapped[Id]
    organization_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("organizations.id"))
    name: Mapped[str]
    status: Mapped[str] = mapped_column(default="active", server_default="active")
    dedicated: Mapped[bool] = mapped_column(default=False, server_default=text("false"))
    """Never shares an engine, not even within its organization."""
    max_storage_bytes: Mapped[int | None] = mapped_column(BigInteger)
    """None: the deployment's default."""
    max_running_jobs: Mapped[int | None]
    """Live attempts at once; None is no limit."""
    blocked: Mapped[str | None]
    """Why the scheduler starts none of its jobs, e.g. its budget; None while it does."""
    created_at: Mapped[Created]


class Member(Base):
    __tablename__ = "members"
    __table_args__ = (
        UniqueConstraint("project_id", "email"),
        one_of("role", ("owner", "member", "reader")),
        ForeignKeyConstraint(["organization_id", "project_id"], ["projects.organization_id", "projects.id"]),
    )

    id: Mapped[Id]
    organization_id: Mapped[uuid.UUID]
    project_id: Mapped[uuid.UUID]
    email: Mapped[str]
    role: Mapped[str]
    created_at: Mapped[Created]


class ApiKey(Base):
    """`lookup` is the public part of a key; of the secret only an HMAC under the server's pepper is kept."""

    __tablename__ = "api_keys"
    __table_args__ = (
        project_key(),
        ForeignKeyConstraint(["organization_id", "project_id"], ["projects.organization_id", "projects.id"]),
    )

    id: Mapped[Id]
    organization_id: Mapped[uuid.UUID]
    project_id: Mapped[uuid.UUID]
    name: Mapped[str]
    lookup: Mapped[str] = mapped_column(unique=True)
    secret_hmac: Mapped[bytes] = mapped_column(LargeBinary)
    scopes: Mapped[list[str]] = mapped_column(ARRAY(Text))
    created_at: Mapped[Created]
    expires_at: Mapped[Moment | None]
    revoked_at: Mapped[Moment | None]
    last_used_at: Mapped[Moment | None]


class AuditEntry(Base):
    """What an admin changed. Programs may add rows and read them; an entry outlives whatever it is about."""

    __tablename__ = "audit_log"

    id: Mapped[Id]
    at: Mapped[Created]
    key_id: Mapped[uuid.UUID]
    key_name: Mapped[str]
    """As it was then; the key of another project cannot be looked up later."""
    key_project_id: Mapped[uuid.UUID]
    action: Mapped[str]
    """`node.drain`, `project.share`, ..."""
    target: Mapped[str]
    """Id or name of what was changed."""
    before: Mapped[dict[str, Any] | None] = mapped_column(JSONB)
    after: Mapped[dict[str, Any] | None] = mapped_column(JSONB)
    request_id: Mapped[str | None]


class File(Base):
    """Bytes as uploaded. A row exists only once its object is complete."""

    __tablename__ = "files"
    __table_args__ = (
        project_key(),
        Index("ix_files_project_created", "project_id", "id", postgresql_where=text("deleted_at IS NULL")),
        CheckConstraint("bytes >= 0", name="bytes_positive"),
    )

    id: Mapped[Id]
    project_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("projects.id"))
    filename: Mapped[str]
    purpose: Mapped[str]
    bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str]
    object_key: Mapped[str] = mapped_column(unique=True)
    created_at: Mapped[Created]
    expires_at: Mapped[Moment | None]
    deleted_at: Mapped[Moment | None]


class Dataset(Base):
    """Checked, normalised rows, addressed by the hash of the bytes they were made from."""

    __tablename__ = "datasets"
    __table_args__ = (
        project_key(),
        UniqueConstraint("project_id", "source_sha256", "checker"),
        CheckConstraint("rows > 0", name="not_empty"),
    )

    id: Mapped[Id]
    project_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("projects.id"))
    source_sha256: Mapped[str]
    checker: Mapped[str]
    """Version of the rules: a newer checker makes a dataset of its own."""
    sha256: Mapped[str]
    object_key: Mapped[str]
    bytes: Mapped[int] = mapped_column(BigInteger)
    rows: Mapped[int]
    shape: Mapped[str]
    max_row_bytes: Mapped[int]
    created_at: Mapped[Created]


class Job(Base):
    __tablename__ = "jobs"
    __table_args__ = (
        project_key(),
        ForeignKeyConstraint(["organization_id", "project_id"], ["projects.organization_id", "projects.id"]),
        same_project("training_file_id", "files"),
        same_project("validation_file_id", "files"),
        same_project("train_dataset_id", "datasets"),
        same_project("validation_dataset_id", "datasets"),
        one_of("state", JobState),
        CheckConstraint(f"(state IN ({_TERMINAL_SQL})) = (finished_at IS NOT NULL)", name="finished_when_terminal"),
        CheckConstraint("(state = 'failed') = (error_code IS NOT NULL)", name="failed_says_why"),
        CheckConstraint("gpus BETWEEN 1 AND 64", name="gpus_sane"),
        CheckConstraint("priority BETWEEN -100 AND 100", name="priority_sane"),
        CheckConstraint("limit_s > 0 AND coalesce(time_limit_s, 1) > 0", name="limits_positive"),
        Index("ix_jobs_project", "project_id", "id"),
        Index("ix_jobs_changed", "changed_in"),
        Index(
            "ix_jobs_waiting",
            "project_id",
            text("urgent DESC"),
            text("priority DESC"),
            "queued_at",
            "id",
            postgresql_where=text("state = 'queued'"),
        ),
        Index("ix_jobs_waiting_class", "gpu_class", "project_id", postgresql_where=text("state = 'queued'")),
        Index("ix_jobs_open", "state", "queued_at", postgresql_where=text(f"state NOT IN ({_TERMINAL_SQL})")),
    )

    id: Mapped[Id]
    organization_id: Mapped[uuid.UUID]
    project_id: Mapped[uuid.UUID]
    base_model_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("base_models.id"))
    model: Mapped[str]
    """The model as the user named it."""
    training_file_id: Mapped[uuid.UUID]
    validation_file_id: Mapped[uuid.UUID | None]
    train_dataset_id: Mapped[uuid.UUID | None]
    validation_dataset_id: Mapped[uuid.UUID | None]
    suffix: Mapped[str | None]
    seed: Mapped[int] = mapped_column(BigInteger)
    user_metadata: Mapped[dict[str, str] | None] = mapped_column(JSONB)
    request: Mapped[Json]
    """`method` and our extension as asked, `auto` included."""
    recipe: Mapped[dict[str, Any] | None] = mapped_column(JSONB)
    """Resolved once the rows are known; a `contracts.spec.Recipe`."""
    hyperparameters: Mapped[dict[str, Any]] = mapped_column(JSONB)
    """OpenAI's view: `auto` until resolved, numbers after."""
    model_name: Mapped[str]
    """The name the result will have: `ft:base:org:suffix:id`."""
    gpus: Mapped[int] = mapped_column(default=1)
    required_bytes: Mapped[int | None] = mapped_column(BigInteger)
    """Memory to reserve on each GPU: the estimate, corrected, with its margin. Known once the rows are."""
    estimated_bytes: Mapped[int | None] = mapped_column(BigInteger)
    """The bare estimate on each GPU: what measurements are compared with."""
    estimated_tokens: Mapped[int | None] = mapped_column(BigInteger)
    """Of the whole training, all epochs."""
    memory_faults: Mapped[int] = mapped_column(default=0, server_default="0")
    """Attempts that ran out of memory."""
    priority: Mapped[int] = mapped_column(default=0, server_default="0")
    """Among its own project's jobs; higher first."""
    urgent: Mapped[bool] = mapped_column(default=False, server_default=text("false"))
    """Before every project's jobs: operators only."""
    time_limit_s: Mapped[float | None]
    """As the user asked. None: a default that doubles when it is reached."""
    limit_s: Mapped[float] = mapped_column(default=1800.0, server_default="1800")
    """Time that it may hold its GPUs, all attempts together, lost work not counted."""
    used_s: Mapped[float] = mapped_column(default=0.0, server_default="0")
    """Of that, used by ended attempts."""
    gpu_class: Mapped[str | None]
    """Only on GPUs of this class; None is any."""
    node_labels: Mapped[dict[str, str]] = mapped_column(JSONB, default=dict, server_default="{}")
    """Only on nodes that have all of these labels."""
    shareable: Mapped[bool] = mapped_column(default=False, server_default=text("false"))
    """May run beside other shareable jobs of its project on one GPU."""
    preemptible: Mapped[bool] = mapped_column(default=True, server_default=text("true"))
    engine_key: Mapped[str | None]
    """Jobs with equal keys may train over one resident base model."""
    engine_bytes: Mapped[int | None] = mapped_column(BigInteger)
    """Its own bytes there, the base not counted."""
    changed_in: Mapped[int] = mapped_column(BigInteger, default=0, server_default="0")
    """Transaction that last changed what the scheduler looks at; a trigger writes it."""

    state: Mapped[str] = mapped_column(default=JobState.VALIDATING)
    error_code: Mapped[str | None]
    error_message: Mapped[str | None]
    error_param: Mapped[str | None]
    wait_reason: Mapped[str | None]
    fence: Mapped[int] = mapped_column(BigInteger, default=0)
    """Fence of the newest attempt; a write that carries a lower one is refused."""
    faults_without_progress: Mapped[int] = mapped_column(default=0)
    fault_step: Mapped[int] = mapped_column(BigInteger, default=0)
    """Newest checkpoint at the last platform fault; a newer one resets the count."""
    event_seq: Mapped[int] = mapped_column(BigInteger, default=0)
    progress: Mapped[dict[str, Any] | None] = mapped_column(JSONB)
    """The newest numbers, denormalised: step, total_steps, loss, tokens_per_second ..."""
    trained_tokens: Mapped[int | None] = mapped_column(BigInteger)
    platform: Mapped[Json]
    """Tunery's version, lock hash and image at submission: what a run is reproduced from."""
    traceparent: Mapped[str | None]
    """W3C: the span that submitted it. Everything done for the job joins that trace."""

    created_at: Mapped[Created]
    queued_at: Mapped[datetime] = mapped_column(DateTime(timezone=True), server_default=func.now())
    """Original submission: a job that returns to the queue keeps its place."""
    started_at: Mapped[Moment | None]
    finished_at: Mapped[Moment | None]
    deleted_at: Mapped[Moment | None]
    """The row stays for what was published and what was used; nobody is shown it."""
