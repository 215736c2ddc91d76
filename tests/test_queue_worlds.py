"""Random clusters through real Postgres: the policy sees what is there, and its decisions leave the database sound."""

import math
import uuid
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from sqlalchemy import text

from scheduler.policy import schedule
from tests import worlds
from tests.factories import Database
from tests.worlds import CLASSES, GIB, World, cap_of
from tunery import queue
from tunery.contracts.scheduling import (
    GpuView,
    JobView,
    NodeView,
    PastPreemption,
    PolicySettings,
    RunningView,
    Snapshot,
    Tenant,
)
from tunery.db import Sessions, transaction
from tunery.embedded.servers import Servers

SETTINGS = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
POLICY = PolicySettings()


@pytest.fixture(scope="module")
def admin(servers: Servers, database: Database) -> Iterator[psycopg.Connection]:
    url = psycopg.conninfo.conninfo_to_dict(servers.admin_url) | {"dbname": database.name}
    with psycopg.connect(**url, autocommit=True) as connection:  # pyright: ignore[reportArgumentType]
        yield connection


@pytest.fixture
def scheduler(database: Database) -> Sessions:
    return database.sessions("tunery_scheduler")


def look(scheduler: Sessions, mirror: queue.Mirror | None = None) -> Snapshot:
    with transaction(scheduler) as session:
        return queue.snapshot(session, 60, POLICY, mirror)


def put(world: World, admin: psycopg.Connection) -> None:
    worlds.empty(admin)
    with admin.transaction():
        worlds.insert(world, admin)


# ---- what the policy sees ---------------------------------------------------------------------------------------


@SETTINGS
@given(worlds.worlds())
def test_the_snapshot_is_the_world(admin: psycopg.Connection, scheduler: Sessions, world: World) -> None:
    put(world, admin)
    mirror = queue.Mirror()
    seen = look(scheduler, mirror)
    assert {job.id: job for job in seen.jobs} == {job.id: job for job in expected_jobs(world)}
    assert sorted(seen.running, key=by_attempt) == sorted(expected_running(world, seen.now), key=by_attempt)
    assert seen.nodes == expected_nodes(world)
    assert {one.id: approximate(one) for one in seen.projects} == expected_tenants(world, world.projects, seen.now)
    assert {one.id: approximate(one) for one in seen.organizations} == expected_tenants(
        world, world.organizations, seen.now
    )
    assert sorted(seen.holds, key=lambda hold: hold.job_id) == sorted(world.holds, key=lambda hold: hold.job_id)
    assert Counter((one.victim, one.beneficiary) for one in seen.preemptions) == Counter(
        (attempt["job"]["project"]["id"], attempt["preempted_for"]) for attempt in lately(world)
    )
    assert all(isinstance(one, PastPreemption) and seen.now - 86400 < one.at < seen.now for one in seen.preemptions)
    again = look(scheduler, mirror)
    assert (again.jobs, again.nodes, again.holds) == (seen.jobs, seen.nodes, seen.holds)


def by_attempt(view: RunningView) -> uuid.UUID:
    return view.attempt_id


def lately(world: World) -> list[dict[str, Any]]:
    return [attempt for attempt in world.attempts if attempt["preempted"] == 100.0]


def times(world: World, job: dict[str, Any]) -> int:
    return sum(attempt["job"] is job for attempt in lately(world))


def expected_jobs(world: World) -> list[JobView]:
    return [
        JobView(
            job["id"],
            job["project"]["organization_id"],
            job["project"]["id"],
            job["queued_at"],
            job["gpus"],
            job["required_bytes"],
            job["priority"],
            job["urgent"],
            max(job["limit_s"] - job["used_s"], 60.0),
            job["gpu_class"],
            frozenset(job["node_labels"].items()),
            job["shareable"],
            job["preemptible"],
            times(world, job),
            job["engine_key"],
            job["engine_bytes"] or 0,
        )
        for job in world.jobs
        if job["state"] == "queued"
    ]


def expected_running(world: World, now: float) -> list[RunningView]:
    views = []
    for attempt in world.attempts:
        job, mine = attempt["job"], [held for held in world.allocations if held["attempt"] is attempt]
        saved = [one["at"] for one in world.checkpoints if one["attempt"] is attempt]
        ended = attempt["state"] != "running"
        loading = 0.0 if ended else now - attempt["assigned_at"]
        views.append(
            RunningView(
                attempt["id"],
                job["id"],
                job["project"]["organization_id"],
                job["project"]["id"],
                attempt["node_id"],
                tuple(sorted(held["gpu_id"] for held in mine)),
                max(held["bytes"] for held in mine),
                mine[0]["exclusive"],
                attempt["rate"],
                attempt["assigned_at"],
                attempt["limit_s"],
                job["queued_at"],
                job["priority"],
                job["preemptible"],
                times(world, job),
                max(saved, default=None),
                loading if attempt["first_step_after"] is None else attempt["first_step_after"],
                attempt["stop_by"] is not None,
                attempt["stop_by"],
                ended,
            )
        )
    return views


def expected_nodes(world: World) -> tuple[NodeView, ...]:
    views = []
    for node in world.nodes:
        if node["state"] == "down":
            continue
        why = "silent" if node["silent"] else "its disk is full" if node["full"] else ""
        why = node["state"] if node["state"] != "up" else why
        gpus = tuple(
            expected_gpu(world, gpu) for gpu in world.gpus if gpu["node_id"] == node["id"] and gpu["state"] == "healthy"
        )
        labels = frozenset(node["labels"].items())
        views.append(NodeView(node["id"], node["name"], world.free_slots(node), gpus, labels, not why, why))
    return tuple(views)


def expected_gpu(world: World, gpu: dict[str, Any]) -> GpuView:
    held = [one for one in world.allocations if one["gpu_id"] == gpu["id"]]
    shared = next((one["attempt"]["job"]["project"]["id"] for one in held if not one["exclusive"]), None)
    free = gpu["usable"] - sum(one["bytes"] for one in held)
    cost = CLASSES.get(gpu["gpu_class"], 1.0)
    return GpuView(gpu["id"], gpu["node_id"], "GPU", "cuda", gpu["usable"], free, gpu["gpu_class"], cost, shared)


def expected_tenants(world: World, rows: list[dict[str, Any]], now: float) -> dict[uuid.UUID, Tenant]:
    charged: dict[uuid.UUID, float] = defaultdict(float)
    for attempt in world.attempts:
        until = now
        if attempt["state"] in ("lost", "preempted") or (
            attempt["state"] == "failed" and attempt["fault"] == "platform"
        ):
            saved = [one["at"] for one in world.checkpoints if one["attempt"] is attempt]
            until = max(saved, default=attempt["assigned_at"])
        cost = attempt["rate"] * max(until - attempt["assigned_at"], 0.0)
        charged[attempt["job"]["project"]["id"]] += cost
        charged[attempt["job"]["project"]["organization_id"]] += cost
    return {
        row["id"]: approximate(
            Tenant(
                row["id"],
                row.get("organization_id", row["id"]),
                row["weight"],
                row["guarantee"],
                cap_of(row),
                row["service"] + charged[row["id"]],
                row["active"],
                row.get("max_running_jobs"),
                row.get("blocked") or "",
                row.get("dedicated", False),
            )
        )
        for row in rows
    }


def approximate(tenant: Tenant) -> Any:
    """Sums of floats depend on their order."""
    return (tenant.id, tenant.organization_id, tenant.weight, tenant.guarantee, tenant.cap, round(tenant.service, 2),
            tenant.active, tenant.max_running, tenant.blocked, tenant.dedicated)  # fmt: skip


# ---- what its decisions leave --------------------------------------------------------------------------------------


@SETTINGS
@given(worlds.worlds())
def test_decisions_leave_the_database_sound(admin: psycopg.Connection, scheduler: Sessions, world: World) -> None:
    put(world, admin)
    with transaction(scheduler) as session:
        epoch = queue.lead(session, "test", ttl_s=600)
    assert epoch is not None
    mirror = queue.Mirror()
    seen = look(scheduler, mirror)
    plan = schedule(seen)
    assigned = queue.apply(scheduler, epoch, plan, mirror)
    assert len(assigned) == len(plan.starts), "nothing else happened meanwhile: no decision may be refused"
    check_sound(admin, world)
    after = look(scheduler, mirror)
    assert {job.id for job in after.jobs} == {job.id for job in seen.jobs} - {start.job_id for start in plan.starts}
    # the database keeps microseconds
    assert set(after.holds) == {replace(hold, promised_at=round(hold.promised_at, 6)) for hold in plan.holds}
    for party in (*after.projects, *after.organizations):
        standing = next((one for one in (*plan.projects, *plan.organizations) if one.id == party.id), None)
        assert standing is None or party.active == standing.active
    fresh = look(scheduler)
    assert {job.id: job for job in fresh.jobs} == {job.id: job for job in after.jobs}, "the mirror is what there is"


def check_sound(admin: psycopg.Connection, world: World) -> None:
    rows = admin.execute(
        "SELECT g.usable_bytes, g.reserved_bytes, coalesce(sum(l.bytes), 0), count(*) FILTER (WHERE l.exclusive), "
        "count(l.id) FROM gpus g LEFT JOIN allocations l ON l.gpu_id = g.id AND l.released_at IS NULL GROUP BY g.id"
    ).fetchall()
    for usable, reserved, held, exclusive, holders in rows:  # I1
        assert held == reserved <= usable and (exclusive == 0 or holders == 1)
    started = admin.execute(
        "SELECT j.gpus, j.project_id, count(l.id), count(DISTINCT g.node_id), bool_and(g.node_id = a.node_id), "
        "a.fence, j.fence FROM attempts a JOIN jobs j ON j.id = a.job_id JOIN allocations l "
        "ON l.owner_attempt = a.id JOIN gpus g ON g.id = l.gpu_id WHERE a.state = 'assigned' GROUP BY a.id, j.id"
    ).fetchall()
    for gpus, _, held, nodes, same, fence, job_fence in started:  # I3, and I12's fences
        assert (held, nodes, same, fence) == (gpus, 1, True, job_fence)
    live = "SELECT job_id FROM attempts WHERE state IN ('assigned', 'running') GROUP BY job_id HAVING count(*) > 1"
    assert admin.execute(live).fetchall() == []
    caps = {row["id"]: cap_of(row) for row in (*world.projects, *world.organizations)}
    rates: dict[uuid.UUID, float] = defaultdict(float)
    query = (
        "SELECT DISTINCT a.id, a.rate, j.project_id, j.organization_id FROM attempts a JOIN jobs j ON j.id = a.job_id "
        "JOIN allocations l ON l.owner_attempt = a.id WHERE a.state IN ('assigned', 'running')"
    )
    for _, rate, project, organization in admin.execute(query).fetchall():
        rates[project] += rate
        rates[organization] += rate
    organizations = {row["id"]: row["organization_id"] for row in world.projects}
    for _, project, *_ in started:  # I2: who was over it before starts nothing
        assert rates[project] <= caps[project] + 1e-6
        assert rates[organizations[project]] <= caps[organizations[project]] + 1e-6


# ---- the mirror ----------------------------------------------------------------------------------------------------


def small(**job: Any) -> tuple[World, uuid.UUID]:
    """One project, one waiting job, nothing else."""
    owner = {"weight": 1.0, "guarantee": 0.0, "cap": None, "service": 0.0, "active": False}
    organization = {"id": uuid.uuid4(), "name": "o", **owner}
    more = {"max_running_jobs": None, "blocked": None, "dedicated": False, "organization_id": organization["id"]}
    project = {"id": uuid.uuid4(), "name": "p", **owner, **more}
    waiting = {
        "id": uuid.uuid4(), "project": project, "state": "queued", "queued_at": worlds.LONG_AGO, "gpus": 1,
        "required_bytes": GIB, "priority": 0, "urgent": False, "limit_s": 1800.0, "used_s": 0.0, "gpu_class": None,
        "node_labels": {}, "shareable": False, "preemptible": True, "engine_key": None, "engine_bytes": None,
    }  # fmt: skip
    return World([organization], [project], jobs=[waiting | job]), waiting["id"]


def test_a_change_that_commits_late_is_not_missed(
    admin: psycopg.Connection, scheduler: Sessions, database: Database
) -> None:
    world, job_id = small()
    put(world, admin)
    mirror = queue.Mirror()
    look(scheduler, mirror)
    slow = database.engine("owner").connect()
    slow.execute(text("UPDATE jobs SET priority = 7 WHERE id = :id"), {"id": job_id})
    for _ in range(3):  # later transactions come and go, and passes with them
        admin.execute("UPDATE projects SET weight = weight + 1")
        assert [job.priority for job in look(scheduler, mirror).jobs] == [0]
    slow.commit()
    slow.close()
    assert [job.priority for job in look(scheduler, mirror).jobs] == [7]
    admin.execute("UPDATE jobs SET state = 'cancelled', finished_at = now() WHERE id = %s", (job_id,))
    assert look(scheduler, mirror).jobs == ()


def test_a_pass_reads_what_changed_and_nothing_else(admin: psycopg.Connection, scheduler: Sessions) -> None:
    """Also not what was restored from another cluster, whose transactions have numbers that come much later here."""
    world, job_id = small()
    put(world, admin)
    mirror = queue.Mirror()
    before = look(scheduler, mirror).jobs[0]
    admin.execute("UPDATE jobs SET changed_in = %s WHERE id = %s", (1 << 50, job_id))
    assert look(scheduler, mirror).jobs[0] is look(scheduler, mirror).jobs[0] is before
    admin.execute("UPDATE jobs SET event_seq = event_seq + 1 WHERE id = %s", (job_id,))
    assert look(scheduler, mirror).jobs[0] is before
    admin.execute("UPDATE jobs SET used_s = 100 WHERE id = %s", (job_id,))
    assert math.isclose(look(scheduler, mirror).jobs[0].limit_s, 1700)
    admin.execute("UPDATE jobs SET used_s = 1800 WHERE id = %s", (job_id,))
    assert look(scheduler, mirror).jobs[0].limit_s == 60
