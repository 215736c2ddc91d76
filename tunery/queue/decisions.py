"""Carrying a plan out. The policy looked without locks: here each decision is looked at again, under them."""

import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import structlog
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from tunery import failpoints, ids, outbox, wake
from tunery.contracts.scheduling import Hold, Plan, Preempt, Reason, Standing, Start
from tunery.db import Sessions, transaction
from tunery.ids import uuid7
from tunery.queue.leadership import assert_leader
from tunery.queue.mirror import Mirror
from tunery.states import LIVE_ATTEMPT, AttemptState, JobState, StopReason
from tunery.telemetry import tracing

log = structlog.get_logger(__name__)

_LIVE = ", ".join(f"'{state}'" for state in sorted(LIVE_ATTEMPT))


class NotStarted(Exception):
    """The world moved on since the policy looked; the decision is void, and nothing of it stands."""


class NodeFull(NotStarted):
    """The node has no free slot after all."""


def apply(
    sessions: Sessions, epoch: int, plan: Plan, mirror: Mirror | None = None, grace_s: float = 120
) -> list[uuid.UUID]:
    """Carry a plan out; returns the attempts that were assigned.

    What is kept for whom is written first, in one transaction; then each start in one of its own: no start waits for
    another's locks, and one that is refused costs only itself. A crash in between leaves whole decisions behind.

    Raises Deposed.
    """
    with transaction(sessions) as session:
        record(session, epoch, plan, mirror or Mirror(), grace_s)
    assigned: list[uuid.UUID] = []
    for one in plan.starts:
        try:
            with transaction(sessions) as session:
                assigned.append(start(session, epoch, one))
                failpoints.reach("assign.made")
        except (NotStarted, IntegrityError) as refused:
            told = str(getattr(refused, "orig", refused)).strip()[:300]
            log.warning("decision refused", job=ids.encode(ids.JOB, one.job_id), error=told)
    return assigned


def start(session: Session, epoch: int, decided: Start) -> uuid.UUID:
    """`assign`, by the leader. Raises Deposed, NotStarted, IntegrityError."""
    assert_leader(session, epoch)
    return assign(session, decided)


# ---- starting ---------------------------------------------------------------------------------------------------

_LOCK_JOB = text(
    f"""
    SELECT project_id, traceparent, queued_at,
      EXISTS (SELECT FROM projects p WHERE p.id = jobs.project_id AND p.blocked <> '') AS blocked
    FROM jobs WHERE id = :job AND state = '{JobState.QUEUED}' FOR UPDATE OF jobs SKIP LOCKED
    """
)
_LOCK_GPUS = text("SELECT count(*) FROM (SELECT 1 FROM gpus WHERE id = ANY(:gpus) ORDER BY id FOR NO KEY UPDATE) l")
_ASSIGN = text(
    f"""
    WITH kept AS (
      SELECT id, step FROM checkpoints
      WHERE job_id = :job AND deleted_at IS NULL AND state_deleted_at IS NULL ORDER BY step DESC LIMIT 1),
    made AS (
      INSERT INTO attempts (id, project_id, job_id, no, state, node_id, engine_id, limit_s, rate, resume_checkpoint_id,
                            start_step, last_event_seq, log_bytes, traceparent)
      SELECT :attempt, :project, :job, coalesce((SELECT max(no) FROM attempts WHERE job_id = :job), 0) + 1,
        '{AttemptState.ASSIGNED}', n.id, CAST(:engine AS uuid), :limit_s, :rate, (SELECT id FROM kept),
        coalesce((SELECT step FROM kept), 0), 0, 0, CAST(:trace AS text)
      FROM nodes n WHERE n.id = :node AND n.state = 'up'
        AND NOT EXISTS (SELECT FROM attempts WHERE job_id = :job AND state IN ({_LIVE}))
      RETURNING id, no, fence),
    fenced AS (UPDATE jobs SET fence = made.fence FROM made WHERE jobs.id = :job),
    placed AS (
      INSERT INTO attempt_nodes (attempt_id, rank, project_id, node_id) SELECT id, 0, :project, :node FROM made),
    held AS (
      INSERT INTO allocations (id, gpu_id, owner_attempt, exclusive, bytes)
      SELECT h.id, h.gpu_id, made.id, :exclusive, :bytes FROM made,
        unnest(CAST(:allocations AS uuid[]), CAST(:gpus AS uuid[])) AS h (id, gpu_id)),
    room AS (
      UPDATE slots SET attempt_id = made.id FROM made
      WHERE slots.node_id = :node AND slots.no = (
        SELECT no FROM slots WHERE node_id = :node AND attempt_id IS NULL ORDER BY no LIMIT 1 FOR UPDATE SKIP LOCKED)
      RETURNING slots.no),
    rung AS (
      INSERT INTO outbox (project_id, topic, payload)
      SELECT :project, '{outbox.RING_NODE}', jsonb_build_object(
        'node_id', CAST(:node AS text), 'attempt_id', made.id::text, 'traceparent', CAST(:trace AS text)) FROM made)
    SELECT made.no, made.fence, (SELECT no FROM room) FROM made
    """
)


def assign(session: Session, decided: Start) -> uuid.UUID:
    """Make the attempt, its allocations and the message to its node: all of it or nothing.

    Raises:
        NotStarted: the job waits no more or is being changed, its project is blocked, or the node takes no work.
        NodeFull: the node has no free slot.
        IntegrityError: a GPU has less room than was thought.
    """
    job = session.execute(_LOCK_JOB, {"job": decided.job_id}).one_or_none()
    if job is None:
        raise NotStarted("the job waits no more, or somebody changes it just now")
    if job.blocked:
        raise NotStarted("its project is blocked by now")
    span = _span(session, decided.job_id, job.traceparent, job.queued_at)
    attempt_id, trace = uuid7(), span.traceparent or job.traceparent
    gpus = sorted(decided.gpu_ids)
    session.execute(_LOCK_GPUS, {"gpus": gpus})
    made = session.execute(
        _ASSIGN,
        {
            "job": decided.job_id,
            "project": job.project_id,
            "attempt": attempt_id,
            "node": decided.node_id,
            "engine": decided.engine_id,
            "limit_s": decided.limit_s,
            "rate": decided.rate,
            "trace": trace,
            "exclusive": decided.exclusive,
            "bytes": decided.bytes_per_gpu,
            "allocations": [uuid7() for _ in gpus],
            "gpus": gpus,
        },
    ).one_or_none()
    if made is None:
        raise NotStarted("the job has an attempt already, or its node takes no work")
    no, fence, slot = made
    if slot is None:
        raise NodeFull(f"node {decided.node_id} has no free slot")
    wake.scheduler(session)  # the relay has a message
    span.note({"tunery.attempt.id": str(attempt_id), "tunery.node.id": str(decided.node_id)})
    span.end()
    log.info(
        "attempt assigned",
        job=ids.encode(ids.JOB, decided.job_id),
        project=ids.encode(ids.PROJECT, job.project_id),
        attempt=str(attempt_id),
        no=no,
        fence=fence,
        node=str(decided.node_id),
        why=decided.why,
        trace_id=tracing.trace_id(trace),
    )
    return attempt_id


def _span(session: Session, job_id: uuid.UUID, traceparent: str | None, queued_at: datetime) -> tracing.Span:
    """The time that the job has waited, in the trace of its submission; a later attempt points at the one before."""
    if not tracing.on():
        return tracing.Span(None)
    newest = "SELECT no, traceparent, ended_at FROM attempts WHERE job_id = :job ORDER BY no DESC LIMIT 1"
    last = session.execute(text(newest), {"job": job_id}).one_or_none()
    since = last.ended_at if last is not None and last.ended_at else queued_at
    return tracing.start(
        "tunery.job.queue",
        parent=traceparent,
        links=[last.traceparent] if last is not None else [],
        kind="producer",
        at=since.timestamp(),
        attributes={"tunery.job.id": ids.encode(ids.JOB, job_id), "tunery.attempt": (last.no if last else 0) + 1},
    )


# ---- everything else that a plan says -----------------------------------------------------------------------------


def record(session: Session, epoch: int, plan: Plan, mirror: Mirror, grace_s: float = 120) -> list[uuid.UUID]:
    """Ask for pre-emptions, keep holds and standings, tell each project why it waits. Returns who was asked to stop.

    Raises Deposed.
    """
    assert_leader(session, epoch)
    asked = [one.attempt_id for one in sorted(plan.preempts, key=_by_job) if _preempt(session, one, grace_s)]
    _keep(session, plan.holds)
    _stand(session, "projects", plan.projects)
    _stand(session, "organizations", plan.organizations)
    _tell(session, plan, mirror)
    return asked


def _by_job(preempt: Preempt) -> uuid.UUID:
    return preempt.job_id


_PREEMPT = text(
    f"""
    UPDATE attempts SET stop_reason = '{StopReason.PREEMPT}', stop_by = now() + make_interval(secs => :grace_s),
      preempted_at = now(), preempted_for = b.id, preempted_for_project = b.project_id
    FROM jobs b
    WHERE attempts.id = :attempt AND attempts.stop_reason IS NULL
      AND attempts.state IN ('{AttemptState.CLAIMED}', '{AttemptState.RUNNING}')
      AND b.id = :beneficiary AND b.state IN ('{JobState.QUEUED}')
      AND NOT EXISTS (SELECT FROM projects p WHERE p.id = b.project_id AND p.blocked <> '')
    RETURNING attempts.project_id, attempts.node_id, attempts.traceparent
    """
)


def _preempt(session: Session, decided: Preempt, grace_s: float) -> bool:
    session.execute(text("SELECT 1 FROM jobs WHERE id = :id FOR UPDATE"), {"id": decided.job_id})
    values = {"attempt": decided.attempt_id, "beneficiary": decided.for_job, "grace_s": grace_s}
    row = session.execute(_PREEMPT, values).one_or_none()
    if row is None:
        return False
    payload = {"node_id": str(row.node_id), "attempt_id": str(decided.attempt_id), "traceparent": row.traceparent}
    outbox.send(session, outbox.RING_NODE, row.project_id, payload)
    log.info(
        "pre-empted",
        attempt=str(decided.attempt_id),
        job=ids.encode(ids.JOB, decided.job_id),
        beneficiary=ids.encode(ids.JOB, decided.for_job),
        kind=decided.kind,
    )
    return True


_HELD = text(
    "SELECT job_id, kind, gpu_class, node_id, gpu_ids, extract(epoch FROM promised_at)::float8 AS at FROM holds"
)
_HOLD = text(
    """
    INSERT INTO holds (job_id, project_id, kind, gpu_class, node_id, gpu_ids, promised_at)
    SELECT id, project_id, :kind, :gpu_class, :node, :gpus, to_timestamp(:at) FROM jobs WHERE id = :job
    ON CONFLICT (job_id) DO UPDATE SET kind = excluded.kind, gpu_class = excluded.gpu_class,
      node_id = excluded.node_id, gpu_ids = excluded.gpu_ids, promised_at = excluded.promised_at
    """
)


def _keep(session: Session, holds: Sequence[Hold]) -> None:
    known = {
        row.job_id: (row.kind, row.gpu_class, row.node_id, set(row.gpu_ids), row.at) for row in session.execute(_HELD)
    }
    wanted = {hold.job_id: hold for hold in holds}
    if gone := sorted(known.keys() - wanted.keys()):
        session.execute(text("DELETE FROM holds WHERE job_id = ANY(:gone)"), {"gone": gone})
    for hold in holds:
        # the database keeps microseconds
        at = round(hold.promised_at, 6)
        if known.get(hold.job_id) == (hold.kind.value, hold.gpu_class, hold.node_id, set(hold.gpu_ids), at):
            continue
        values = {"job": hold.job_id, "kind": hold.kind.value, "gpu_class": hold.gpu_class, "node": hold.node_id}
        session.execute(_HOLD, values | {"gpus": list(hold.gpu_ids), "at": at})


def _stand(session: Session, table: str, standings: Sequence[Standing]) -> None:
    """In the order of their ids: whoever else writes several takes the same."""
    if not standings:
        return
    ordered = sorted(standings, key=lambda one: one.id)
    statement = f"""
        UPDATE {table} t SET active = v.active, service = t.service + v.credit
        FROM (SELECT t2.id, w.active, w.credit FROM {table} t2
          JOIN unnest(CAST(:ids AS uuid[]), CAST(:active AS boolean[]), CAST(:credit AS float8[]))
            AS w (id, active, credit) ON w.id = t2.id ORDER BY t2.id FOR NO KEY UPDATE OF t2) v
        WHERE t.id = v.id AND (t.active <> v.active OR v.credit <> 0)"""
    session.execute(
        text(statement),
        {
            "ids": [one.id for one in ordered],
            "active": [one.active for one in ordered],
            "credit": [one.credit for one in ordered],
        },
    )


@dataclass(frozen=True)
class _Told:
    """What one project is told. Equal while nothing changes."""

    shapes: tuple[tuple[str, Reason], ...]
    jobs: tuple[tuple[uuid.UUID, Reason], ...]
    sizes: tuple[int, ...]


_TELL = text(
    """
    INSERT INTO queue_views (project_id, reasons, reasons_at)
    SELECT id, reasons, now() FROM unnest(CAST(:ids AS uuid[]), CAST(:reasons AS jsonb[])) AS v (id, reasons)
    ON CONFLICT (project_id) DO UPDATE SET reasons = excluded.reasons, reasons_at = excluded.reasons_at
    WHERE queue_views.reasons IS DISTINCT FROM excluded.reasons
    """
)
_HUSH = text(
    "UPDATE queue_views SET reasons = '{}', reasons_at = now() WHERE project_id <> ALL(:told) AND reasons <> '{}'"
)


def _tell(session: Session, plan: Plan, mirror: Mirror) -> None:
    """Why each project's jobs wait, where that has changed since this leader last said so."""
    shapes: dict[uuid.UUID, list[tuple[str, Reason]]] = {}
    for one in plan.explanations:
        shapes.setdefault(one.project_id, []).append((one.shape, one.reason))
    jobs: dict[uuid.UUID, list[tuple[uuid.UUID, Reason]]] = {}
    projects = _projects_of(session, [one.job_id for one in plan.waits], mirror)
    for wait in plan.waits:
        if (project_id := projects.get(wait.job_id)) is not None:
            jobs.setdefault(project_id, []).append((wait.job_id, wait.reason))
    told = {
        project_id: _Told(tuple(shapes.get(project_id, ())), tuple(jobs.get(project_id, ())), plan.sizes)
        for project_id in shapes.keys() | jobs.keys()
    }
    news = {project_id: view for project_id, view in told.items() if mirror.told.get(project_id) != view}
    news |= dict.fromkeys(mirror.told.keys() - told.keys(), _SILENT)
    if mirror.first:
        session.execute(_HUSH, {"told": list(told)})
    if news:
        ordered = sorted(news)
        session.execute(_TELL, {"ids": ordered, "reasons": [_reasons(news[project_id]) for project_id in ordered]})
    mirror.told, mirror.first = dict(told), False


_SILENT = _Told((), (), ())


def _projects_of(session: Session, job_ids: Sequence[uuid.UUID], mirror: Mirror) -> dict[uuid.UUID, uuid.UUID]:
    known = {job_id: mirror.jobs[job_id].project_id for job_id in job_ids if job_id in mirror.jobs}
    if missing := [job_id for job_id in job_ids if job_id not in known]:
        query = text("SELECT id, project_id FROM jobs WHERE id = ANY(:ids)")
        known |= {row.id: row.project_id for row in session.execute(query, {"ids": missing})}
    return known


def _reasons(told: _Told) -> str:
    """As `tunery.waiting` reads it."""
    if told == _SILENT:
        return "{}"
    view: dict[str, Any] = {"sizes": told.sizes, "shapes": {shape: _reason(why) for shape, why in told.shapes}}
    if told.jobs:
        view["jobs"] = {str(job_id): _reason(why) for job_id, why in told.jobs}
    return json.dumps(view)


def _reason(reason: Reason) -> dict[str, Any]:
    return {"code": reason.code.value, "numbers": dict(reason.numbers)}
