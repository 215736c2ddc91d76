"""The scheduler's end of the forecaster: a child process while it leads, none while it waits for its turn."""

import subprocess
import sys
import time

import structlog

log = structlog.get_logger(__name__)

_AGAIN_S = 10.0
_END_S = 5.0


class Child:
    """Not thread-safe: one loop keeps it."""

    def __init__(self, holder: str) -> None:
        self._holder = holder
        self._process: subprocess.Popen[bytes] | None = None
        self._started_at = -_AGAIN_S

    @property
    def pid(self) -> int | None:
        """While it runs."""
        return self._process.pid if self._process is not None else None

    def keep(self, leading: bool) -> None:
        """Start it, start it again, or end it."""
        if self._process is not None and (code := self._process.poll()) is not None:
            log.warning("the forecaster ended; another will be started", exit_code=code)
            self._process = None
        if not leading:
            self.end()
        elif self._process is None and time.monotonic() - self._started_at >= _AGAIN_S:
            self._started_at = time.monotonic()
            # the pipe's other end closes with this process, however that ends
            command = [sys.executable, "-m", "scheduler.forecast", self._holder]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE)

    def end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        if process.stdin is not None:
            process.stdin.close()
        try:
            process.wait(_END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
