"""Random clusters as the policy sees them, and the rows that a database has for one: what goes in must come out."""

import json
import math
import uuid
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import psycopg
from hypothesis import strategies as st

from tunery.contracts.scheduling import Hold, HoldKind

GIB = 1 << 30
LONG_AGO = 1_700_000_000.0
CLASSES = {"h100-80gb": 1.0, "a100-40gb": 0.5}
_TABLES = (
    "queue_views", "holds", "outbox", "events", "usage", "allocations", "slots", "attempt_nodes", "checkpoints",
    "attempts", "tasks", "jobs", "files", "engines", "gpus", "nodes", "gpu_classes", "base_models", "projects",
    "organizations",
)  # fmt: skip


@dataclass
class World:
    """Rows, table by table, as dictionaries; `insert` writes them."""

    organizations: list[dict[str, Any]] = field(default_factory=list)
    projects: list[dict[str, Any]] = field(default_factory=list)
    nodes: list[dict[str, Any]] = field(default_factory=list)
    gpus: list[dict[str, Any]] = field(default_factory=list)
    jobs: list[dict[str, Any]] = field(default_factory=list)
    attempts: list[dict[str, Any]] = field(default_factory=list)
    allocations: list[dict[str, Any]] = field(default_factory=list)
    checkpoints: list[dict[str, Any]] = field(default_factory=list)
    holds: list[Hold] = field(default_factory=list)

    def free_slots(self, node: dict[str, Any]) -> int:
        taken = sum(attempt["node_id"] == node["id"] for attempt in self.attempts)
        return node["slots"] - taken


_amounts = st.sampled_from([0.5, 1.0, 2.0, 4.0])
_flags = st.booleans()


@st.composite
def worlds(draw: st.DrawFn) -> World:
    world = World()
    new = iter(draw(st.lists(st.uuids(), min_size=200, max_size=200, unique=True)))
    for number in range(draw(st.integers(1, 2))):
        world.organizations.append(_tenant(draw, next(new), name=f"o{number}"))
    for number in range(draw(st.integers(1, 3))):
        organization = draw(st.sampled_from(world.organizations))["id"]
        more = {
            "organization_id": organization,
            "max_running_jobs": draw(st.sampled_from([None, None, 1, 3])),
            "blocked": draw(st.sampled_from([None, None, None, "its budget is used up"])),
            "dedicated": draw(_flags),
        }
        world.projects.append(_tenant(draw, next(new), name=f"p{number}") | more)
    for number in range(draw(st.integers(0, 4))):
        _node(draw, world, new, number)
    for _ in range(draw(st.integers(0, 10))):
        world.jobs.append(_job(draw, world, next(new)))
    for _ in range(draw(st.integers(0, 5))):
        _attempt(draw, world, new)
    waiting = [job for job in world.jobs if job["state"] == "queued"]
    if world.nodes and waiting and draw(_flags):
        job, node = draw(st.sampled_from(waiting)), draw(st.sampled_from(world.nodes))
        mine = tuple(gpu["id"] for gpu in world.gpus if gpu["node_id"] == node["id"])
        kind = draw(st.sampled_from(HoldKind))
        at = LONG_AGO + draw(st.integers(0, 10**6)) / 7
        named = mine if kind is HoldKind.PREEMPTION else ()
        world.holds.append(Hold(job["id"], kind, "h100-80gb", node["id"], named, round(at, 6)))
    return world


def _tenant(draw: st.DrawFn, own: uuid.UUID, name: str) -> dict[str, Any]:
    guarantee = draw(st.sampled_from([0.0, 0.0, 1.0]))
    return {
        "id": own,
        "name": name,
        "weight": draw(_amounts),
        "guarantee": guarantee,
        "cap": draw(st.sampled_from([None, None, guarantee + 1.0, guarantee + 4.0])),
        "service": draw(st.sampled_from([0.0, 100.0, 5000.0])),
        "active": draw(_flags),
    }


def _node(draw: st.DrawFn, world: World, new: Any, number: int) -> None:
    node = {
        "id": next(new),
        "name": f"n{number}",
        "state": draw(st.sampled_from(["up", "up", "up", "cordoned", "draining", "down"])),
        "labels": draw(st.sampled_from([{}, {"rack": "a"}, {"rack": "a", "disk": "fast"}])),
        "silent": draw(st.sampled_from([False, False, True])),
        "full": draw(st.sampled_from([False, False, True])),
        "slots": draw(st.integers(1, 8)),
    }
    world.nodes.append(node)
    for index in range(draw(st.integers(0, 8))):
        gpu = {
            "id": next(new),
            "node_id": node["id"],
            "index": index,
            "usable": draw(st.sampled_from([40, 80])) * GIB,
            "state": draw(st.sampled_from(["healthy"] * 4 + ["unhealthy"])),
            "gpu_class": draw(st.sampled_from([*CLASSES, "unclassified"])),
        }
        world.gpus.append(gpu)


def _job(draw: st.DrawFn, world: World, own: uuid.UUID) -> dict[str, Any]:
    project = draw(st.sampled_from(world.projects))
    key = draw(st.sampled_from([None, None, "base@1/bf16/cuda/lora"]))
    return {
        "id": own,
        "project": project,
        "state": draw(st.sampled_from(["queued", "queued", "queued", "validating", "paused"])),
        "queued_at": LONG_AGO + draw(st.integers(0, 10**5)) / 8,
        "gpus": draw(st.sampled_from([1, 1, 1, 2, 4])),
        "required_bytes": draw(st.integers(1, 79)) * GIB,
        "priority": draw(st.integers(-2, 2)),
        "urgent": draw(st.sampled_from([False, False, True])),
        "limit_s": draw(st.sampled_from([90.0, 1800.0, 7200.5])),
        "used_s": draw(st.sampled_from([0.0, 50.25, 5000.0])),
        "gpu_class": draw(st.sampled_from([None, None, *CLASSES])),
        "node_labels": draw(st.sampled_from([{}, {}, {"rack": "a"}])),
        "shareable": draw(_flags),
        "preemptible": draw(_flags),
        "engine_key": key,
        "engine_bytes": GIB if key else None,
    }


def _attempt(draw: st.DrawFn, world: World, new: Any) -> None:
    """Of a job of its own, on GPUs that are free; or nothing, if there are none."""
    taken = {held["gpu_id"] for held in world.allocations}
    places = [
        (node, free)
        for node in world.nodes
        if world.free_slots(node)
        and (free := [gpu for gpu in world.gpus if gpu["node_id"] == node["id"] and gpu["id"] not in taken])
    ]
    if not places:
        return
    node, free = draw(st.sampled_from(places))
    ended = draw(st.sampled_from([False, False, False, True]))
    job = _job(draw, world, next(new)) | {
        "state": draw(st.sampled_from(["queued", "failed"])) if ended else "running",
        "gpus": draw(st.integers(1, min(4, len(free)))),
    }
    began = draw(st.sampled_from([None, 10.0, 40.5]))
    attempt = {
        "id": next(new),
        "job": job,
        "node_id": node["id"],
        "state": draw(st.sampled_from(["lost", "failed", "preempted"])) if ended else "running",
        "rate": draw(_amounts),
        "limit_s": draw(st.sampled_from([600.0, 90000.0])),
        "assigned_at": LONG_AGO + draw(st.integers(0, 10**6)) / 16,
        "first_step_after": began,
        "stop_by": draw(st.sampled_from([None, LONG_AGO + 10**7])),
        "fault": draw(st.sampled_from(["platform", "user"])) if ended else None,
        "preempted": draw(st.sampled_from([None, None, 100.0, 200_000.0])),
        "preempted_for": draw(st.sampled_from(world.projects))["id"],
    }
    world.jobs.append(job)
    world.attempts.append(attempt)
    exclusive = draw(_flags)
    for gpu in free[: job["gpus"]]:
        size = gpu["usable"] if exclusive else 20 * GIB
        world.allocations.append(
            {"id": next(new), "gpu_id": gpu["id"], "attempt": attempt, "exclusive": exclusive, "bytes": size}
        )
    for number in range(draw(st.integers(0, 2))):
        at = attempt["assigned_at"] + 60.0 * (number + 1)
        world.checkpoints.append({"id": next(new), "attempt": attempt, "step": number + 1, "at": at})


# ---- into the database ----------------------------------------------------------------------------------------


def empty(connection: psycopg.Connection) -> None:
    """Every row of the tables of a world. The connection is a superuser's, and checks no foreign keys."""
    connection.execute("SET session_replication_role = replica")
    connection.execute(";".join(f"DELETE FROM {table}" for table in _TABLES))  # pyright: ignore[reportArgumentType]
    connection.execute("SET session_replication_role = origin")


def insert(world: World, connection: psycopg.Connection) -> None:
    put = connection.execute
    shared = "id, name, weight, guarantee, cap, service, active"
    for row in world.organizations:
        _insert(connection, "organizations", {name: row[name] for name in shared.split(", ")})
    for row in world.projects:
        _insert(connection, "projects", row)
        file = {"filename": "x", "purpose": "fine-tune", "bytes": 1, "sha256": "0", "object_key": f"u/{row['id']}"}
        _insert(connection, "files", {"id": row["id"], "project_id": row["id"], **file})
    base = uuid.UUID(int=7)
    _insert(connection, "base_models", {"id": base, "name": "base", "request": "{}", "state": "importing"})
    for name, cost in CLASSES.items():
        _insert(connection, "gpu_classes", {"name": name, "cost": cost})
    for row in world.nodes:
        given = {"boot_id": uuid.uuid4(), "task_slots": 1, "version": "test", "labels": json.dumps(row["labels"])}
        info = json.dumps({"disk_full": True} if row["full"] else {})
        _insert(
            connection, "nodes", {"id": row["id"], "name": row["name"], "state": row["state"], "info": info, **given}
        )
        if row["silent"]:
            put("UPDATE nodes SET last_seen_at = now() - interval '1 hour' WHERE id = %s", (row["id"],))
        for no in range(row["slots"]):
            _insert(connection, "slots", {"node_id": row["id"], "no": no})
    for row in world.gpus:
        size = {"total_bytes": row["usable"], "usable_bytes": row["usable"]}
        what = {name: row[name] for name in ("id", "node_id", "index", "state", "gpu_class")}
        _insert(connection, "gpus", {**what, **size, "uuid": str(row["id"]), "kind": "cuda", "name": "GPU"})
    for row in world.jobs:
        _insert_job(connection, row, base)
    for row in world.attempts:
        _insert_attempt(connection, row)
    for row in world.allocations:
        owner = {"owner_attempt": row["attempt"]["id"]}
        what = {name: row[name] for name in ("id", "gpu_id", "exclusive", "bytes")}
        _insert(connection, "allocations", {**what, **owner})
    for row in world.checkpoints:
        job = row["attempt"]["job"]
        of = {"project_id": job["project"]["id"], "job_id": job["id"], "attempt_id": row["attempt"]["id"]}
        what = {"object_prefix": "a/x", "files": "[]", "bytes": 1, "metrics": "{}", "created_at": _moment(row["at"])}
        _insert(connection, "checkpoints", {"id": row["id"], "step": row["step"], **of, **what})
    for hold in world.holds:
        project = next(job for job in world.jobs if job["id"] == hold.job_id)["project"]["id"]
        where = {"node_id": hold.node_id, "gpu_ids": list(hold.gpu_ids), "promised_at": _moment(hold.promised_at)}
        what = {"job_id": hold.job_id, "project_id": project, "kind": hold.kind.value, "gpu_class": hold.gpu_class}
        _insert(connection, "holds", {**what, **where})


def _insert_job(connection: psycopg.Connection, row: dict[str, Any], base: uuid.UUID) -> None:
    project = row["project"]
    same = (
        "id", "state", "gpus", "required_bytes", "priority", "urgent", "limit_s", "used_s", "gpu_class", "shareable",
        "preemptible", "engine_key", "engine_bytes",
    )  # fmt: skip
    dull = {
        "organization_id": project["organization_id"], "project_id": project["id"], "base_model_id": base, "model": "m",
        "training_file_id": project["id"], "seed": 1, "request": "{}", "hyperparameters": "{}", "model_name": "x",
        "fence": 0, "faults_without_progress": 0, "fault_step": 0, "event_seq": 0, "platform": "{}",
    }  # fmt: skip
    failed = {"finished_at": _moment(LONG_AGO), "error_code": "internal_error"} if row["state"] == "failed" else {}
    asked = {"node_labels": json.dumps(row["node_labels"]), "queued_at": _moment(row["queued_at"])}
    _insert(connection, "jobs", {**dull, **{name: row[name] for name in same}, **asked, **failed})


def _insert_attempt(connection: psycopg.Connection, row: dict[str, Any]) -> None:
    job, live = row["job"], row["state"] == "running"
    at = row["assigned_at"]
    began = None if row["first_step_after"] is None else _moment(at + row["first_step_after"])
    given = {
        "id": row["id"], "project_id": job["project"]["id"], "job_id": job["id"], "no": 1, "state": row["state"],
        "node_id": row["node_id"], "rate": row["rate"], "limit_s": row["limit_s"], "assigned_at": _moment(at),
        "claimed_at": _moment(at), "first_step_at": began, "fault": row["fault"], "start_step": 0,
        "last_event_seq": 0, "log_bytes": 0, "stop_by": row["stop_by"] and _moment(row["stop_by"]),
        "stop_reason": "preempt" if row["stop_by"] else None,
        "lease_expires_at": _moment(at) if live else None, "ended_at": None if live else _moment(at + 1),
    }  # fmt: skip
    _insert(connection, "attempts", given)
    taken = "UPDATE slots SET attempt_id = %s WHERE (node_id, no) = (SELECT node_id, no FROM slots WHERE node_id = %s "
    connection.execute(taken + "AND attempt_id IS NULL ORDER BY no LIMIT 1)", (row["id"], row["node_id"]))
    if row["preempted"] is not None:
        query = (
            "UPDATE attempts SET preempted_at = now() - make_interval(secs => %s), preempted_for = %s, "
            "preempted_for_project = %s WHERE id = %s"
        )
        connection.execute(query, (row["preempted"], job["id"], row["preempted_for"], row["id"]))


def _insert(connection: psycopg.Connection, table: str, row: dict[str, Any]) -> None:
    names, values = ", ".join(row), ", ".join(["%s"] * len(row))
    connection.execute(f"INSERT INTO {table} ({names}) VALUES ({values})", list(row.values()))  # pyright: ignore[reportArgumentType]


def _moment(at: float) -> datetime:
    return datetime.fromtimestamp(at, UTC)


def cap_of(row: dict[str, Any]) -> float:
    return math.inf if row["cap"] is None else row["cap"]
