"""What the policy looks at, read in one transaction. Plain tuples: a pass over a thousand GPUs has milliseconds."""

import json
import uuid
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from sqlalchemy.orm import Session

from tunery.contracts.scheduling import (
    EngineView,
    GpuView,
    Hold,
    HoldKind,
    JobView,
    NodeView,
    PastPreemption,
    PolicySettings,
    RunningView,
    Snapshot,
    Tenant,
)
from tunery.queue.mirror import Mirror
from tunery.states import LIVE_ATTEMPT, AttemptState

_LIVE = ", ".join(f"'{state}'" for state in sorted(LIVE_ATTEMPT))
_LEAVING = f"'{AttemptState.STOPPING}', '{AttemptState.PUBLISHING}'"

_CLOCK = """
    SELECT extract(epoch FROM now())::float8, pg_snapshot_xmin(pg_current_snapshot())::text::bigint,
      pg_snapshot_xmax(pg_current_snapshot())::text::bigint"""
_NODES = """
    SELECT n.id::text, n.name, n.state, n.labels::text, n.last_seen_at <= now() - make_interval(secs => %s),
      coalesce((n.info ->> 'disk_full')::boolean, false),
      (SELECT count(*) FROM slots s WHERE s.node_id = n.id AND s.attempt_id IS NULL)
    FROM nodes n WHERE n.removed_at IS NULL AND n.state <> 'down' ORDER BY n.name, n.id"""
_GPUS = """
    SELECT g.id::text, g.node_id::text, g.name, g.kind, g.usable_bytes, g.usable_bytes - g.reserved_bytes, g.gpu_class,
      coalesce(c.cost, 1)
    FROM gpus g LEFT JOIN gpu_classes c ON c.name = g.gpu_class
    WHERE g.state = 'healthy' ORDER BY g.node_id, g.index"""
_RUNNING = f"""
    WITH held AS MATERIALIZED (
      SELECT owner_attempt, string_agg(gpu_id::text, ',' ORDER BY gpu_id) AS gpus, max(bytes) AS bytes,
        bool_or(exclusive) AS exclusive
      FROM allocations WHERE released_at IS NULL AND owner_attempt IS NOT NULL GROUP BY owner_attempt)
    SELECT a.id::text, a.job_id::text, j.organization_id::text, a.project_id::text, a.node_id::text, h.gpus, h.bytes,
      h.exclusive, a.rate, extract(epoch FROM a.assigned_at)::float8, a.limit_s,
      extract(epoch FROM j.queued_at)::float8, j.priority, j.preemptible, coalesce(p.times, 0),
      extract(epoch FROM (SELECT max(c.created_at) FROM checkpoints c WHERE c.attempt_id = a.id))::float8,
      extract(epoch FROM a.first_step_at - coalesce(a.claimed_at, a.assigned_at))::float8,
      a.stop_reason IS NOT NULL OR a.state IN ({_LEAVING}), extract(epoch FROM a.stop_by)::float8,
      a.state NOT IN ({_LIVE}), a.engine_id::text,
      a.state IN ('{AttemptState.PREEMPTED}', '{AttemptState.LOST}') OR a.fault IS NOT DISTINCT FROM 'platform',
      a.state = '{AttemptState.ASSIGNED}'
    FROM held h JOIN attempts a ON a.id = h.owner_attempt JOIN jobs j ON j.id = a.job_id
      LEFT JOIN (SELECT job_id, count(*) AS times FROM attempts
        WHERE preempted_at > now() - make_interval(secs => %s) GROUP BY job_id) p ON p.job_id = a.job_id"""
_ORGANIZATIONS = """
    SELECT id::text, id, id, weight, guarantee, coalesce(cap, 'Infinity'), service, active, NULL::int, '', false
    FROM organizations"""
_PROJECTS = """
    SELECT id::text, id, organization_id, weight, guarantee, coalesce(cap, 'Infinity'), service, active,
      max_running_jobs, coalesce(blocked, ''), dedicated FROM projects"""
_HOLDS = """
    SELECT job_id, kind, gpu_class, node_id, gpu_ids, extract(epoch FROM promised_at)::float8 FROM holds
    ORDER BY job_id"""
_PREEMPTIONS = """
    SELECT job_id, preempted_for_project, project_id, extract(epoch FROM preempted_at)::float8 FROM attempts
    WHERE preempted_at > now() - make_interval(secs => %s) ORDER BY preempted_at, id"""
_ENGINES = """
    SELECT e.id, e.node_id, l.gpu_id, e.organization_id,
      concat(b.id, '@', b.revision, '/', e.precision, '/', g.kind, '/lora')
    FROM engines e JOIN allocations l ON l.owner_engine = e.id AND l.released_at IS NULL
      JOIN gpus g ON g.id = l.gpu_id JOIN base_models b ON b.id = e.base_model_id
    WHERE e.state = 'up' ORDER BY e.id"""
"""Their key is that of the jobs which may join: see `jobs.engine_key`."""


def snapshot(
    session: Session,
    silent_after_s: float,
    settings: PolicySettings | None = None,
    mirror: Mirror | None = None,
) -> Snapshot:
    """Everything the policy looks at, as of one moment. The session must not have begun to read or write.

    `mirror`: the leader's; without one, all that waits is read.
    """
    settings, mirror = settings or PolicySettings(), mirror or Mirror()
    connection = session.connection(execution_options={"isolation_level": "REPEATABLE READ"})
    driver: Any = connection.connection.driver_connection
    with driver.cursor(binary=True) as cursor:
        now, oldest_running, next_unseen = cursor.execute(_CLOCK).fetchone()
        mirror.read_jobs(cursor, oldest_running, next_unseen)
        rows = mirror.views("running", cursor.execute(_RUNNING, (settings.window_s,)).fetchall(), _Running)
        running, charged = _as_of(now, rows)
        preempted = cursor.execute(_PREEMPTIONS, (settings.window_s,)).fetchall()
        return Snapshot(
            jobs=_waiting(mirror, rows, preempted),
            nodes=_nodes(cursor, mirror, silent_after_s, running),
            now=now,
            running=running,
            projects=_tenants(cursor.execute(_PROJECTS).fetchall(), charged),
            organizations=_tenants(cursor.execute(_ORGANIZATIONS).fetchall(), charged),
            holds=tuple(_hold(*row) for row in cursor.execute(_HOLDS)),
            engines=tuple(EngineView(*row) for row in cursor.execute(_ENGINES)),
            preemptions=tuple(PastPreemption(row[1], row[2], row[3]) for row in preempted if row[1] is not None),
            settings=settings,
        )


def _waiting(
    mirror: Mirror, running: "Iterable[_Running]", preempted: Iterable[tuple[Any, ...]]
) -> tuple[JobView, ...]:
    waiting = mirror.jobs
    assigned = [row.view.job_id for row in running if row.assigned]
    times: dict[uuid.UUID, int] = defaultdict(int)
    for row in preempted:
        if row[0] in waiting:
            times[row[0]] += 1
    if assigned or times:
        waiting = dict(waiting)
        for job_id, count in times.items():
            waiting[job_id] = replace(waiting[job_id], preemptions=count)
        for job_id in assigned:
            waiting.pop(job_id, None)
    return tuple(waiting.values())


def _as_of(now: float, rows: "Iterable[_Running]") -> tuple[tuple[RunningView, ...], dict[str, float]]:
    """Who holds GPUs, and what that has cost so far, by project and by organization."""
    charged: dict[str, float] = defaultdict(float)
    views: list[RunningView] = []
    for row in rows:
        view = row.view
        if row.loading:
            # nobody knows yet what a start of it costs; it is left alone until it has begun to train
            view = replace(view, overhead_s=now - view.started_at)
        until = (view.checkpoint_at or view.started_at) if view.ended and row.refunded else now
        cost = view.rate * max(until - view.started_at, 0.0)
        charged[row.project] += cost
        charged[row.organization] += cost
        views.append(view)
    return tuple(views), charged


class _Running:
    """A row of `_RUNNING`, which stays as it is while nothing happens to the attempt. Ids as text: they hash faster."""

    __slots__ = ("assigned", "loading", "organization", "project", "refunded", "view")

    def __init__(self, *row: Any) -> None:
        attempt, job, self.organization, self.project, node, gpus, *held, checkpoint_at, load_s, stopping, by = row[:19]
        ended, engine, self.refunded, self.assigned = row[19:]
        self.loading = load_s is None and not ended
        self.view = RunningView(
            uuid.UUID(attempt),
            uuid.UUID(job),
            uuid.UUID(self.organization),
            uuid.UUID(self.project),
            uuid.UUID(node),
            tuple(map(uuid.UUID, gpus.split(","))),
            *held,
            checkpoint_at=checkpoint_at,
            overhead_s=load_s or 0.0,
            stopping=stopping,
            stops_at=by,
            ended=ended,
            engine_id=uuid.UUID(engine) if engine else None,
        )


def _nodes(cursor: Any, mirror: Mirror, silent_after_s: float, running: Iterable[RunningView]) -> tuple[NodeView, ...]:
    shared = {gpu_id: view.project_id for view in running if not view.exclusive for gpu_id in view.gpu_ids}
    rows = cursor.execute(_GPUS).fetchall()
    gpus: dict[str, list[GpuView]] = defaultdict(list)
    for row, gpu in zip(rows, mirror.views("gpus", rows, _gpu), strict=True):
        gpus[row[1]].append(replace(gpu, held_by=shared[gpu.id]) if shared and gpu.id in shared else gpu)
    rows = cursor.execute(_NODES, (silent_after_s,)).fetchall()
    nodes = zip(rows, mirror.views("nodes", rows, _node), strict=True)
    return tuple(replace(node, gpus=tuple(gpus[row[0]])) for row, node in nodes)


def _gpu(id_: str, node_id: str, name: str, kind: str, usable: int, free: int, gpu_class: str, cost: float) -> GpuView:
    return GpuView(uuid.UUID(id_), uuid.UUID(node_id), name, kind, usable, free, gpu_class, cost)


def _node(id_: str, name: str, state: str, labels: str, silent: bool, full: bool, slots: int) -> NodeView:
    why = state if state != "up" else "silent" if silent else "its disk is full" if full else ""
    known = json.loads(labels)
    return NodeView(uuid.UUID(id_), name, slots, (), frozenset(known.items()), not why, why)


def _tenants(rows: Iterable[tuple[Any, ...]], charged: dict[str, float]) -> tuple[Tenant, ...]:
    """Their service as it would be if everything that runs were charged now."""
    return tuple(
        Tenant(id_, organization, weight, guarantee, cap, service + charged.get(name, 0.0), *rest)
        for name, id_, organization, weight, guarantee, cap, service, *rest in rows
    )


def _hold(
    job_id: uuid.UUID, kind: str, gpu_class: str, node_id: uuid.UUID, gpu_ids: list[uuid.UUID], promised_at: float
) -> Hold:
    return Hold(job_id, HoldKind(kind), gpu_class, node_id, tuple(gpu_ids), promised_at)
