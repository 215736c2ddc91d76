"""What chaos plays on: two nodes, two schedulers and an api on servers of their own, every link through a proxy.

As root each node's home is a file system of its own, which can be frozen: a disk that hangs.
"""

import json
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

import psycopg
from sqlalchemy import select, update
from sqlalchemy.exc import SQLAlchemyError

from tests.chaos import history, witness
from tests.chaos.evidence import Blocked, History, Hurt, Told
from tests.chaos.faults import PASS
from tests.chaos.proxy import Proxy
from tests.chaos.treasury import books
from tests.chaos.workload import Workload
from tests.fleet import CLOCKS, PEPPER, Fleet, Via
from tests.servers import private_servers
from tunery import tenancy
from tunery.db import transaction
from tunery.models import BaseModel, Budget, Node, Project
from worker import inventory, locks, processes

NODES, SCHEDULERS = ("node-a", "node-b", "node-c"), ("scheduler-1", "scheduler-2")
DEVICES = 2
"""Of each node, where there is no GPU: two make a gang possible."""
POLICY = {"MIN_RUNTIME_S": "1", "BUDGET_S": "0.3"}
"""Attempts are short here; they may be moved soon, and use a budget up soon."""
PRODUCTION = {
    "LEASE_S": "45", "RENEW_S": "10", "LOST_GRACE_S": "30", "CLAIM_TIMEOUT_S": "60", "LEADER_TTL_S": "6",
    "LEADER_RENEW_S": "2", "POLL_S": "5", "TICK_S": "10", "DECIDE_S": "0.5", "SWEEP_S": "5", "STOP_GRACE_S": "120",
    "LOG_CHUNK_S": "5", "BUDGET_S": "10",
}  # fmt: skip


class Program:
    """One process of ours, started again under the same name."""

    def __init__(self, name: str, launch: Callable[[], subprocess.Popen[bytes]]) -> None:
        self.name = name
        self.kind = name.partition("-")[0]
        self.starts = 0
        self._launch = launch
        self._process: subprocess.Popen[bytes] | None = None
        self._wanted = False
        self._lock = threading.Lock()

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    def start(self) -> None:
        with self._lock:
            self._wanted = True
            if self.pid is not None:
                return
            self._process = self._launch()
            self.starts += 1

    def signal(self, number: signal.Signals) -> None:
        """Nobody starts it again by itself after this."""
        self._wanted = False
        if self._process is not None and self.pid is not None:
            self._process.send_signal(number)

    def tend(self) -> None:
        """What ended by itself is started again, as any service manager would."""
        if self._wanted and self.pid is None:
            self.start()


class Disk:
    """A file system in a file, mounted at a node's home; `freeze` makes every write to it wait."""

    def __init__(self, at: Path, mib: int = 4096) -> None:
        self.at, self._image = at, at.with_suffix(".img")
        at.mkdir(parents=True)
        with self._image.open("wb") as file:
            file.truncate(mib * 1024 * 1024)
        _run("mkfs.ext4", "-q", "-m", "0", str(self._image))
        _run("mount", "-o", "loop,noatime", str(self._image), str(at))

    def freeze(self) -> bool:
        """False if it hangs already."""
        return subprocess.run(["fsfreeze", "--freeze", str(self.at)], capture_output=True).returncode == 0

    def thaw(self) -> None:
        with suppress(subprocess.CalledProcessError):
            _run("fsfreeze", "--unfreeze", str(self.at))

    def close(self) -> None:
        self.thaw()
        for _ in range(20):
            if subprocess.run(["umount", str(self.at)], capture_output=True).returncode == 0:
                break
            time.sleep(0.2)
        self._image.unlink(missing_ok=True)


class Deployment:
    def __init__(
        self, *, trainer: str = "fake", clocks: dict[str, str] | None = None, nodes: Sequence[str] = NODES[:2]
    ) -> None:
        self._exit = ExitStack()
        self.servers = self._exit.enter_context(private_servers())
        self.fleet = Fleet(f"tests.chaos.watched_{trainer}", on=self.servers)
        self.clocks = clocks or {}
        self.nodes = nodes
        self.disks = {name: disk for name in nodes if (disk := self._disk(name))}
        self.links = {
            name: {
                "postgres": self._proxy(self.servers.admin_url),
                "valkey": self._proxy(self.servers.redis_url),
                "s3": self._proxy(self.servers.s3_root.endpoint_url, http=True),
            }
            for name in (*nodes, *SCHEDULERS, "api")
        }
        self._bases(trainer)
        self.programs = {name: Program(name, self._launcher(name)) for name in ("api", *SCHEDULERS, *nodes)}
        with transaction(self.fleet.owner) as session:
            second = session.get_one(Project, self.fleet.project("second"))
            # both may be moved off by the other: one by its guarantee, one by its share
            second.guarantee, second.cap = 1, DEVICES * len(nodes) - 1
            keys = [
                tenancy.create_key(session, id, "chaos", ["admin"], PEPPER) for id in (self.fleet.project_id, second.id)
            ]
            self.api_keys = [key for _, key in keys]
            self.projects = [self.fleet.project_id, second.id]
        self.hurt: list[Hurt] = []
        self.killed: dict[uuid.UUID, float] = {}
        """Attempts whose trainer or supervisor was killed, and when it was first."""
        self.blocked: list[Blocked] = []
        for program in self.programs.values():
            program.start()
        self._over = threading.Event()
        # servers and programs apart: a program that starts may wait for a server that has to be restarted
        self._caretakers = [threading.Thread(target=self._tend_servers), threading.Thread(target=self._tend_programs)]
        for thread in self._caretakers:
            thread.start()
        self.api_url = self.fleet.api_url
        self.redis_url = self.servers.redis_url

    def program(self, name: str) -> Program:
        return self.programs[name]

    def of_kind(self, kind: str) -> list[Program]:
        return [program for program in self.programs.values() if program.kind == kind]

    def pids(self, kind: str, attempt_id: uuid.UUID) -> list[int]:
        """Of an attempt's trainer, or of its supervisor."""
        if kind == "trainer":
            return processes.marked(str(attempt_id))
        for name in self.nodes:
            lock = self.fleet.home / name / "attempts" / f"{attempt_id}.lock"
            with suppress(OSError, ValueError):
                if locks.is_taken(lock):
                    return [int(lock.read_text())]
        return []

    def step(self, job_id: uuid.UUID) -> int:
        return self.fleet.step(job_id)

    def node_of(self, node_id: uuid.UUID) -> str:
        with self.fleet.look() as session:
            name = session.scalar(select(Node.name).where(Node.id == node_id)) or ""
        return name.removesuffix(f"-{self.fleet.database}")

    def server_pid(self, name: str) -> int | None:
        return self.servers.children[name].pid

    def link(self, name: str, program: str) -> list[Proxy]:
        """`node-postgres` is one node's way to Postgres; `valkey-link` everybody's to Valkey."""
        if name == "valkey-link":
            return [ways["valkey"] for ways in self.links.values()]
        return [self.links[program][name.partition("-")[2]]]

    def end_sessions(self) -> None:
        with suppress(psycopg.Error), psycopg.connect(self.servers.admin_url, connect_timeout=3) as connection:
            connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [self.fleet.database]
            )

    def heal(self) -> None:
        for disk in self.disks.values():
            disk.thaw()
        self._take_orders_back()
        for ways in self.links.values():
            for proxy in ways.values():
                proxy.set(PASS)
        for program in self.programs.values():
            if program.pid is None:
                program.start()

    def _take_orders_back(self) -> None:
        """As soon as the database answers: it may be the last victim. Nobody may have heard the operator's own."""
        drained = update(Node).where(Node.state.in_(("cordoned", "draining"))).values(state="up")
        low = update(Budget).values(monthly_gpu_hours=None, monthly_amount=None, exhausted_month=None)
        deadline = time.monotonic() + 60
        while True:
            try:
                with transaction(self.fleet.owner) as session:
                    session.execute(drained)
                    session.execute(low)
                return
            except SQLAlchemyError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)

    def rest(self, workload: Workload, timeout_s: float = 180) -> list[str]:
        """Wait until every job has ended and nothing is held; what did not come to rest."""
        deadline = time.monotonic() + timeout_s
        problems: list[str] = ["never looked"]
        while problems and time.monotonic() < deadline:
            with suppress(Exception):  # the last fault may still be felt
                problems = self._restless(workload)
            time.sleep(0.1)
        return problems

    def history(self, told: list[Told]) -> History:
        clocks = CLOCKS | self.clocks
        return history.collect(
            self.fleet,
            told,
            float(clocks["STOP_GRACE_S"]),
            self.hurt,
            self.blocked,
            books(self.fleet),
            self.killed,
            float(clocks["LEASE_S"]),
        )

    def close(self, *, keep: bool = False) -> None:
        """End it all. `keep` leaves the logs where they are, for whoever wants to know why."""
        for disk in self.disks.values():
            disk.thaw()
        self._over.set()
        self._caretakers[1].join()
        self.fleet.close()
        kept = Path(tempfile.mkdtemp(prefix="tunery-chaos-")) if keep else None
        if kept is not None:
            for log in self.fleet.home.rglob("*.log"):
                shutil.copy(log, kept / "-".join(log.relative_to(self.fleet.home).parts))
            print(f"logs kept in {kept}")
        for disk in self.disks.values():
            disk.close()
        self._caretakers[0].join()  # servers are tied to the thread that started them again
        self._exit.close()
        shutil.rmtree(self.fleet.home, ignore_errors=True)

    # ---- caretakers ----------------------------------------------------------------------------------------------

    def _tend_servers(self) -> None:
        while not self._over.wait(0.05):
            self.servers.tend()

    def _tend_programs(self) -> None:
        while not self._over.wait(0.05):
            for program in self.programs.values():
                with suppress(AssertionError):  # it did not answer in time, for want of a server; next time
                    program.tend()

    # ---- helpers -------------------------------------------------------------------------------------------------

    def _restless(self, workload: Workload) -> list[str]:
        if workload.submits_its_last():
            return ["a job is still being submitted"]
        with self.fleet.look() as session:
            open_jobs = session.execute(history.OPEN_JOBS).all()
            blocked = session.execute(select(Project.name).where(Project.blocked.is_not(None))).all()
        problems = [f"job {row.id} is {row.state}" for row in open_jobs]
        if not problems and not self.fleet.nothing_held():
            problems = ["a device or a slot is held"]
        problems += [f"{told.job_id}: its watcher waits" for told in workload.live()]
        problems += [f"project {row.name} is still blocked by a budget that was lifted" for row in blocked]
        return problems or [f"{name} is not clean" for name in self.nodes if not self.fleet.nothing_left(name)]

    def _proxy(self, url: str, *, http: bool = False) -> Proxy:
        return self._exit.enter_context(Proxy.of(url, http=http))

    def _disk(self, name: str) -> Disk | None:
        try:
            return Disk(self.fleet.home / name)
        except (OSError, subprocess.CalledProcessError):
            return None  # not root, or no loop devices: no disk hangs in this campaign

    def _launcher(self, name: str) -> Callable[[], subprocess.Popen[bytes]]:
        ways, own = self.links[name], self.clocks
        via = Via(ways["postgres"], ways["valkey"], ways["s3"])
        if name in SCHEDULERS:
            return lambda: self.fleet.scheduler(name.partition("-")[2], via=via, **POLICY | own)
        if name in self.nodes:
            store = str(self.fleet.home / f"models-{name}")
            settings = own | {"MODEL_STORE": store, "TRAINER_THREADS": "1", "CPU_DEVICES": str(DEVICES)}
            return lambda: self.fleet.node(name, via=via, **settings)  # pyright: ignore[reportArgumentType]
        return lambda: self.fleet.serve_api(via=via, MAX_GPUS_PER_JOB=str(DEVICES))

    def _bases(self, trainer: str) -> None:
        """Each node has a base model of its own, and in its folder the file that its witness locks."""
        for name in self.nodes:
            base = self.fleet.home / f"models-{name}" / str(self.fleet.base_id)
            base.mkdir(parents=True)
            if trainer != "fake":
                self._real_base(base)
            for device in inventory.devices(DEVICES):
                (base / witness.device_file(device.uuid)).touch()
            (base / "COMPLETE").touch()
            for path in (base.parent, base, *base.iterdir()):
                path.chmod(0o755 if path.is_dir() else 0o644)

    def _real_base(self, base: Path) -> None:
        from tests.tiny_model import write_tiny_base

        facts = write_tiny_base(base)
        with transaction(self.fleet.owner) as session:
            row = session.get_one(BaseModel, self.fleet.base_id)
            row.card = {**(row.card or {}), **json.loads(json.dumps(facts)), "name": "tiny"}


def end_in_order() -> None:
    """SIGTERM ends the program as an exception does: with everything that it started."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)
