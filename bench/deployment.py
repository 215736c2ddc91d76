"""A deployment for a benchmark: `tunery up` with production clocks and embedded servers, in a throw-away home.

Everything that is timed goes through the public API; what cannot be seen there (when an attempt was assigned, when a
step was said) is read from the database and the logs afterwards: looking costs nothing while something is timed.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import httpx
import psycopg

from tunery import ids
from tunery.embedded import ports
from tunery.embedded.home import Home
from tunery.embedded.identity import run_as

T = TypeVar("T")
TERMINAL = ("succeeded", "failed", "cancelled")


class Deployment:
    """Started by `deployment()`. `environment` holds settings for its programs."""

    def __init__(self, **environment: str) -> None:
        self.home = Home(Path(tempfile.mkdtemp(prefix="tunery-bench-")), run_as(os.environ.get("TUNERY_RUN_AS")))
        self.home.create()
        clean = {name: value for name, value in os.environ.items() if not name.startswith("TUNERY_")}
        self._environment = clean | environment | {"TUNERY_HOME": str(self.home.root)}
        self.command("up", "-d", "--port", str(ports.choose(set())))
        known = json.loads(self.home.profile.read_text())
        self.url, self._key = known["api_url"], known["api_key"]
        self.api = self.client()

    def client(self) -> httpx.Client:
        headers = {"authorization": f"Bearer {self._key}"}
        return httpx.Client(base_url=f"{self.url}/v1", headers=headers, timeout=60, trust_env=False)

    def command(self, *arguments: str) -> str:
        """One `tunery` command."""
        command = [sys.executable, "-m", "tunery.cli", *arguments]
        done = subprocess.run(command, env=self._environment, capture_output=True, text=True, timeout=300)
        if done.returncode:
            raise RuntimeError(f"tunery {' '.join(arguments)}: {done.stdout}{done.stderr}")
        return done.stdout

    def close(self) -> None:
        self.api.close()
        self.command("down", "--purge", "-y")

    # ---- jobs --------------------------------------------------------------------------------------------------------

    def upload(self, rows: bytes) -> str:
        sent = {"file": ("rows.jsonl", rows)}
        answer = self.api.post("/files", data={"purpose": "fine-tune"}, files=sent).raise_for_status()
        return answer.json()["id"]

    def submit(self, file_id: str, training: dict[str, Any], model: str = "bench") -> str:
        body = {"model": model, "training_file": file_id, "seed": 7, "tunery": {"training": training}}
        return self.api.post("/fine_tuning/jobs", json=body).raise_for_status().json()["id"]

    def cancel(self, job_id: str) -> None:
        self.api.post(f"/fine_tuning/jobs/{job_id}/cancel")

    def state(self, job_id: str) -> str:
        return self.api.get(f"/fine_tuning/jobs/{job_id}").raise_for_status().json()["tunery"]["state"]

    def ends(self, job_id: str, timeout_s: float = 300) -> str:
        return until(lambda: state if (state := self.state(job_id)) in TERMINAL else None, timeout_s, every_s=0.25)

    # ---- what the API does not show ----------------------------------------------------------------------------------

    def rows(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        """As the owner of the tables."""
        port, secrets = self.home.state()["ports"]["postgres"], self.home.secrets()
        url = f"postgresql://tunery_migrate:{secrets.get('role_tunery_migrate')}@{ports.HOST}:{port}/tunery"
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute("SET ROLE tunery_owner")
            cursor = connection.execute(query, values)  # pyright: ignore[reportArgumentType]
            return cursor.fetchall() if cursor.description else []

    def steps(self, job_id: str) -> dict[int, tuple[float, float]]:
        """Unix time and loss of each step, as the trainer said them."""
        query = (
            "SELECT (data->>'step')::int, created_at, (data->>'train_loss')::float8 FROM events "
            "WHERE job_id = %s AND type = 'metrics'"
        )
        found = self.rows(query, ids.decode(ids.JOB, job_id))
        return {step: (at.timestamp(), loss) for step, at, loss in found}

    def milestones(self, job_id: str) -> dict[str, float]:
        """Unix times on the way from acceptance to the trainer's first line."""
        job = ids.decode(ids.JOB, job_id)
        [(attempt, assigned, claimed)] = self.rows(
            "SELECT id, assigned_at, claimed_at FROM attempts WHERE job_id = %s AND no = 1", job
        )
        first = "SELECT min(created_at) FROM events WHERE job_id = %s AND "
        [(checked,)] = self.rows(first + "message LIKE 'Files validated%%'", job)
        [(said,)] = self.rows(first + "data->>'kind' = 'phase'", job)
        node = _logged(self.home.logs / "node.log", str(attempt))
        supervisor = _logged(self.home.node / "attempts" / f"{attempt}.log", str(attempt))
        return {
            "rows checked": checked.timestamp(),
            "assigned": assigned.timestamp(),
            "supervisor started": node["supervisor started"],
            "claimed": claimed.timestamp(),
            "trainer process": supervisor["trainer started"],
            "trainer's first line": said.timestamp(),
        }


def _logged(path: Path, attempt: str) -> dict[str, float]:
    """When each message about an attempt was logged first."""
    found: dict[str, float] = {}
    for line in path.read_text().splitlines():
        if attempt not in line or not line.startswith("{"):
            continue
        entry = json.loads(line)
        found.setdefault(entry["message"], datetime.fromisoformat(entry["time"]).timestamp())
    return found


def until(what: Callable[[], T | None], timeout_s: float = 120, every_s: float = 0.02) -> T:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if found := what():
            return found
        time.sleep(every_s)
    raise TimeoutError(f"nothing after {timeout_s} s")


@contextmanager
def deployment(**environment: str) -> Iterator[Deployment]:
    running = Deployment(**environment)
    try:
        yield running
    finally:
        running.close()
