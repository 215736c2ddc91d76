"""The scheduler's SQL: leadership, the snapshot, applying decisions, and finding what went silent."""

import uuid
from collections import Counter, defaultdict
from collections.abc import Iterable
from datetime import timedelta

import structlog
from sqlalchemy import func, select, text, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from tunery import ids, outbox, waiting
from tunery.contracts.scheduling import GpuView, JobView, NodeView, Plan, Snapshot, Start, Wait
from tunery.models import (
    RESUMABLE,
    Allocation,
    Attempt,
    AttemptNode,
    Checkpoint,
    Gpu,
    Job,
    Leader,
    Node,
    Project,
    Slot,
    Task,
)
from tunery.states import LEASED_ATTEMPT, LIVE_ATTEMPT, TERMINAL, AttemptState, JobState
from tunery.telemetry import tracing

log = structlog.get_logger(__name__)


class Deposed(Exception):
    """Another scheduler leads now; nothing of this transaction may stand."""


class NodeFull(Exception):
    """The node has no free slot after all."""


# ---- leadership -------------------------------------------------------------------------------------------


def lead(session: Session, holder: str, ttl_s: float) -> int | None:
    """Become or stay the leader. Returns the epoch, or None while another leads.

    A row with an expiry, not an advisory lock: a SIGSTOPped leader keeps its lock, and its late writes would count.
    """
    row = session.scalar(select(Leader).where(Leader.id == 1).with_for_update())
    if row is None:
        # two first schedulers may meet here; the second finds the row on its next try
        inserted = session.execute(
            text(
                "INSERT INTO leader (id, holder, epoch, expires_at, swept_at) "
                "VALUES (1, :holder, 1, now() + make_interval(secs => :ttl), now()) "
                "ON CONFLICT DO NOTHING RETURNING epoch"
            ),
            {"holder": holder, "ttl": ttl_s},
        ).first()
        return inserted.epoch if inserted else None
    mine = row.holder == holder
    if not mine and not session.scalar(select(Leader.expires_at < func.now()).where(Leader.id == 1)):
        return None
    if not mine:
        row.holder, row.epoch = holder, row.epoch + 1
    row.expires_at = func.now() + timedelta(seconds=ttl_s)
    return row.epoch


def resign(session: Session, holder: str) -> None:
    """Let the next scheduler start at once."""
    session.execute(update(Leader).where(Leader.id == 1, Leader.holder == holder).values(expires_at=func.now()))


def assert_leader(session: Session, epoch: int) -> None:
    """Bind this transaction to our leadership: nobody can take over before it ends. Raises Deposed."""
    query = select(Leader.id).where(Leader.id == 1, Leader.epoch == epoch, Leader.expires_at > func.now())
    if session.scalar(query.with_for_update(read=True)) is None:
        raise Deposed


def live_nodes(session: Session, silent_after_s: float) -> list[uuid.UUID]:
    """Nodes that spoke lately."""
    heard = Node.last_seen_at > func.now() - timedelta(seconds=silent_after_s)
    return list(session.scalars(select(Node.id).where(heard)))


# ---- deciding -----------------------------------------------------------------------------------------------


def snapshot(session: Session, silent_after_s: float) -> Snapshot:
    """Everything the policy looks at: waiting jobs without a live attempt, nodes that spoke lately."""
    live = select(Attempt.id).where(Attempt.job_id == Job.id, Attempt.state.in_(LIVE_ATTEMPT)).exists()
    waiting = (
        select(Job.id, Job.organization_id, Job.project_id, Job.queued_at, Job.gpus, Job.required_bytes)
        .where(Job.state == JobState.QUEUED, ~live)
        .order_by(Job.queued_at, Job.id)
    )
    jobs = tuple(
        JobView(
            row.id, row.organization_id, row.project_id, row.queued_at.timestamp(), row.gpus, row.required_bytes or 0
        )
        for row in session.execute(waiting)
    )
    return Snapshot(jobs, tuple(_nodes(session, silent_after_s)) if jobs else ())


def _nodes(session: Session, silent_after_s: float) -> Iterable[NodeView]:
    heard = Node.last_seen_at > func.now() - timedelta(seconds=silent_after_s)
    has_room = Node.info["disk_full"].as_boolean().is_not(True)
    usable = select(Node.id, Node.name).where(Node.state == "up", heard, has_room)
    nodes = session.execute(usable.order_by(Node.name)).all()
    gpus: dict[uuid.UUID, list[GpuView]] = defaultdict(list)
    for gpu in session.scalars(select(Gpu).where(Gpu.state == "healthy").order_by(Gpu.node_id, Gpu.index)):
        free = gpu.usable_bytes - gpu.reserved_bytes
        gpus[gpu.node_id].append(GpuView(gpu.id, gpu.node_id, gpu.name, gpu.kind, gpu.usable_bytes, free))
    slots = Counter(session.scalars(select(Slot.node_id).where(Slot.attempt_id.is_(None))))
    return (NodeView(node.id, node.name, slots[node.id], tuple(gpus[node.id])) for node in nodes)


def apply(session: Session, epoch: int, plan: Plan) -> list[uuid.UUID]:
    """Carry a plan out in this transaction; returns the attempts that were assigned.

    Each start has a savepoint: one that the schema refuses, because the world moved on, costs only itself.
    """
    assert_leader(session, epoch)
    assigned: list[uuid.UUID] = []
    for start in plan.starts:
        try:
            with session.begin_nested():
                attempt_id = assign(session, start)
        except (NodeFull, IntegrityError) as refused:
            log.warning("decision refused by the schema", job=ids.encode(ids.JOB, start.job_id), error=str(refused))
            continue
        if attempt_id is not None:
            assigned.append(attempt_id)
    for wait in plan.waits:
        _explain(session, wait)
    return assigned


def assign(session: Session, start: Start) -> uuid.UUID | None:
    """Make the attempt, its allocations and the message to its node. None if the job no longer waits."""
    job = session.scalar(select(Job).where(Job.id == start.job_id, Job.state == JobState.QUEUED).with_for_update())
    if job is None:
        return None
    newest = select(Checkpoint).where(Checkpoint.job_id == job.id, *RESUMABLE)
    checkpoint = session.scalar(newest.order_by(Checkpoint.step.desc()).limit(1))
    last_no = session.scalar(select(func.max(Attempt.no)).where(Attempt.job_id == job.id)) or 0
    span = _assign_span(session, job, last_no)
    attempt = Attempt(
        project_id=job.project_id,
        job_id=job.id,
        no=last_no + 1,
        node_id=start.node_id,
        engine_id=start.engine_id,
        resume_checkpoint_id=checkpoint.id if checkpoint else None,
        start_step=checkpoint.step if checkpoint else 0,
        traceparent=span.traceparent or job.traceparent,
    )
    session.add(attempt)
    session.flush()
    job.fence = attempt.fence
    job.wait_reason = None
    session.add(AttemptNode(attempt_id=attempt.id, rank=0, project_id=job.project_id, node_id=start.node_id))
    session.execute(select(Gpu.id).where(Gpu.id.in_(start.gpu_ids)).order_by(Gpu.id).with_for_update(key_share=True))
    for gpu_id in sorted(start.gpu_ids):
        held = Allocation(gpu_id=gpu_id, owner_attempt=attempt.id, bytes=start.bytes_per_gpu)
        held.exclusive = start.exclusive
        session.add(held)
    slot = select(Slot).where(Slot.node_id == start.node_id, Slot.attempt_id.is_(None)).order_by(Slot.no).limit(1)
    if (free := session.scalar(slot.with_for_update(skip_locked=True))) is None:
        raise NodeFull(str(start.node_id))
    free.attempt_id = attempt.id
    outbox.send(
        session,
        outbox.RING_NODE,
        job.project_id,
        {"node_id": str(start.node_id), "attempt_id": str(attempt.id), "traceparent": attempt.traceparent},
    )
    session.flush()
    span.note({"tunery.attempt.id": str(attempt.id), "tunery.node.id": str(start.node_id)})
    span.end()
    log.info(
        "attempt assigned",
        job=ids.encode(ids.JOB, job.id),
        project=ids.encode(ids.PROJECT, job.project_id),
        attempt=str(attempt.id),
        no=attempt.no,
        fence=attempt.fence,
        node=str(start.node_id),
        trace_id=tracing.trace_id(attempt.traceparent),
    )
    return attempt.id


def _assign_span(session: Session, job: Job, last_no: int) -> tracing.Span:
    """The time that the job has waited, in the trace of its submission; a later attempt points at the one before."""
    if not tracing.on():
        return tracing.Span(None)
    ended = session.execute(
        select(Attempt.traceparent, Attempt.ended_at).where(Attempt.job_id == job.id, Attempt.no == last_no)
    ).one_or_none()
    since = ended.ended_at if ended is not None and ended.ended_at else job.queued_at
    return tracing.start(
        "tunery.job.queue",
        parent=job.traceparent,
        links=[ended.traceparent] if ended is not None else [],
        kind="producer",
        at=since.timestamp(),
        attributes={"tunery.job.id": ids.encode(ids.JOB, job.id), "tunery.attempt": last_no + 1},
    )


def _explain(session: Session, wait: Wait) -> None:
    reason = waiting.message(wait.reason)
    changed = (Job.id == wait.job_id, Job.state == JobState.QUEUED, Job.wait_reason.is_distinct_from(reason))
    session.execute(update(Job).where(*changed).values(wait_reason=reason))


def live_attempts(session: Session) -> list[uuid.UUID]:
    """Every attempt that has not ended."""
    return list(session.scalars(select(Attempt.id).where(Attempt.state.in_(LIVE_ATTEMPT))))


# ---- what went silent -------------------------------------------------------------------------------------------


def forgive_outage(session: Session, epoch: int, longer_than_s: float, lease_s: float) -> bool:
    """Time in which no scheduler looked counts against no lease: after such a gap every clock starts anew."""
    assert_leader(session, epoch)
    gap = select(Leader.swept_at < func.now() - timedelta(seconds=longer_than_s)).where(Leader.id == 1)
    if forgiven := bool(session.scalar(gap)):
        fresh = func.now() + timedelta(seconds=lease_s)
        held = Attempt.state.in_(LEASED_ATTEMPT)
        session.execute(
            update(Attempt).where(held).values(lease_expires_at=func.greatest(Attempt.lease_expires_at, fresh))
        )
        session.execute(
            update(Task)
            .where(Task.state == "leased")
            .values(lease_expires_at=func.greatest(Task.lease_expires_at, fresh))
        )
    session.execute(update(Leader).where(Leader.id == 1).values(swept_at=func.now()))
    return forgiven


def expired_attempts(session: Session, grace_s: float) -> list[uuid.UUID]:
    late = Attempt.lease_expires_at < func.now() - timedelta(seconds=grace_s)
    return list(session.scalars(select(Attempt.id).where(Attempt.state.in_(LEASED_ATTEMPT), late)))


def unclaimed_attempts(session: Session, after_s: float) -> list[uuid.UUID]:
    late = Attempt.assigned_at < func.now() - timedelta(seconds=after_s)
    return list(session.scalars(select(Attempt.id).where(Attempt.state == AttemptState.ASSIGNED, late)))


def archived_jobs(session: Session) -> list[tuple[uuid.UUID, uuid.UUID]]:
    """Project and job of whatever still goes on, and has not been asked to end, in a project that was archived."""
    going_on = Job.state.not_in((*TERMINAL, JobState.CANCELLING))
    query = select(Job.project_id, Job.id).join(Project, Project.id == Job.project_id)
    return [(row.project_id, row.id) for row in session.execute(query.where(Project.status == "archived", going_on))]


def stranded_attempts(session: Session, silent_s: float) -> list[uuid.UUID]:
    """Ended attempts whose GPUs nobody freed, on nodes silent for so long that no trainer of theirs can still run."""
    query = (
        select(Attempt.id)
        .join(Allocation, Allocation.owner_attempt == Attempt.id)
        .join(Node, Node.id == Attempt.node_id)
        .where(Attempt.state.not_in(LIVE_ATTEMPT), Allocation.released_at.is_(None))
        .where(Node.last_seen_at < func.now() - timedelta(seconds=silent_s))
    )
    return list(session.scalars(query.distinct()))
