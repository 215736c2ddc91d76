"""`python -m bench.queue_scale`: what `GET /v1/queue` and the budgets' loop cost on a large database. Uses no GPU.

1. `GET /v1/queue` as `tunery queue` asks for it, from the real api on real Postgres with its production settings, while
   10,000 jobs wait for comparison, then 100,000: those of 100 projects, then all of one project.
2. One round of the budgets' loop, with a budget for each of 100 projects and 1,000,000 rows of this month's ledger;
   and `GET /v1/budget` of one of them.

Everything lies in a throw-away home. About two minutes.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import structlog
from sqlalchemy import text

from bench.scheduler import Running, deployment, quantile
from scheduler.budgets import Budgets
from tunery import queue, tenancy
from tunery.db import transaction
from tunery.embedded import ports

PEPPER = "a pepper for benchmarks"
MOST_QUEUE_MS = 50.0


def main() -> int:
    options = _options()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(40))
    load = os.getloadavg()[0]
    with deployment() as running, api(running) as base_url:
        rows: dict[str, Any] = {"settings": running.settings_of("fsync", "synchronous_commit", "server_version")}
        print("postgres: " + ", ".join(f"{name}={value}" for name, value in rows["settings"].items()), flush=True)
        key = _key(running)
        rows["queue"] = []
        for more in (options.pending // 10, options.pending - options.pending // 10):
            with running.owner.transaction():
                running.crowd.submit(running.owner, more)
            running.owner.execute("VACUUM ANALYZE")
            what = f"{running.scalar('SELECT count(*) FROM jobs'):,} jobs of 100 projects"
            rows["queue"].append(ask(base_url, key, "/v1/queue", what, options.asks))
        _give_all_to_one(running)
        running.owner.execute("VACUUM ANALYZE")
        rows["queue"].append(ask(base_url, key, "/v1/queue", f"{options.pending:,} jobs of the one", options.asks))
        running.owner.execute("UPDATE jobs SET state = 'succeeded', finished_at = now()")
        _write_ledger(running, options.ledger)
        running.owner.execute("VACUUM ANALYZE")
        rows["round"] = rounds(running, options.rounds)
        rows["budget"] = ask(base_url, key, "/v1/budget", f"{options.ledger:,} rows in the ledger", options.asks)
    summary = _summary(rows, load, options)
    if options.out:
        options.out.write_text(json.dumps({"summary": summary, "rows": rows}, indent=2) + "\n")
    if load > 0.5:
        print(f"the machine was not quiet: its load was {load:.2f} at the start; take these as an upper bound")
    print(json.dumps(summary))
    return 0 if max(one["p50_ms"] for one in rows["queue"]) < MOST_QUEUE_MS else 1


def ask(base_url: str, key: str, path: str, what: str, count: int) -> dict[str, Any]:
    """One after the other, on one connection."""
    took: list[float] = []
    with httpx.Client(base_url=base_url, headers={"authorization": f"Bearer {key}"}, timeout=60) as client:
        for number in range(count + 3):
            began = time.perf_counter()
            client.get(path).raise_for_status()
            if number >= 3:
                took.append((time.perf_counter() - began) * 1e3)
    return _said(f"GET {path}, {what}", took)


def rounds(running: Running, count: int) -> dict[str, Any]:
    """What the leader does every `TUNERY_BUDGET_S`; nobody has used a budget up."""
    with transaction(running.scheduler_sessions) as session:
        epoch = queue.lead(session, "bench", 3600)
    assert epoch is not None
    budgets = Budgets(running.scheduler_sessions, 120)
    took: list[float] = []
    for number in range(count + 1):
        began = time.perf_counter()
        budgets.run(epoch)
        if number:
            took.append((time.perf_counter() - began) * 1e3)
    return _said("a round of the budgets' loop", took)


def _said(what: str, took: list[float]) -> dict[str, Any]:
    took.sort()
    found = {"what": what, "p50_ms": statistics.median(took), "p95_ms": quantile(took, 0.95)}
    print(f"{what}: p50 {found['p50_ms']:.1f} ms, p95 {found['p95_ms']:.1f} ms of {len(took)}", flush=True)
    return found


# ---- what is in the database -----------------------------------------------------------------------------------------


def _key(running: Running) -> str:
    """Of the project that is asked for."""
    project_id = running.scalar("SELECT id FROM projects ORDER BY name LIMIT 1")
    with transaction(running.sessions("tunery_migrate")) as session:
        session.execute(text("SET LOCAL ROLE tunery_owner"))
        _, key = tenancy.create_key(session, project_id, "bench", ["admin"], PEPPER)
    return key


def _give_all_to_one(running: Running) -> None:
    running.owner.execute(
        "UPDATE jobs SET project_id = p.id, organization_id = p.organization_id, training_file_id = f.id FROM "
        "(SELECT * FROM projects ORDER BY name LIMIT 1) p JOIN files f ON f.project_id = p.id"
    )


def _write_ledger(running: Running, count: int) -> None:
    """This month's, of ended attempts on the eight GPUs of a node each, and a budget for each project."""
    with running.owner.transaction():
        running.owner.execute("UPDATE jobs SET project_id = project_id WHERE false")
        running.owner.execute(
            """
            INSERT INTO attempts (id, project_id, job_id, no, state, node_id, start_step, last_event_seq, log_bytes,
              assigned_at, claimed_at, ended_at)
            SELECT gen_random_uuid(), j.project_id, j.id, k, 'succeeded', n.id, 0, 0, 0, now(), now(), now()
            FROM (SELECT id, project_id, row_number() OVER () AS place FROM jobs LIMIT %(jobs)s) j
            JOIN (SELECT id, row_number() OVER (ORDER BY name) AS place FROM nodes) n
              ON n.place = 1 + j.place %% (SELECT count(*) FROM nodes), generate_series(1, 25) k
            """,
            {"jobs": count // 200},
        )
        running.owner.execute(
            """
            INSERT INTO usage (id, organization_id, project_id, job_id, attempt_id, gpu_id, gpu_class, gpu_seconds,
              productive_s, price_per_hour, share)
            SELECT gen_random_uuid(), j.organization_id, a.project_id, a.job_id, a.id, g.id, g.gpu_class, 60, 60, 2.5, 1
            FROM attempts a JOIN jobs j ON j.id = a.job_id JOIN gpus g ON g.node_id = a.node_id
            """
        )
        running.owner.execute("INSERT INTO budgets (project_id, monthly_gpu_hours) SELECT id, 1000000 FROM projects")


# ---- the frame -------------------------------------------------------------------------------------------------------


@contextmanager
def api(running: Running) -> Iterator[str]:
    """`python -m api` with its production settings."""
    port = ports.choose(set())
    given = {
        "TUNERY_DATABASE_URL": running.url("tunery_api"),
        "TUNERY_REDIS_URL": running.servers.redis_url,
        "TUNERY_KEY_PEPPER": PEPPER,
        "TUNERY_API_PORT": str(port),
        **running.servers.s3_root.environment(),
    }
    clean = {name: value for name, value in os.environ.items() if not name.startswith("TUNERY_")}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen([sys.executable, "-m", "api"], env=clean | given, stdout=log, stderr=log)
        try:
            yield _answering(f"http://127.0.0.1:{port}", process)
        finally:
            process.terminate()
            process.wait(30)


def _answering(base_url: str, process: "subprocess.Popen[bytes]") -> str:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"{base_url}/healthz", timeout=1, trust_env=False).is_success:
                return base_url
        except httpx.TransportError:
            time.sleep(0.1)
    raise SystemExit("the api did not start")


def _summary(rows: dict[str, Any], load: float, options: argparse.Namespace) -> dict[str, Any]:
    few, many, one = rows["queue"]
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "device": f"{platform.processor() or platform.machine()} x {len(os.sched_getaffinity(0))}",
        "load_at_start": round(load, 2),
        **rows["settings"],
        "pending": options.pending,
        "ledger_rows": options.ledger,
        "queue_of_a_tenth_p50_ms": round(few["p50_ms"], 1),
        "queue_p50_ms": round(many["p50_ms"], 1),
        "queue_p95_ms": round(many["p95_ms"], 1),
        "queue_of_one_project_p50_ms": round(one["p50_ms"], 1),
        "budget_round_p50_ms": round(rows["round"]["p50_ms"], 1),
        "budget_get_p50_ms": round(rows["budget"]["p50_ms"], 1),
    }


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.queue_scale", description=__doc__)
    parser.add_argument("--pending", type=int, default=100_000)
    parser.add_argument("--ledger", type=int, default=1_000_000)
    parser.add_argument("--asks", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", type=Path, help="also write summary and rows to this file")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
