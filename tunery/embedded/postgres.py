"""Embedded Postgres: our own initdb and start, because the wheel's Python opens `/` to everybody when run as root."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tunery.embedded import binaries, ports
from tunery.embedded.home import Home
from tunery.embedded.problems import Refused
from tunery.embedded.process import Child, Command

_ORPHAN_WAIT_S = 10


class Postgres:
    """TCP on loopback with scram passwords; the superuser is used by the bootstrap alone."""

    name = "postgres"

    def __init__(self, home: Home, port: int, options: Sequence[str] = ()) -> None:
        """`options` are further `name=value` settings; tests say `fsync=off`."""
        self.home, self.port, self.options = home, port, tuple(options)
        self.program = binaries.find("postgres")
        self.data = home.data / "pg"
        self.password = home.secrets().made("postgres_superuser")

    @property
    def admin_url(self) -> str:
        return f"postgresql://postgres:{self.password}@{ports.HOST}:{self.port}/postgres"

    def prepare(self) -> Child:
        binary = binaries.placed(self.program, self.home)
        major = binaries.postgres_major(binary)
        if self.data.exists():
            self._check_version(major)
        else:
            self._initdb(binary, major)
        return Child(
            self._command(binary), self.home.logs / "postgres.log", self._ready, before_start=self._clear_stale_pid
        )

    def _command(self, binary: Path) -> Command:
        settings = (
            f"listen_addresses={ports.HOST}",
            f"port={self.port}",
            "unix_socket_directories=",
            "shared_buffers=128MB",
            "max_connections=200",
            "timezone=UTC",
            "log_timezone=UTC",
            *self.options,
        )
        return Command(
            name=self.name,
            argv=[binary, "-D", self.data, *(part for setting in settings for part in ("-c", setting))],
            environment=_environment(),
            cwd=self.data,
            run_as=self.home.run_as,
            stop_signal=signal.SIGINT,  # "fast": ends sessions, writes a checkpoint
            orphan_signal=signal.SIGINT,
            stop_wait_s=30,
        )

    def _initdb(self, binary: Path, major: str) -> None:
        """Into a folder of another name first: an interrupted initdb must not look like a database."""
        draft = self.data.with_name("pg.new")
        shutil.rmtree(draft, ignore_errors=True)
        self.home.owned_folder(draft.name)
        password_file = draft.with_name("pg.password")
        self.home.owned_file(password_file, self.password)
        try:
            done = subprocess.run(
                [binary.with_name("initdb"), *self._initdb_arguments(draft, password_file, major)],
                env=_environment(),
                cwd=draft,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                **self.home.run_as.popen(),
            )
        finally:
            password_file.unlink()
        if done.returncode:
            raise Refused(
                "Postgres could not make its data folder",
                why=done.stdout.strip()[-2000:],
                fix="read the lines above; TUNERY_RUN_AS=<user> chooses another user, TUNERY_HOME another folder",
            )
        draft.rename(self.data)

    def _initdb_arguments(self, draft: Path, password_file: Path, major: str) -> list[str | Path]:
        # The builtin provider sorts alike on every system; before 17 there is none, and C is the nearest.
        provider = ["--locale-provider=builtin", "--builtin-locale=C.UTF-8"] if int(major) >= 17 else []
        no_sync = ["--no-sync"] if "fsync=off" in self.options else []
        return [
            *("-D", draft, "-U", "postgres", "--pwfile", password_file, "--encoding=UTF8", "--locale=C"),
            *("--auth-host=scram-sha-256", "--auth-local=reject", "--no-instructions", *provider, *no_sync),
        ]

    def _check_version(self, major: str) -> None:
        found = (self.data / "PG_VERSION").read_text().strip()
        if found != major:
            raise Refused(
                f"the data are of PostgreSQL {found}, the installed server is {major}",
                why="A new major version cannot read an old one's files.",
                fix=f"install PostgreSQL {found} again and move the data with pg_dump and pg_restore; "
                "or, if nothing in it is needed: tunery down --purge",
            )

    def _ready(self) -> bool:
        """As pg_ctl asks: the eighth line of `postmaster.pid` says so, with no connection and no password."""
        try:
            lines = (self.data / "postmaster.pid").read_text().splitlines()
        except OSError:
            return False
        return len(lines) >= 8 and lines[7].strip() == "ready"

    def _clear_stale_pid(self) -> None:
        """A pid file may name a dead postmaster, a stranger who got its number, or one still shutting down."""
        file = self.data / "postmaster.pid"
        try:
            pid = int(file.read_text().splitlines()[0])
        except (OSError, ValueError, IndexError):
            return
        deadline = time.monotonic() + _ORPHAN_WAIT_S
        while _is_ours(pid, self.data):
            # Left by a supervisor that was killed: it got SIGINT from the kernel and is on its way out.
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGINT if time.monotonic() < deadline - 5 else signal.SIGQUIT)
            if time.monotonic() > deadline:
                raise Refused(
                    f"another Postgres (pid {pid}) still uses {self.data}",
                    why="It neither stopped nor answered its signals.",
                    fix=f"look at process {pid}; end it, then start again",
                )
            time.sleep(0.1)
        file.unlink(missing_ok=True)


def _environment() -> dict[str, str]:
    """LC_ALL=C: a locale named by the user's shell may not exist here, and initdb then fails."""
    return {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C", "TZ": "UTC"}


def _is_ours(pid: int, data: Path) -> bool:
    if sys.platform == "linux":
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            return False
    else:
        asked = subprocess.run(["ps", "-o", "command=", "-p", str(pid)], capture_output=True, check=False)
        words = asked.stdout.split()
    return os.fsencode(data) in words and b"postgres" in words[0]
