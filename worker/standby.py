"""A supervisor that has loaded everything already and waits to hear which attempt is its own.

Loading takes most of a second, and nothing else stands between an assignment and its trainer. The waiting process is a
fresh one, not a fork of the node: it has no threads, locks or connections of anybody. It ends when the node does, as
long as it has no attempt; from then on it is a supervisor like any other.
"""

import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from sqlalchemy.orm import configure_mappers

from tunery.db import make_engine
from tunery.settings import NodeSettings, load
from tunery.storage import Storage
from tunery.unreadable import hide_from_same_user
from worker import supervisor

_ROOT = Path(__file__).parent.parent
_PAUSE_S = 4.0
"""After one was handed out its trainer loads its libraries; the next one can wait. Also how often a broken one is
tried again."""


class Standby:
    """The node's end: keeps one waiting, and hands it out."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._environment = environment
        self._waiting: subprocess.Popen[bytes] | None = None
        self._not_before = 0.0

    def keep(self) -> None:
        """Start one if none waits."""
        if (self._waiting is None or self._waiting.poll() is not None) and time.monotonic() > self._not_before:
            self._not_before = time.monotonic() + _PAUSE_S
            self._waiting = self._start("worker.standby", stdin=subprocess.PIPE)

    def supervise(self, attempt_id: str, log: Path) -> subprocess.Popen[bytes]:
        """A supervisor for this attempt: the one that waits, else a new one. It outlives this process."""
        waiting, self._waiting = self._waiting, None
        self._not_before = time.monotonic() + _PAUSE_S
        if waiting is not None and waiting.stdin is not None and waiting.poll() is None:
            with suppress(BrokenPipeError), waiting.stdin:
                waiting.stdin.write(f"{attempt_id} {log}\n".encode())
                waiting.stdin.flush()
                return waiting
        with os.fdopen(_open(log), "ab") as out:
            return self._start("worker.supervisor", attempt_id, stdin=subprocess.DEVNULL, stdout=out, stderr=out)

    def close(self) -> None:
        """It reads the end of its input, and goes."""
        if self._waiting is not None and self._waiting.stdin is not None:
            self._waiting.stdin.close()
            self._waiting = None

    def _start(self, module: str, *arguments: str, stdin: int, **streams: object) -> subprocess.Popen[bytes]:
        return subprocess.Popen(  # pyright: ignore[reportCallIssue]
            [sys.executable, "-m", module, *arguments],
            env=self._environment,
            cwd=_ROOT,
            stdin=stdin,
            start_new_session=True,  # it outlives us
            **streams,  # pyright: ignore[reportArgumentType]
        )


def _open(log: str | Path) -> int:
    return os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)


def main() -> int:
    """Load, wait for a line `ATTEMPT LOG`, become its supervisor."""
    hide_from_same_user()  # it holds the node's secrets from its first moment
    settings = load(NodeSettings)
    # none of these is used, none has connected: making them loads what is loaded at first use
    Storage(settings)
    make_engine(settings.database_url.get_secret_value())
    configure_mappers()
    line = sys.stdin.readline()
    if not line.endswith("\n"):
        return 0  # the node has gone
    attempt, log = line.rstrip("\n").split(" ", 1)
    nothing, out = os.open(os.devnull, os.O_RDONLY), _open(log)
    for given, stream in ((nothing, 0), (out, 1), (out, 2)):
        os.dup2(given, stream)
    os.close(nothing)
    os.close(out)
    return supervisor.main(attempt)


if __name__ == "__main__":
    sys.exit(main())
