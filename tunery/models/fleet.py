"""Where work runs: nodes, GPUs, attempts and what they hold, tasks, the outbox, the leader."""

import uuid
from decimal import Decimal
from typing import Any

from sqlalchemy import (
    ARRAY,
    BigInteger,
    CheckConstraint,
    ForeignKey,
    ForeignKeyConstraint,
    Identity,
    Index,
    LargeBinary,
    Numeric,
    Sequence,
    UniqueConstraint,
    Uuid,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Mapped, mapped_column

from tunery.db import Base
from tunery.models.columns import Created, Id, Json, Moment, one_of, project_key, same_project
from tunery.states import ENDED_ATTEMPT, LIVE_ATTEMPT, AttemptState

fence_seq = Sequence("fence_seq", metadata=Base.metadata)
"""Global and strictly increasing: a later attempt or task lease always has a higher number."""

_LIVE_SQL = ", ".join(f"'{state}'" for state in sorted(LIVE_ATTEMPT))
_ENDED_SQL = ", ".join(f"'{state}'" for state in sorted(ENDED_ATTEMPT))


class Node(Base):
    __tablename__ = "nodes"
    __table_args__ = (
        one_of("state", ("up", "cordoned", "draining", "down")),
        Index("ix_nodes_name_in_use", "name", unique=True, postgresql_where=text("removed_at IS NULL")),
    )

    id: Mapped[Id]
    name: Mapped[str]
    boot_id: Mapped[uuid.UUID]
    """New at every start of the node process."""
    state: Mapped[str] = mapped_column(default="up")
    task_slots: Mapped[int]
    version: Mapped[str]
    info: Mapped[Json]
    labels: Mapped[dict[str, str]] = mapped_column(JSONB, default=dict, server_default="{}")
    """What jobs may ask for, `rack=b`: the node's own (`info`), with the operator's over them."""
    operator_labels: Mapped[dict[str, str | None]] = mapped_column(JSONB, default=dict, server_default="{}")
    """None takes one of the node's own away."""
    registered_at: Mapped[Created]
    last_seen_at: Mapped[Moment] = mapped_column(server_default=text("now()"))
    removed_at: Mapped[Moment | None]
    """Set once and for good: a machine that comes back joins anew, as another node."""


class NodeCredentials(Base):
    """A joined node's own logins. Its database role is named after its id; of its Redis password the hash is kept."""

    __tablename__ = "node_credentials"

    node_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("nodes.id"), primary_key=True)
    redis_sha256: Mapped[str | None]
    """None: the Redis server takes no ACL users, and the node works by polling."""
    created_at: Mapped[Created]
    revoked_at: Mapped[Moment | None]


class JoinToken(Base):
    """Admits one node, once. Only an HMAC of its text is kept; who made it and what it admitted stays on record."""

    __tablename__ = "join_tokens"
    __table_args__ = (CheckConstraint("(used_at IS NULL) = (node_id IS NULL)", name="used_by_a_node"),)

    id: Mapped[Id]
    token_hmac: Mapped[bytes] = mapped_column(LargeBinary, unique=True)
    created_by: Mapped[uuid.UUID] = mapped_column(ForeignKey("api_keys.id"))
    created_at: Mapped[Created]
    expires_at: Mapped[Moment]
    used_at: Mapped[Moment | None]
    node_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("nodes.id"))


class Gpu(Base):
    """A device an attempt can train on; a host without GPUs has one honest `cpu` device."""

    __tablename__ = "gpus"
    __table_args__ = (
        UniqueConstraint("node_id", "uuid"),
        one_of("kind", ("cuda", "cpu")),
        one_of("state", ("healthy", "unhealthy", "dirty", "absent")),
        CheckConstraint("reserved_bytes BETWEEN 0 AND usable_bytes", name="not_overcommitted"),
    )

    id: Mapped[Id]
    node_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("nodes.id"))
    uuid: Mapped[str]
    """The driver's UUID, or `cpu`."""
    index: Mapped[int]
    kind: Mapped[str]
    name: Mapped[str]
    total_bytes: Mapped[int] = mapped_column(BigInteger)
    usable_bytes: Mapped[int] = mapped_column(BigInteger)
    reserved_bytes: Mapped[int] = mapped_column(BigInteger, default=0, server_default="0")
    """Kept by a trigger on `allocations`; nobody else writes it."""
    state: Mapped[str] = mapped_column(default="healthy")
    gpu_class: Mapped[str] = mapped_column(default="unclassified", server_default="unclassified")
    """`h100-80gb`: what has one cost and one price, and what a job may ask for."""


class GpuClass(Base):
    """What a second on such a GPU costs: in fair share, and in money."""

    __tablename__ = "gpu_classes"
    __table_args__ = (
        CheckConstraint("cost > 0", name="cost_positive"),
        CheckConstraint("price_per_hour >= 0", name="price_positive"),
    )

    name: Mapped[str] = mapped_column(primary_key=True)
    cost: Mapped[float] = mapped_column(default=1.0, server_default="1")
    price_per_hour: Mapped[Decimal | None] = mapped_column(Numeric(12, 4))
    """None: no price list; usage is counted in GPU-hours alone."""


class Slot(Base):
    """Room for one attempt on a node."""

    __tablename__ = "slots"

    node_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("nodes.id"), primary_key=True)
    no: Mapped[int] = mapped_column(primary_key=True)
    attempt_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("attempts.id"), unique=True)


class Engine(Base):
    """A trainer process that holds one base model and trains many jobs of one organization over it."""

    __tablename__ = "engines"
    __table_args__ = (
        one_of("state", ("starting", "up", "down")),
        UniqueConstraint("node_id", "id"),
    )

    id: Mapped[Id]
    organization_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("organizations.id"))
    node_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("nodes.id"))
    base_model_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("base_models.id"))
    precision: Mapped[str]
    socket: Mapped[str]
    """Path of the unix socket on its node where it takes attempts."""
    state: Mapped[str] = mapped_column(default="starting")
    created_at: Mapped[Created]


class Attempt(Base):
    """One try at running a job. At most one of a job's attempts is live."""

    __tablename__ = "attempts"
    __table_args__ = (
        project_key(),
        UniqueConstraint("project_id", "job_id", "no"),
        same_project("job_id", "jobs"),
        same_project("resume_checkpoint_id", "checkpoints", use_alter=True),
        ForeignKeyConstraint(["node_id", "engine_id"], ["engines.node_id", "engines.id"]),
        one_of("state", AttemptState),
        CheckConstraint(f"(state IN ({_ENDED_SQL})) = (ended_at IS NOT NULL)", name="ended_when_over"),
        CheckConstraint(
            "(state IN ('claimed', 'running', 'stopping', 'publishing')) = (lease_expires_at IS NOT NULL)",
            name="leased_when_held",
        ),
        Index("one_live_attempt", "job_id", unique=True, postgresql_where=text(f"state IN ({_LIVE_SQL})")),
        Index("ix_attempts_node_live", "node_id", "state", postgresql_where=text(f"state IN ({_LIVE_SQL})")),
        Index("ix_attempts_job", "job_id", "no"),
        Index("ix_attempts_preempted", "preempted_at", postgresql_where=text("preempted_at IS NOT NULL")),
        Index("ix_attempts_succeeded", "ended_at", postgresql_where=text("state = 'succeeded'")),
    )

    id: Mapped[Id]
    project_id: Mapped[uuid.UUID]
    job_id: Mapped[uuid.UUID]
    no: Mapped[int]
    fence: Mapped[int] = mapped_column(BigInteger, fence_seq, server_default=fence_seq.next_value(), unique=True)
    state: Mapped[str] = mapped_column(default=AttemptState.ASSIGNED)
    node_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("nodes.id"))
    engine_id: Mapped[uuid.UUID | None]
    claimed_by: Mapped[str | None]
    """Which supervisor holds it: host, pid and a nonce."""
    lease_expires_at: Mapped[Moment | None]
    stop_reason: Mapped[str | None]
    """Asked of the supervisor; rides on the reply to a renewal."""
    stop_by: Mapped[Moment | None]
    """The trainer is killed then, whatever it is doing."""
    limit_s: Mapped[float] = mapped_column(default=1800.0, server_default="1800")
    """It is asked to stop so long after its assignment."""
    rate: Mapped[float] = mapped_column(default=1.0, server_default="1")
    """Cost of a second of it, in fair share."""
    preempted_at: Mapped[Moment | None]
    preempted_for: Mapped[uuid.UUID | None]
    """The job that its GPUs go to."""
    preempted_for_project: Mapped[uuid.UUID | None]
    fault: Mapped[str | None]
    """Whose fault its end was, `user` or `platform`; decides what of its time is charged."""
    resume_checkpoint_id: Mapped[uuid.UUID | None]
    start_step: Mapped[int] = mapped_column(BigInteger, default=0)
    last_event_seq: Mapped[int] = mapped_column(BigInteger, default=0)
    """Highest trainer event stored: a batch sent twice is stored once."""
    details: Mapped[dict[str, Any] | None] = mapped_column(JSONB)
    """What the trainer said of itself: device, precision, parameters, versions, peak memory."""
    failure_code: Mapped[str | None]
    failure_message: Mapped[str | None]
    log_bytes: Mapped[int] = mapped_column(BigInteger, default=0)
    logs_deleted_at: Mapped[Moment | None]
    traceparent: Mapped[str | None]
    """W3C: the span that assigned it; parent of everything its supervisor does."""
    assigned_at: Mapped[Created]
    claimed_at: Mapped[Moment | None]
    started_at: Mapped[Moment | None]
    first_step_at: Mapped[Moment | None]
    """Loading was over, training began."""
    ended_at: Mapped[Moment | None]


class AttemptNode(Base):
    """An attempt may span nodes; rank 0's node supervises it."""

    __tablename__ = "attempt_nodes"
    __table_args__ = (same_project("attempt_id", "attempts"),)

    attempt_id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    rank: Mapped[int] = mapped_column(primary_key=True)
    project_id: Mapped[uuid.UUID]
    node_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("nodes.id"))


class Allocation(Base):
    """GPU memory that an attempt or an engine holds. Insert and release move `gpus.reserved_bytes`."""

    __tablename__ = "allocations"
    __table_args__ = (
        CheckConstraint("num_nonnulls(owner_attempt, owner_engine) = 1", name="one_owner"),
        CheckConstraint("bytes >= 0", name="bytes_positive"),
        Index("ix_allocations_held", "gpu_id", postgresql_where=text("released_at IS NULL")),
        Index("ix_allocations_owner", "owner_attempt"),
    )

    id: Mapped[Id]
    gpu_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("gpus.id"))
    owner_attempt: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("attempts.id"))
    owner_engine: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("engines.id"))
    exclusive: Mapped[bool]
    bytes: Mapped[int] = mapped_column(BigInteger)
    """An exclusive allocation holds all usable bytes, whatever it was asked for."""
    created_at: Mapped[Created]
    released_at: Mapped[Moment | None]


class Task(Base):
    """CPU work (data checks, model imports): leased and fenced like an attempt, run on a node's task slots."""

    __tablename__ = "tasks"
    __table_args__ = (
        one_of("state", ("queued", "leased", "succeeded", "failed", "cancelled")),
        same_project("job_id", "jobs"),
        CheckConstraint("(state = 'leased') = (lease_expires_at IS NOT NULL)", name="leased_when_held"),
        Index("ix_tasks_open", "id", postgresql_where=text("state IN ('queued', 'leased')")),
    )

    id: Mapped[Id]
    project_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("projects.id"))
    """Who asked for it."""
    kind: Mapped[str]
    payload: Mapped[Json]
    job_id: Mapped[uuid.UUID | None]
    base_model_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("base_models.id"))
    state: Mapped[str] = mapped_column(default="queued")
    fence: Mapped[int] = mapped_column(BigInteger, default=0)
    tries: Mapped[int] = mapped_column(default=0)
    node_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("nodes.id"))
    lease_expires_at: Mapped[Moment | None]
    not_before: Mapped[Moment] = mapped_column(server_default=text("now()"))
    error: Mapped[str | None]
    created_at: Mapped[Created]
    finished_at: Mapped[Moment | None]


class Outbox(Base):
    """Messages that leave after their transaction has committed; the relay sends and marks them."""

    __tablename__ = "outbox"
    __table_args__ = (Index("ix_outbox_unsent", "id", postgresql_where=text("published_at IS NULL")),)

    id: Mapped[int] = mapped_column(BigInteger, Identity(always=True), primary_key=True)
    project_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("projects.id"))
    topic: Mapped[str]
    payload: Mapped[Json]
    created_at: Mapped[Created]
    published_at: Mapped[Moment | None]


class ObjectDeletion(Base):
    """An object that no row refers to any more. Written with the tombstone, gone with the object."""

    __tablename__ = "object_deletions"

    id: Mapped[int] = mapped_column(BigInteger, Identity(always=True), primary_key=True)
    project_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("projects.id"))
    key: Mapped[str]
    """One that ends in a slash means everything below it."""
    created_at: Mapped[Created]


class DeletionHold(Base):
    """While one of these lives, nothing is deleted from the store: a backup is copying what its dump refers to."""

    __tablename__ = "deletion_holds"

    holder: Mapped[str] = mapped_column(primary_key=True)
    expires_at: Mapped[Moment]


class Usage(Base):
    """What an attempt held and for how long, once it is over. One row an attempt and GPU."""

    __tablename__ = "usage"
    __table_args__ = (
        UniqueConstraint("attempt_id", "gpu_id"),
        same_project("attempt_id", "attempts"),
        same_project("job_id", "jobs"),
        ForeignKeyConstraint(["organization_id", "project_id"], ["projects.organization_id", "projects.id"]),
        Index("ix_usage_project_created", "project_id", "created_at"),
        Index("ix_usage_job", "job_id"),
    )

    id: Mapped[Id]
    organization_id: Mapped[uuid.UUID]
    project_id: Mapped[uuid.UUID]
    job_id: Mapped[uuid.UUID]
    attempt_id: Mapped[uuid.UUID]
    gpu_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("gpus.id"))
    gpu_class: Mapped[str]
    share: Mapped[float] = mapped_column(default=1.0, server_default="1")
    """Of the device's memory: 1 unless the attempt shared it. Every second here counts so much."""
    price_per_hour: Mapped[Decimal | None] = mapped_column(Numeric(12, 4))
    """Its class's price when it ended; later price lists change nothing."""
    gpu_seconds: Mapped[float]
    """Held in all; the four below add up to it. Older rows have zeros there."""
    loading_s: Mapped[float] = mapped_column(default=0.0, server_default="0")
    productive_s: Mapped[float] = mapped_column(default=0.0, server_default="0")
    user_fault_s: Mapped[float] = mapped_column(default=0.0, server_default="0")
    platform_fault_s: Mapped[float] = mapped_column(default=0.0, server_default="0")
    """Lost through us, or through a pre-emption: not charged."""
    created_at: Mapped[Created]


class Hold(Base):
    """GPUs kept for a waiting job, from one pass of the scheduler to the next."""

    __tablename__ = "holds"
    __table_args__ = (same_project("job_id", "jobs"), one_of("kind", ("gang", "preemption")))

    job_id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    project_id: Mapped[uuid.UUID]
    kind: Mapped[str]
    gpu_class: Mapped[str]
    node_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("nodes.id"))
    gpu_ids: Mapped[list[uuid.UUID]] = mapped_column(ARRAY(Uuid))
    promised_at: Mapped[Moment]
    created_at: Mapped[Created]


class QueueView(Base):
    """What one project is told of its queue: why its jobs wait, and when they will start."""

    __tablename__ = "queue_views"

    project_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("projects.id"), primary_key=True)
    reasons: Mapped[dict[str, Any]] = mapped_column(JSONB, default=dict, server_default="{}")
    reasons_at: Mapped[Moment | None]
    forecast: Mapped[dict[str, Any]] = mapped_column(JSONB, default=dict, server_default="{}")
    forecast_at: Mapped[Moment | None]


class QueueQuestion(Base):
    """What would become of a job that has not been submitted; the scheduler answers."""

    __tablename__ = "queue_questions"
    __table_args__ = (Index("ix_queue_questions_created_at", "created_at"),)

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    project_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("projects.id"))
    asked: Mapped[dict[str, Any]] = mapped_column(JSONB)
    created_at: Mapped[Created]
    answer: Mapped[dict[str, Any] | None] = mapped_column(JSONB)
    answered_at: Mapped[Moment | None]


class RunObservation(Base):
    """What one attempt really took: estimates of memory and of time learn from it."""

    __tablename__ = "run_observations"
    __table_args__ = (
        same_project("attempt_id", "attempts"),
        Index("ix_run_observations_base", "base_model_id", "gpu_class", "created_at"),
        Index("ix_run_observations_recent", "created_at"),
    )

    attempt_id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    project_id: Mapped[uuid.UUID]
    job_id: Mapped[uuid.UUID]
    base_model_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("base_models.id"))
    gpu_class: Mapped[str]
    gpus: Mapped[int]
    method: Mapped[str]
    outcome: Mapped[str]
    """`succeeded`, or the failure code."""
    estimated_bytes: Mapped[int] = mapped_column(BigInteger)
    peak_bytes: Mapped[int] = mapped_column(BigInteger)
    tokens: Mapped[int] = mapped_column(BigInteger)
    load_s: Mapped[float]
    train_s: Mapped[float]
    created_at: Mapped[Created]


class Leader(Base):
    """One row: who decides. Each decision reads it FOR SHARE with its own epoch."""

    __tablename__ = "leader"
    __table_args__ = (CheckConstraint("id = 1", name="one_row"),)

    id: Mapped[int] = mapped_column(primary_key=True, default=1)
    holder: Mapped[str]
    epoch: Mapped[int] = mapped_column(BigInteger)
    expires_at: Mapped[Moment]
    swept_at: Mapped[Moment]
    """Last time leases were looked at: time in which nobody looked counts against nobody."""
