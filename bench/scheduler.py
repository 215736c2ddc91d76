"""`python -m bench.scheduler`: what a pass of the scheduler costs on a large cluster. Linux; uses no GPU.

The real scheduler object, its policy and its loops, on real Postgres with its production settings, in a throw-away
home: 10,000 waiting jobs of 100 projects, 1,000 GPUs on 125 nodes.

1. Assigning: every GPU is free; the loops run until each has a job. One job a decision, one commit a job. From the
   scheduler's start to the last assignment, so that leading, the first reading and the policy count.
2. A steady pass: every GPU is busy; one job ends, one pass follows. Reading, policy, reasons, start and commit.
3. Submitting through the service with 100 and with 100,000 jobs waiting.

About two minutes.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psycopg
import structlog
from pydantic import SecretStr
from sqlalchemy.engine import Engine

from bench.crowd import Crowd, begin
from scheduler import service
from scheduler.service import Scheduler
from tunery import bootstrap, ids, jobs, leases, queue
from tunery.db import Sessions, for_project, make_engine, make_sessions, transaction
from tunery.dispatch import Doorbell, connect
from tunery.embedded.home import Home
from tunery.embedded.identity import run_as
from tunery.embedded.servers import External, Servers
from tunery.settings import SchedulerSettings
from tunery.states import FailureCode
from tunery.tenancy import Identity

LEAST_ASSIGNMENTS_S, MOST_PASS_MS = 100.0, 50.0
_VERSIONS = ("sqlalchemy", "psycopg", "redis", "rq")


def main() -> int:
    options = _options()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(40))
    load = os.getloadavg()[0]
    with deployment() as running:
        rows: dict[str, Any] = {"settings": running.settings_of("fsync", "synchronous_commit", "server_version")}
        print("postgres: " + ", ".join(f"{name}={value}" for name, value in rows["settings"].items()), flush=True)
        rows["submit"] = [submit(running, 100, options.submits)]
        running.owner.execute("UPDATE jobs SET state = 'cancelled', finished_at = now() WHERE state <> 'cancelled'")
        with running.owner.transaction():
            running.crowd.submit(running.owner, options.pending)
        running.owner.execute("ANALYZE")
        rows["assign"] = assign(running)
        begin(running.owner)
        running.owner.execute("ANALYZE")
        rows["passes"] = steady(running, options.passes)
        rows["submit"].append(submit(running, options.many, options.submits))
    summary = _summary(rows, load)
    if options.out:
        options.out.write_text(json.dumps({"summary": summary, "rows": rows, "versions": _versions()}, indent=2) + "\n")
    if load > 0.5:
        print(f"the machine was not quiet: its load was {load:.2f} at the start; take these as a lower bound")
    last = {"assignments_per_s": round(summary["assignments_per_s"], 1), "pass_ms": round(summary["pass_p50_ms"], 1)}
    print(json.dumps(last))
    return 0 if last["assignments_per_s"] >= LEAST_ASSIGNMENTS_S and last["pass_ms"] < MOST_PASS_MS else 1


class Running:
    """Postgres and Valkey with a crowd in them."""

    def __init__(self, servers: Servers, crowd: Crowd) -> None:
        self.servers, self.crowd = servers, crowd
        self._passwords = {role: uuid.uuid4().hex for role in bootstrap.LOGIN_ROLES}
        self._engines: list[Engine] = []
        bootstrap.create_roles(servers.admin_url, self._passwords, bootstrap.DATABASE)
        bootstrap.migrate(self.url("tunery_migrate"))
        self.owner = psycopg.connect(self.url("tunery_migrate"), autocommit=True)
        self.owner.execute("SET ROLE tunery_owner")
        with self.owner.transaction():
            crowd.fill(self.owner)
        self.scheduler_sessions = self.sessions("tunery_scheduler")
        given = {"database_url": SecretStr("postgresql://unused"), "redis_url": SecretStr(servers.redis_url)}
        self.settings = SchedulerSettings(**given, claim_timeout_s=86400)  # nobody claims here
        self.doorbell = Doorbell(connect(servers.redis_url))

    def url(self, role: str) -> str:
        return bootstrap.url_for(self.servers.admin_url, role, self._passwords[role], bootstrap.DATABASE)

    def sessions(self, role: str, node_id: uuid.UUID | None = None) -> Sessions:
        self._engines.append(engine := make_engine(self.url(role)))
        return make_sessions(engine, node_id=node_id)

    def scheduler(self, holder: str) -> Scheduler:
        return Scheduler(self.scheduler_sessions, self.doorbell, self.settings, holder)

    def settings_of(self, *names: str) -> dict[str, str]:
        return {name: self.scalar(f"SHOW {name}") for name in names}

    def scalar(self, query: str, *values: Any) -> Any:
        row = self.owner.execute(query, values).fetchone()  # pyright: ignore[reportArgumentType]
        return row[0] if row else None

    def close(self) -> None:
        self.owner.close()
        for engine in self._engines:
            engine.dispose()


# ---- 1. assigning ----------------------------------------------------------------------------------------------------


def assign(running: Running) -> dict[str, Any]:
    """Until every GPU that can get a job has one."""
    stop = threading.Event()
    began = running.scalar("SELECT clock_timestamp()")
    loops = threading.Thread(target=running.scheduler("assign").run, args=(stop,))
    loops.start()
    before = -1
    while (now := running.scalar("SELECT count(*) FROM attempts")) != before or not now:
        before = now
        time.sleep(2)
    stop.set()
    loops.join()
    last = running.scalar("SELECT max(assigned_at) FROM attempts")
    first = running.scalar("SELECT min(assigned_at) FROM attempts")
    took = (last - began).total_seconds()
    busy = running.scalar("SELECT count(*) FROM gpus WHERE reserved_bytes > 0")
    found = {"jobs": before, "gpus": busy, "seconds": took, "first_s": (first - began).total_seconds()}
    print(
        f"assigned {before} jobs on {busy} GPUs in {took:.1f} s: {before / took:.0f}/s "
        f"(the first after {found['first_s']:.2f} s)",
        flush=True,
    )
    return found


# ---- 2. a steady pass ------------------------------------------------------------------------------------------------


def steady(running: Running, count: int) -> list[dict[str, float]]:
    """One job ends, one pass follows, as the loop calls it."""
    scheduler = running.scheduler("steady")
    running.owner.execute("UPDATE leader SET expires_at = now()")
    workers = running.sessions("tunery_worker").kw["bind"]
    found: list[dict[str, float]] = []
    with _clocks() as parts:
        for number in range(count + 10):
            scheduler.lead()
            _end_one(running, workers)
            parts.clear()
            began = time.perf_counter()
            started = scheduler.decide()
            took = time.perf_counter() - began
            if number >= 10:  # the mirror, plans and caches are warm
                found.append({"pass_s": took, "started": started, **parts})
            begin(running.owner)
    times = sorted(row["pass_s"] for row in found)
    starts = sum(row["started"] for row in found)
    print(
        f"steady pass: p50 {statistics.median(times) * 1e3:.1f} ms, p95 {quantile(times, 0.95) * 1e3:.1f} ms of "
        f"{len(times)} passes, {starts:.0f} starts",
        flush=True,
    )
    for name in ("snapshot", "policy", "apply"):
        print(f"  {name:<9} {statistics.median(row[name] for row in found) * 1e3:.1f} ms", flush=True)
    return found


def _end_one(running: Running, workers: Engine) -> None:
    """As the supervisor of a job whose spec is wrong."""
    row = running.owner.execute(
        "SELECT a.id, a.fence, a.node_id FROM attempts a JOIN jobs j ON j.id = a.job_id "
        "WHERE a.state = 'running' AND j.gpus = 1 ORDER BY random() LIMIT 1"
    ).fetchone()
    assert row is not None
    attempt_id, fence, node_id = row
    with transaction(make_sessions(workers, node_id=node_id)) as session:
        leases.fail(session, leases.hold(session, attempt_id, fence), FailureCode.INVALID_SPEC, "It ends here.")


@contextmanager
def _clocks() -> Iterator[dict[str, float]]:
    """Seconds of the parts of a pass."""
    parts: dict[str, float] = {}

    def timed(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **named: Any) -> Any:
            began = time.perf_counter()
            try:
                return work(*args, **named)
            finally:
                parts[name] = time.perf_counter() - began

        return run

    before = queue.snapshot, service.schedule, queue.apply
    queue.snapshot, service.schedule = timed("snapshot", queue.snapshot), timed("policy", service.schedule)
    queue.apply = timed("apply", queue.apply)
    try:
        yield parts
    finally:
        queue.snapshot, service.schedule, queue.apply = before


# ---- 3. submitting ---------------------------------------------------------------------------------------------------


def submit(running: Running, pending: int, count: int) -> dict[str, float]:
    """One caller after the other, in as many projects as there are, as the api does it."""
    waiting = running.scalar("SELECT count(*) FROM jobs WHERE state = 'queued'")
    with running.owner.transaction():
        running.crowd.submit(running.owner, pending - waiting)
    running.owner.execute("ANALYZE")
    api = running.sessions("tunery_api")
    who = _callers(running)
    took: list[float] = []
    for number in range(count + 5):
        identity, file_id = who[number % len(who)]
        request = jobs.Request(model="bench", training_file=file_id, seed=7)
        began = time.perf_counter()
        with transaction(lambda project=identity.project_id: for_project(api, project)) as session:
            jobs.submit(session, identity, request, max_live=1_000_000)
        if number >= 5:
            took.append(time.perf_counter() - began)
    took.sort()
    found = {"pending": pending, "p50_s": statistics.median(took), "p95_s": quantile(took, 0.95)}
    print(
        f"submit with {pending:>7,} waiting: p50 {found['p50_s'] * 1e3:.1f} ms, p95 {found['p95_s'] * 1e3:.1f} ms",
        flush=True,
    )
    return found


def _callers(running: Running) -> list[tuple[Identity, str]]:
    rows = running.owner.execute(
        "SELECT o.id, o.name, p.id, p.name, f.id FROM projects p JOIN organizations o ON o.id = p.organization_id "
        "JOIN files f ON f.project_id = p.id ORDER BY p.name"
    ).fetchall()
    admin = frozenset({"admin"})
    return [
        (Identity(org, org_name, project, name, uuid.uuid4(), "bench", admin, None), ids.encode(ids.FILE, file_id))
        for org, org_name, project, name, file_id in rows
    ]


def quantile(ordered: list[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


# ---- the frame -------------------------------------------------------------------------------------------------------


@contextmanager
def deployment() -> Iterator[Running]:
    """The servers of `tunery up`, with a cluster that exists in the database alone."""
    home = Home(Path(tempfile.mkdtemp(prefix="bench-scheduler-")), run_as(os.environ.get("TUNERY_RUN_AS")))
    home.create()
    servers = Servers(home, External(), ())
    servers.start()
    try:
        running = Running(servers, Crowd())
        try:
            yield running
        finally:
            running.close()
    finally:
        servers.stop()


def _summary(rows: dict[str, Any], load: float) -> dict[str, Any]:
    times = sorted(row["pass_s"] for row in rows["passes"])
    few, many = rows["submit"]
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "device": f"{platform.processor() or platform.machine()} x {len(os.sched_getaffinity(0))}",
        "load_at_start": load,
        **rows["settings"],
        "assignments_per_s": rows["assign"]["jobs"] / rows["assign"]["seconds"],
        "pass_p50_ms": statistics.median(times) * 1e3,
        "pass_p95_ms": quantile(times, 0.95) * 1e3,
        **{
            f"{part}_p50_ms": statistics.median(row[part] for row in rows["passes"]) * 1e3
            for part in ("snapshot", "policy", "apply")
        },
        "submit_p50_ms": {str(one["pending"]): one["p50_s"] * 1e3 for one in (few, many)},
        "submit_p95_ms": {str(one["pending"]): one["p95_s"] * 1e3 for one in (few, many)},
    }


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in _VERSIONS}}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.scheduler", description="What a scheduler's pass costs.")
    parser.add_argument("--pending", type=int, default=10_000)
    parser.add_argument("--passes", type=int, default=200)
    parser.add_argument("--submits", type=int, default=200)
    parser.add_argument("--many", type=int, default=100_000)
    parser.add_argument("--out", type=Path, help="also write summary, rows and versions to this file")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
