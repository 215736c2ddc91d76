"""A whole deployment for one test: a fresh database, real scheduler, node and api processes, short clocks.

Every process can be killed, and can be given ways of its own: `running.node("a", via=Via(postgres=proxy))`.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from pydantic import SecretStr
from sqlalchemy import event, select, text
from sqlalchemy.engine import Engine
from sqlalchemy.orm import Session

from tests.chaos.proxy import Proxy
from tests.servers import database_url, passwords, servers
from tunery import bootstrap, ids, jobs, tenancy, waiting
from tunery.db import Sessions, for_project, make_engine, make_sessions, transaction
from tunery.embedded import ports
from tunery.embedded.servers import Servers
from tunery.models import AdapterVersion, Allocation, Attempt, BaseModel, Checkpoint, Event, File, Gpu, Job, Slot
from tunery.recipes import Extension
from tunery.settings import StorageSettings
from tunery.storage import Storage
from worker import locks, processes

ROOT = Path(__file__).parent.parent
CLOCKS = {
    "LEASE_S": "3",
    "RENEW_S": "0.4",
    "LOST_GRACE_S": "1",
    "CLAIM_TIMEOUT_S": "10",
    "LEADER_TTL_S": "2",
    "LEADER_RENEW_S": "0.4",
    "POLL_S": "0.5",
    "TICK_S": "0.5",
    "DECIDE_S": "0.1",
    "SWEEP_S": "0.5",
    "STOP_GRACE_S": "5",
    "LOG_CHUNK_S": "0.5",
}
CARD = {
    "hub_id": "example/tiny", "revision": "0" * 40, "source": "test", "license": "apache-2.0", "parameters": 1000,
    "hidden_size": 8, "num_hidden_layers": 1, "intermediate_size": 8, "vocab_size": 16, "files": [],
}  # fmt: skip
ROWS = b"".join(
    json.dumps({"messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": f"a{n}"}]}).encode()
    + b"\n"
    for n in range(12)
)


PEPPER = "a pepper for fleets"


@dataclass(frozen=True)
class Via:
    """The proxies by which a process reaches the servers; None is the direct way."""

    postgres: Proxy | None = None
    valkey: Proxy | None = None
    s3: Proxy | None = None


class Fleet:
    """Start processes, submit jobs, look at what happened. `close` ends every process that was started.

    Its own looks at the database and the object store take the direct way, whatever its processes are told.
    """

    def __init__(
        self, trainer: str = "tests.fake_trainer", *, on: Servers | None = None, via: Via | None = None
    ) -> None:
        self.servers, self.via = on or servers(), via or Via()
        self.api_url = ""
        self.database = f"t{uuid.uuid4().hex[:12]}"
        bootstrap.create_roles(self.servers.admin_url, passwords(), self.database)
        bootstrap.migrate(self.url("tunery_migrate"))
        self.home = Path(tempfile.mkdtemp(prefix="tunery-fleet-"))
        self.trainer = trainer
        self.processes: list[subprocess.Popen[bytes]] = []
        self._engines: list[Engine] = []
        self.owner = self._sessions("tunery_migrate", owner=True)
        self.api = self._sessions("tunery_api")
        root = self.servers.s3_root
        self.storage = Storage(
            StorageSettings(
                s3_endpoint_url=root.endpoint_url,
                s3_bucket=root.bucket,
                s3_access_key_id=SecretStr(root.access_key_id),
                s3_secret_access_key=SecretStr(root.secret_access_key),
            )
        )
        self.organization_id: uuid.UUID
        self.project_id = self.project("first")
        with transaction(self.owner) as session:
            model = BaseModel(name="tiny", request={}, card=CARD, state="ready", object_prefix="a/base/none")
            model.hub_id, model.revision, model.source = CARD["hub_id"], CARD["revision"], CARD["source"]
            model.license, model.parameters = CARD["license"], CARD["parameters"]
            session.add(model)
            session.flush()
            self.base_id = model.id

    def url(self, role: str, proxy: Proxy | None = None) -> str:
        direct = database_url(role, self.database, self.servers)
        return proxy.reach(direct) if proxy else direct

    def _sessions(self, role: str, *, owner: bool = False) -> Sessions:
        engine = make_engine(self.url(role))
        self._engines.append(engine)
        if owner:

            @event.listens_for(engine, "connect")
            def _own(connection: Any, _record: Any) -> None:
                connection.execute("SET ROLE tunery_owner")
                connection.commit()

        return make_sessions(engine)

    # ---- tenants and jobs -------------------------------------------------------------------------------------

    def project(self, name: str) -> uuid.UUID:
        with transaction(self.owner) as session:
            if not hasattr(self, "organization_id"):
                self.organization_id = tenancy.create_organization(session, f"org {self.database}").id
            return tenancy.create_project(session, self.organization_id, name).id

    def submit(
        self,
        suffix: str,
        *,
        steps: int = 20,
        save_steps: int = 10,
        project_id: uuid.UUID | None = None,
        rows: bytes = ROWS,
    ) -> uuid.UUID:
        """Through the same service as the API, as the API's role."""
        project_id = project_id or self.project_id
        file_id, sha = uuid.uuid4(), hashlib.sha256(rows).hexdigest()
        file = File(
            id=file_id, project_id=project_id, filename="rows.jsonl", purpose="fine-tune", bytes=len(rows), sha256=sha
        )
        file.object_key = f"u/{project_id}/{file_id}"
        self.storage.put_bytes(file.object_key, rows)
        training = {"max_steps": steps, "save_steps": save_steps}
        who = tenancy.Identity(
            self.organization_id, "Acme", project_id, "p", uuid.uuid4(), "k", frozenset({"admin"}), None
        )
        with transaction(lambda: for_project(self.api, project_id)) as session:
            session.add(file)
            session.flush()
            request = jobs.Request(
                model="tiny",
                training_file=ids.encode(ids.FILE, file_id),
                suffix=suffix,
                extension=Extension.model_validate({"training": training}),
            )
            return jobs.submit(session, who, request, max_live=100).id

    # ---- processes ---------------------------------------------------------------------------------------------

    def scheduler(self, name: str = "", *, via: Via | None = None, **more: str) -> subprocess.Popen[bytes]:
        """`more` are settings without their prefix: `LEASE_S="5"`; `PRELOAD` is a library that goes before libc."""
        return self._start("scheduler", name, "tunery_scheduler", via, {}, more)

    def node(
        self, name: str = "node", *, via: Via | None = None, tree: Path = ROOT, **more: str
    ) -> subprocess.Popen[bytes]:
        """`tree` holds the node's code: that of another release, for tests of upgrades."""
        own = {
            "TUNERY_HOME": str(self.home / name),
            "TUNERY_NODE_NAME": f"{name}-{self.database}",
            "TUNERY_TRAINER_MODULE": self.trainer,
            "TUNERY_MODEL_STORE": str(self.home / "models"),
        }
        (self.home / "models" / str(self.base_id)).mkdir(parents=True, exist_ok=True)
        (self.home / "models" / str(self.base_id) / "COMPLETE").touch()
        identity = self._s3(self.servers.s3_node.environment(), via)
        own |= identity | {"PYTHONPATH": str(tree)}
        return self._start("worker", "" if name == "node" else name, "tunery_worker", via, own, more, tree)

    def serve_api(self, *, via: Via | None = None, **more: str) -> subprocess.Popen[bytes]:
        """`python -m api` at `api_url`; a second start after a kill serves at the same address."""
        if not self.api_url:
            self.api_url = f"http://127.0.0.1:{ports.choose(set())}"
        own = {"TUNERY_KEY_PEPPER": PEPPER, "TUNERY_API_PORT": self.api_url.rpartition(":")[2]}
        identity = self._s3(self.servers.s3_root.environment(), via)
        started = self._start("api", "", "tunery_api", via, own | identity, more)
        self.until(lambda: started.poll() is not None or _answers(self.api_url), 60)
        return started

    def client(self, *, timeout_s: float = 20, url: str = "") -> httpx.Client:
        """HTTP with a key of the first project; `url` is the api's own, or that of a proxy before it."""
        with transaction(self.owner) as session:
            _, key = tenancy.create_key(session, self.project_id, "fleet", ["admin"], PEPPER)
        headers = {"authorization": f"Bearer {key}"}
        return httpx.Client(base_url=url or self.api_url, headers=headers, timeout=timeout_s, trust_env=False)

    def _s3(self, identity: dict[str, str], via: Via | None) -> dict[str, str]:
        proxy = (via or self.via).s3
        endpoint = identity["TUNERY_S3_ENDPOINT_URL"]
        return identity | ({"TUNERY_S3_ENDPOINT_URL": proxy.reach(endpoint)} if proxy else {})

    def _start(
        self,
        module: str,
        name: str,
        role: str,
        via: Via | None,
        own: dict[str, str],
        more: dict[str, str],
        tree: Path = ROOT,
    ) -> subprocess.Popen[bytes]:
        clean = {key: value for key, value in os.environ.items() if not key.startswith("TUNERY_")}
        clocks = {f"TUNERY_{key}": value for key, value in (CLOCKS | more).items()}
        ways = via or self.via
        redis_url = self.servers.redis_url
        common = {
            "TUNERY_DATABASE_URL": self.url(role, ways.postgres),
            "TUNERY_REDIS_URL": ways.valkey.reach(redis_url) if ways.valkey else redis_url,
            "TUNERY_FLEET": self.database,
        }
        if (preload := more.get("PRELOAD")) is not None:
            clean["LD_PRELOAD"] = preload
        with (self.home / f"{'-'.join(filter(None, (module, name)))}.log").open("ab") as out:
            started = subprocess.Popen(
                [sys.executable, "-m", module], env=clean | common | own | clocks, cwd=tree, stdout=out, stderr=out
            )
        self.processes.append(started)
        return started

    def supervisor_pid(self, attempt_id: uuid.UUID, node: str = "node") -> int:
        return int((self.home / node / "attempts" / f"{attempt_id}.lock").read_text())

    def trainer_pids(self, attempt_id: uuid.UUID) -> list[int]:
        return processes.marked(str(attempt_id))

    def close(self) -> None:
        for process in self.processes:
            process.kill()  # of a stopped one, too
            process.wait()
        for lock in self.home.glob("*/attempts/*.lock"):
            if locks.is_taken(lock):
                os.kill(int(lock.read_text()), signal.SIGKILL)
            processes.end_all(lock.stem)
        for engine in self._engines:
            engine.dispose()

    # ---- looking -------------------------------------------------------------------------------------------------

    @contextmanager
    def look(self) -> Iterator[Session]:
        """As the owner: every project's rows."""
        with transaction(self.owner) as session:
            yield session

    def state(self, job_id: uuid.UUID) -> str:
        with self.look() as session:
            return session.scalar(select(Job.state).where(Job.id == job_id)) or ""

    def until(self, what: Callable[[], Any], timeout_s: float = 30) -> Any:
        """Poll until `what` is truthy; fails with the logs' tails."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if found := what():
                return found
            time.sleep(0.05)
        raise AssertionError("timed out\n" + self.tails())

    def ends(self, job_id: uuid.UUID, timeout_s: float = 60) -> str:
        return self.until(
            lambda: state if (state := self.state(job_id)) in ("succeeded", "failed", "cancelled") else None, timeout_s
        )

    def attempts(self, job_id: uuid.UUID) -> list[Attempt]:
        with self.look() as session:
            return list(session.scalars(select(Attempt).where(Attempt.job_id == job_id).order_by(Attempt.no)))

    def why(self, job_id: uuid.UUID) -> str:
        """Why it waits, as its project is told; empty while nobody has said."""
        with self.look() as session:
            job = jobs.view_of(session.get_one(Job, job_id))
            reason = waiting.reason_of(jobs.queue_view(session, job.project_id), job)
        return waiting.message(reason, job) if reason else ""

    def step(self, job_id: uuid.UUID) -> int:
        with self.look() as session:
            progress = session.scalar(select(Job.progress).where(Job.id == job_id))
        return (progress or {}).get("step", 0)

    def newest_checkpoint(self, job_id: uuid.UUID) -> int:
        with self.look() as session:
            steps = select(Checkpoint.step).where(Checkpoint.job_id == job_id).order_by(Checkpoint.step.desc())
            return session.scalar(steps.limit(1)) or 0

    def messages(self, job_id: uuid.UUID) -> list[str]:
        with self.look() as session:
            return list(session.scalars(select(Event.message).where(Event.job_id == job_id).order_by(Event.seq)))

    def versions(self, job_id: uuid.UUID) -> list[AdapterVersion]:
        with self.look() as session:
            return list(session.scalars(select(AdapterVersion).where(AdapterVersion.job_id == job_id)))

    def steps_trained(self, job_id: uuid.UUID) -> list[tuple[int, list[int]]]:
        """Attempt number and the steps whose loss it reported."""
        query = text(
            "SELECT c.attempt_no, array_agg(s ORDER BY s) AS steps "
            "FROM metric_chunks c JOIN metric_series m ON m.id = c.series_id, unnest(c.steps) s "
            "WHERE m.job_id = :job AND m.name = 'train/loss' GROUP BY 1 ORDER BY 1"
        )
        with self.look() as session:
            return [(row.attempt_no, list(row.steps)) for row in session.execute(query, {"job": job_id})]

    def nothing_held(self) -> bool:
        with self.look() as session:
            held = session.scalars(select(Allocation.id).where(Allocation.released_at.is_(None))).all()
            reserved = session.scalars(select(Gpu.id).where(Gpu.reserved_bytes > 0)).all()
            slots = session.scalars(select(Slot.no).where(Slot.attempt_id.is_not(None))).all()
        return not (held or reserved or slots)

    def nothing_left(self, node: str = "node") -> bool:
        """No process of any attempt, and no workspace."""
        folders = [path for path in (self.home / node / "attempts").iterdir() if path.is_dir()]
        ours = {str(path.stem) for path in (self.home / node / "attempts").glob("*.log")}
        return not folders and not any(processes.marked(attempt) for attempt in ours)

    def tails(self) -> str:
        logs = [*self.home.glob("*.log"), *self.home.glob("*/attempts/*.log")]
        return "\n".join(f"--- {path.name}\n{path.read_text()[-3000:]}" for path in logs)


@contextmanager
def fleet(trainer: str = "tests.fake_trainer", *, on: Servers | None = None, via: Via | None = None) -> Iterator[Fleet]:
    running = Fleet(trainer, on=on, via=via)
    try:
        yield running
    finally:
        running.close()


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/healthz", timeout=1, trust_env=False).is_success
    except httpx.TransportError:
        return False


def rows_of(count: int) -> bytes:
    return ROWS[: sum(len(line) + 1 for line in ROWS.splitlines()[:count])]
