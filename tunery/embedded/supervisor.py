"""`up`: the servers, the database's first run, the programs; then looking after them until a signal says stop."""

import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

from tunery.embedded import database, doctor, ports, status
from tunery.embedded.console import Console, Tail
from tunery.embedded.home import Home, write_private
from tunery.embedded.problems import Refused
from tunery.embedded.process import Child, cap_log
from tunery.embedded.programs import Programs
from tunery.embedded.readable import readable
from tunery.embedded.servers import External, Servers

DEFAULT_API_PORT = 8400
_TEND_EVERY_S = 0.15
_CAP_EVERY_S = 60
_READY_TIMEOUT_S = 90
_GIVE_UP_AFTER = 5
"""Deaths during the start: then the program is broken, and its log says why."""


class Stopped(BaseException):
    """A signal asked for an end. Not an Exception: nothing on the way may swallow it."""


@dataclass(frozen=True)
class How:
    api_port: int
    programs: Path
    """The folder that holds `api/`, `scheduler/` and `worker/`."""
    detached: bool = False


class Supervisor:
    def __init__(self, home: Home, external: External, console: Console, how: How) -> None:
        self.home, self.external, self.console, self.how = home, external, console, how
        self.servers = Servers(home, external, allowed_origins=(self.api_url,))
        self.programs: dict[str, Child] = {}
        self.tails: list[Tail] = []
        self.ready = False

    @property
    def api_url(self) -> str:
        return f"http://{ports.HOST}:{self.how.api_port}"

    def run(self) -> None:
        """Holds the home's lock from the first step to the last."""
        with self.home.lock(), _signals():
            try:
                self._start()
                self._watch()
            except Stopped:
                self.console.say("stopping: node, scheduler, api, then the servers")
            finally:
                with _no_more_signals():
                    self._stop()

    def _start(self) -> None:
        self._record()
        began = time.monotonic()
        self.servers.launch()
        self.servers.wait("postgres")
        self._say_ready("postgres", began)
        urls = database.prepare(self.home, self.servers)
        self.console.say(f"database prepared ({time.monotonic() - began:.1f} s)")
        self.servers.wait("valkey")
        programs = Programs(self.home, self.servers, urls, self.how.api_port, self._ops_ports(), self.how.programs)
        self.programs = programs.children()
        self.tails = [] if self.how.detached else [Tail(child.name, child.log) for child in self.programs.values()]
        for child in self.programs.values():
            child.start()
        self.servers.wait()
        self._say_ready("s3", began)
        self._wait_for_programs()
        profile = {"api_url": self.api_url, "api_key": self.home.secrets().get("admin_key")}
        write_private(self.home.profile, json.dumps(profile, indent=1))
        self.ready = True
        self._record()
        self.console.say(f"ready in {time.monotonic() - began:.1f} s")
        if not self.how.detached:  # a detached one would write the key into a log; its starter says it instead
            self.console.plain(status.banner(self.home))

    def _wait_for_programs(self) -> None:
        deadline = time.monotonic() + _READY_TIMEOUT_S
        while not all(child.is_ready for child in self.programs.values()):
            self._tend()
            for child in self.programs.values():
                if child.restarts >= _GIVE_UP_AFTER or time.monotonic() > deadline:
                    raise Refused(
                        f"{child.name} does not start",
                        why=f"The end of its log:\n{child.last_words()}",
                        fix=f"read {child.log}",
                    )
            time.sleep(0.03)

    def _watch(self) -> None:
        next_cap = time.monotonic() + _CAP_EVERY_S
        while True:
            self._tend()
            if time.monotonic() > next_cap:
                for child in self._children().values():
                    cap_log(child.log)
                next_cap = time.monotonic() + _CAP_EVERY_S
            time.sleep(_TEND_EVERY_S)

    def _tend(self) -> None:
        before = {name: child.pid for name, child in self._children().items()}
        changed = self.servers.tend() + [child for child in self.programs.values() if child.tend()]
        self._relay()
        for child in changed:
            if before[child.name] is not None and child.process is None:
                self.console.say(f"{child.name} ended with {child.exit_code}; it is started again. Log: {child.log}")
        if changed:
            self._record()

    def _relay(self) -> None:
        for tail in self.tails:
            for line in tail.read():
                self.console.say(readable(line), tail.name)

    def _stop(self) -> None:
        self.ready = False
        for name in ("node", "scheduler", "api"):
            if child := self.programs.get(name):
                child.stop()
                self._relay()
        self.servers.stop()
        self._record()
        self.console.say("stopped")

    def _children(self) -> dict[str, Child]:
        return self.servers.children | self.programs

    def _record(self) -> None:
        where = {"api": self.api_url, **{name: f"{ports.HOST}:{port}" for name, port in self._ports().items()}}
        ops: dict[str, int] = self.home.state().get("ops_ports", {})
        services = {
            child.name: {
                "state": "ready" if child.is_ready else "starting" if child.process else "down",
                "pid": child.pid,
                "started_at": child.started_at,
                "restarts": child.restarts,
                "where": where.get(child.name, ""),
                "ops_url": f"http://{ports.HOST}:{ops[child.name]}" if child.name in ops else None,
                "log": str(child.log),
            }
            for child in self._children().values()
        }
        self.home.update_state(ready=self.ready, api_url=self.api_url, api_port=self.how.api_port, services=services)

    def _ops_ports(self) -> dict[str, int]:
        """Where each program tells operators how it does: the same ports as last time, where they are free."""
        chosen = ports.remembered(list(status.PROGRAMS), self.home.state().get("ops_ports", {}))
        self.home.update_state(ops_ports=chosen)
        return chosen

    def _ports(self) -> dict[str, int]:
        return self.home.state().get("ports", {})

    def _say_ready(self, name: str, began: float) -> None:
        if child := self.servers.children.get(name):
            self.console.say(f"{child.name} is ready ({time.monotonic() - began:.1f} s)")


def choose_api_port(home: Home, asked: int | None) -> int:
    """The one asked for; else that of last time; else 8400 or the next free one."""
    if asked is not None:
        return asked
    first = int(home.state().get("api_port") or DEFAULT_API_PORT)
    if home.holder() is not None:
        return first
    return next((port for port in range(first, first + 50) if ports.is_free(port)), first)


def check(home: Home, external: External, api_port: int, console: Console, root: Path) -> None:
    """The doctor's lines that are not green, then stop if one is red."""
    checks = doctor.examine(home, external, api_port, root)
    for one in checks:
        if one.level is not doctor.Level.OK:
            console.say(f"{one.level}: {one.name}: {one.detail}")
    doctor.refuse(checks)


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """The first SIGINT, SIGTERM or SIGHUP raises `Stopped`; later ones find a stop under way."""

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(each, signal.SIG_IGN)
        raise Stopped

    before = {each: signal.signal(each, stop) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


@contextlib.contextmanager
def _no_more_signals() -> Iterator[None]:
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)
    yield


def stop_running(home: Home, timeout_s: float = 120) -> bool:
    """Tell the supervisor of this home to end, and wait until it has let go of the lock. False: none runs.

    The pid is read from the lock file while the lock is held, so a recycled number is never signalled.
    """
    pid = home.holder()
    if pid is None:
        return False
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + timeout_s
    while home.holder() == pid:
        if time.monotonic() > deadline:
            raise Refused(
                f"the supervisor (pid {pid}) has not stopped after {timeout_s:.0f} s",
                why="A program may be finishing its work.",
                fix=f"tunery logs node; then tunery down again, or end process {pid}",
            )
        time.sleep(0.05)
    return True
