"""The node process: says that it lives, starts supervisors, runs tasks, and cleans up after whatever died.

It holds nothing that a restart would lose. Supervisors outlive it: a restarted node finds them by the lock each of
them holds, leaves the living alone and ends what is left of the dead.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import structlog
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from tunery import __version__, labels, leases, nodes, readiness, tasks
from tunery.db import Sessions, transaction
from tunery.nodes import Assigned
from tunery.settings import NodeSettings
from tunery.states import AttemptState, FailureCode
from tunery.storage import Storage
from tunery.telemetry.health import Health, NotReady, Part
from worker import inventory, launch_guard, locks, processes
from worker.chores import Chores
from worker.isolation import limits, uids
from worker.isolation.host import Ways
from worker.launch_guard import Driver, Nvml
from worker.meters import AttemptMeters
from worker.patience import passing
from worker.standby import Standby
from worker.workspace import Workspace

log = structlog.get_logger(__name__)

_RESPAWN_S = 3.0
_KEEP_LOGS_S = 7 * 24 * 3600


class Replaced(Exception):
    """Another process has registered under this node's id."""


class Node:
    """One host's worker. `run` returns when asked to stop, with every attempt of this node at rest."""

    def __init__(
        self,
        node_id: uuid.UUID,
        settings: NodeSettings,
        sessions: Sessions,
        storage: Storage,
        ways: Ways,
        isolation: dict[str, object],
        driver: Driver | None = None,
    ) -> None:
        self._driver = driver or Nvml()
        self._id, self._settings, self._sessions = node_id, settings, sessions
        self._boot_id = uuid.uuid4()
        self._attempts = settings.home / "attempts"
        self._attempts.mkdir(parents=True, exist_ok=True)
        self._supervisors: dict[str, subprocess.Popen[bytes]] = {}
        self._ways, self._isolation = ways, isolation
        self._chores = Chores(node_id, settings, sessions, storage, ways)
        self._pool = ThreadPoolExecutor(settings.cpu_task_slots, thread_name_prefix="task")
        self._busy = threading.Semaphore(settings.cpu_task_slots)
        self._bell, self._bell_path = _doorbell(settings.home)
        self._standby = Standby(os.environ | {"TUNERY_NODE_ID": str(node_id)} | ways.environment())
        self._ring: subprocess.Popen[bytes] | None = None
        self._ring_after = 0.0
        self._stopping = False
        self._full = False
        self._heard: float | None = None
        parts = [
            readiness.database(settings),
            readiness.storage(settings, "a/"),
            Part("heartbeat", self._heartbeat),
            Part("disk", self._disk, required=False),
        ]
        if settings.redis_url is not None:
            parts += [readiness.redis(settings.redis_url), Part("doorbell", self._doorbell_answers, required=False)]
        self.health = Health(parts, lambda: {"node": str(node_id), "attempts": len(self._supervisors)})
        self.meters = AttemptMeters(self._attempts, lambda name: locks.is_taken(self._lock(name)))

    def run(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        self._persist_registration()
        log.info("node up", home=str(self._settings.home))
        while not self._stopping:
            self._keep_ring()
            self._standby.keep()
            try:
                self._poll()
            except DBAPIError as error:
                log.warning("database trouble; running attempts go on", error=str(error.orig).strip()[:200])
            except OSError as error:  # a full disk, no more processes: what runs does not need us to fall over
                log.error("this host is in trouble; running attempts go on", error=str(error)[:200])
            self._wait(self._settings.poll_s)
        self._drain()

    # ---- one look around -------------------------------------------------------------------------------------

    def _poll(self) -> None:
        with transaction(self._sessions) as session:
            if not nodes.heartbeat(session, self._id, self._boot_id, self._room()):
                raise Replaced(str(self._id))
            self._heard = time.monotonic()
            mine = nodes.assigned(session, self._id)
            unreleased = nodes.unreleased(session, self._id)
            dirty = nodes.dirty(session, self._id)
            gpus = nodes.gpus(session, self._id)
        self._reap()
        self._examine(gpus)
        for attempt in mine:
            self._look_after(attempt)
        for attempt_id in unreleased:
            self._free(attempt_id)
        self._look_again(dirty)
        self._clear_away({str(one.attempt_id) for one in mine} | {str(one) for one in unreleased})
        self._take_tasks()

    def _look_after(self, attempt: Assigned) -> None:
        name = str(attempt.attempt_id)
        alive = name in self._supervisors or locks.is_taken(self._lock(name))
        if attempt.state is AttemptState.ASSIGNED:
            if not alive and self._full:
                with transaction(self._sessions) as session:
                    leases.unassign(session, attempt.attempt_id, "The assigned node has no room on its disk")
            elif not alive:
                self._supervise(name)
        elif alive:
            self._poke(name)
        else:
            self._bury(attempt.attempt_id)

    def _supervise(self, attempt_id: str) -> None:
        self._supervisors[attempt_id] = self._standby.supervise(attempt_id, self._attempts / f"{attempt_id}.log")
        log.info("supervisor started", attempt=attempt_id, pid=self._supervisors[attempt_id].pid)

    def _poke(self, attempt_id: str) -> None:
        """Ask a supervisor to renew now: a cancel or a pause may be waiting for it."""
        pid = self._supervisor_pid(attempt_id)
        if pid is not None and self._rung:
            _signal(pid, signal.SIGUSR1)

    def _bury(self, attempt_id: uuid.UUID) -> None:
        """The supervisor died: end whatever it left behind, then say so, and the job goes on at once."""
        name = str(attempt_id)
        if not self._end_all(name):
            log.error("a trainer would not die; its device stays reserved", attempt=name)
            return
        with transaction(self._sessions) as session:
            leases.abandon(session, attempt_id, FailureCode.WORKER_LOST, "The attempt's supervisor died.")
        self._clear(name)
        log.warning("supervisor was dead", attempt=name)

    def _free(self, attempt_id: uuid.UUID) -> None:
        """The attempt has ended elsewhere; its devices are free once nothing of it runs here."""
        name = str(attempt_id)
        if locks.is_taken(self._lock(name)):
            self._poke(name)  # it will find itself fenced
            return
        if self._end_all(name):
            with transaction(self._sessions) as session:
                leases.release(session, attempt_id)
            self._clear(name)

    def _look_again(self, dirty: list[tuple[str, str]]) -> None:
        """A device that was not to be used gets work again once nothing is wrong any more."""
        still = launch_guard.look(self._driver, dirty)
        for device in {device for _, device in dirty} - set(still):
            with transaction(self._sessions) as session:
                nodes.mark_clean(session, self._id, device)
            log.info("a device is clean again", device=device)

    def _examine(self, gpus: dict[str, str]) -> None:
        """A GPU that fell off or has lost memory gets no more work, and what hangs on it is ended; it may come back."""
        broken = launch_guard.broken(self._driver, [("cuda", device) for device in gpus])
        for device, state in gpus.items():
            if device in broken and state != "unhealthy":
                with transaction(self._sessions) as session:
                    on_it = nodes.mark_unhealthy(session, self._id, device, broken[device])
                log.error("a GPU is broken", gpu=device, reason=broken[device], attempts=[str(one) for one in on_it])
                for attempt_id in on_it:
                    processes.end_all(str(attempt_id), timeout_s=0)  # its supervisor sees that, and says why
            elif device not in broken and state == "unhealthy":
                with transaction(self._sessions) as session:
                    nodes.mark_healthy(session, self._id, device)
                log.info("a GPU is well again", gpu=device)

    def _room(self) -> dict[str, object]:
        """For the node's `info`. A full disk fails whatever is sent here, again and again: better somewhere else."""
        store = self._settings.model_store or self._settings.home
        free = min(shutil.disk_usage(folder).free for folder in (self._settings.home, store) if folder.exists())
        full = free < self._settings.min_free_disk_bytes
        if full != self._full:
            say = log.error if full else log.info
            say("this node takes no new work: its disk is full" if full else "the disk has room again", free_bytes=free)
        self._full = full
        return {"disk_free_bytes": free, "disk_full": full}

    def _take_tasks(self) -> None:
        while not self._stopping and not self._full and self._busy.acquire(blocking=False):
            lease = None
            try:
                with transaction(self._sessions) as session:
                    lease = tasks.claim(session, self._id, self._settings.lease_s)
            finally:
                if lease is None:
                    self._busy.release()
            if lease is None:
                return
            self._pool.submit(self._chores.run, lease).add_done_callback(lambda _: self._after_task())

    def _after_task(self) -> None:
        self._busy.release()
        self._wake()

    # ---- start and end -----------------------------------------------------------------------------------------

    def _persist_registration(self) -> None:
        """Register, waiting for a database that is not there yet; then end what an earlier life left behind."""
        while not self._stopping:
            try:
                with transaction(self._sessions) as session:
                    self._register(session)
                    tasks.give_back(session, self._id)
                    self._clean_up({str(one.attempt_id) for one in nodes.assigned(session, self._id)})
                return
            except DBAPIError as error:
                if not passing(error):
                    raise  # two nodes of one name, for example: waiting mends nothing
                log.warning("cannot register yet", error=str(error.orig).strip()[:200])
                self._wait(1)

    def _clear_away(self, mine: set[str]) -> None:
        """Workspaces of attempts that are over and whose supervisors died before they could clean up."""
        for folder in [path for path in self._attempts.iterdir() if path.is_dir() and path.name[0] != "."]:
            if folder.name in mine or locks.is_taken(self._lock(folder.name)):
                continue
            if self._end_all(folder.name):
                self._clear(folder.name)

    def _clean_up(self, mine: set[str]) -> None:
        """What an earlier life left on this disk. Attempts that are still ours are looked after by the poll."""
        self._clear_away(mine)
        store = self._settings.model_store or self._settings.home / "models"
        rows, probes = self._settings.home.glob("rows-*"), self._attempts.glob(".probe-*")
        for left in (*rows, *probes, *store.glob("*.import-*")):
            shutil.rmtree(left, ignore_errors=True)
        for old in self._attempts.glob("*.log"):
            if time.time() - old.stat().st_mtime > _KEEP_LOGS_S:
                old.unlink(missing_ok=True)

    def _register(self, session: Session) -> None:
        devices = inventory.devices(self._settings.cpu_devices)
        shared = self._settings.attempts_per_gpu
        nodes.register(
            session,
            self._id,
            name=self._settings.node_name,
            boot_id=self._boot_id,
            devices=devices,
            slots=sum(shared if device.kind == "cuda" else 1 for device in devices),
            task_slots=self._settings.cpu_task_slots,
            version=__version__,
            info={"host": socket.gethostname(), **self._isolation, **self._room()},
            labels=labels.parse(self._settings.node_labels),
        )

    # ---- what readiness asks --------------------------------------------------------------------------------

    def _heartbeat(self) -> str:
        if self._heard is None:
            raise NotReady("not registered yet")
        age, most = time.monotonic() - self._heard, 3 * self._settings.poll_s + 5
        if age > most:
            raise NotReady(f"last one {age:.0f} s ago")
        return "ok"

    def _doorbell_answers(self) -> str:
        if self._ring is None or self._ring.poll() is not None:
            raise NotReady("the RQ worker is not running; work is found by polling")
        return "ok"

    def _disk(self) -> str:
        if self._full:
            raise NotReady(f"less than {self._settings.min_free_disk_bytes / inventory.GIB:.1f} GiB free")
        return "ok"

    def _drain(self) -> None:
        """Every supervisor checkpoints and gives its job back to the queue; then we go."""
        self.health.drain()
        self._standby.close()
        with suppress(DBAPIError), transaction(self._sessions) as session:
            nodes.go_down(session, self._id)
        names = [path.stem for path in self._attempts.glob("*.lock") if locks.is_taken(path)]
        for name in names:
            if (pid := self._supervisor_pid(name)) is not None:
                _signal(pid, signal.SIGTERM)
        log.info("draining", attempts=len(names))
        deadline = time.monotonic() + self._settings.stop_grace_s + 30
        while time.monotonic() < deadline and any(locks.is_taken(self._lock(name)) for name in names):
            self._reap()
            time.sleep(0.1)
        self._pool.shutdown(wait=False, cancel_futures=True)
        if self._ring is not None:
            self._ring.terminate()
        with suppress(DBAPIError), transaction(self._sessions) as session:
            tasks.give_back(session, self._id)
        Path(self._bell_path).unlink(missing_ok=True)
        log.info("node down")

    def _keep_ring(self) -> None:
        """One RQ worker. When Redis is away it ends, and is started again a little later."""
        if self._settings.redis_url is None:
            return
        if self._ring is not None and self._ring.poll() is None:
            return
        if time.monotonic() < self._ring_after:
            return
        self._ring_after = time.monotonic() + _RESPAWN_S
        more = {
            "TUNERY_NODE_ID": str(self._id),
            "TUNERY_NODE_SOCKET": self._bell_path,
            "TUNERY_NODE_PID": str(os.getpid()),
            "TUNERY_REDIS_URL": self._settings.redis_url.get_secret_value(),  # which may have come from a file
        }
        keep = {
            name: value for name, value in os.environ.items() if not name.startswith(("TUNERY_S3", "TUNERY_DATABASE"))
        }
        self._ring = subprocess.Popen(
            [sys.executable, "-m", "worker.ring"],
            env=keep | more,
            cwd=Path(__file__).parent.parent,
            stdin=subprocess.DEVNULL,
        )

    # ---- helpers ---------------------------------------------------------------------------------------------

    _rung = False

    def _wait(self, seconds: float) -> None:
        """Until the bell rings, at most so long. Whatever was rung meanwhile is answered by one look."""
        self._bell.settimeout(seconds)
        try:
            self._bell.recv(200)
            self._rung = True
            self._bell.setblocking(False)
            while self._bell.recv(200):
                pass
        except TimeoutError:
            self._rung = False
        except BlockingIOError:
            pass

    def _wake(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as bell:
            bell.setblocking(False)  # a full queue wakes the reader just as well, and may be ours to read
            try:
                bell.sendto(b"wake", self._bell_path)
            except OSError:
                pass

    def _on_signal(self, _number: int, _frame: object) -> None:
        self._stopping = True
        self._wake()

    def _reap(self) -> None:
        ended = [name for name, process in self._supervisors.items() if process.poll() is not None]
        for name in ended:
            del self._supervisors[name]
        if ended:
            self.meters.fold()

    def _lock(self, attempt_id: str) -> Path:
        return self._attempts / f"{attempt_id}.lock"

    def _supervisor_pid(self, attempt_id: str) -> int | None:
        try:
            return int(self._lock(attempt_id).read_text())
        except (OSError, ValueError):
            return None

    def _end_all(self, attempt_id: str) -> bool:
        """Whatever a dead supervisor left: by its mark, by the uid that its workspace was given to, by its cgroup."""
        owner = Workspace(self._attempts / attempt_id).owner()
        with uids.of_the_dead(owner, self._settings.home) as uid:
            gone = processes.end_all(attempt_id, uid=uid)
        limits.end(limits.left(limits.parents(self._settings.trainer_cgroups), attempt_id))
        return gone

    def _clear(self, attempt_id: str) -> None:
        Workspace(self._attempts / attempt_id).remove()
        self._lock(attempt_id).unlink(missing_ok=True)


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def _doorbell(home: Path) -> tuple[socket.socket, str]:
    path = home / "node.sock"
    if len(str(path).encode()) > 100:  # sockaddr_un holds 108 bytes
        path = Path(f"/tmp/tunery-node-{os.getpid()}.sock")  # noqa: S108 - 0600, and only a wake-up passes through it
    path.unlink(missing_ok=True)
    bell = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    bell.bind(str(path))
    path.chmod(0o600)
    return bell, str(path)
