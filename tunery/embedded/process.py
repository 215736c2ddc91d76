"""One supervised child: started, restarted with a growing pause when it dies, stopped in order."""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunery.embedded.identity import RunAs, die_with_parent
from tunery.embedded.problems import Refused

MAX_LOG_BYTES = 16 * 1024 * 1024
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 15.0
STEADY_S = 30.0
"""A child that lived so long has recovered: its next death starts with the first pause again."""


@dataclass(frozen=True)
class Command:
    """How a child is started and stopped. Secrets stand in `environment` or in the child's own files, never in argv."""

    name: str
    argv: Sequence[str | os.PathLike[str]]
    environment: Mapping[str, str]
    cwd: Path
    run_as: RunAs = field(default_factory=RunAs)
    stop_signal: int = signal.SIGTERM
    stop_wait_s: float = 15
    orphan_signal: int = signal.SIGKILL
    """What the kernel sends it when the supervisor itself is killed."""


class Child:
    def __init__(
        self, command: Command, log: Path, ready: Callable[[], bool], before_start: Callable[[], None] | None = None
    ) -> None:
        self.command, self.log = command, log
        self.name = command.name
        self.ready = ready
        self.before_start = before_start or (lambda: None)
        self.process: subprocess.Popen[Any] | None = None
        self.started_at = 0.0
        self.restarts = 0
        self.is_ready = False
        self.exit_code: int | None = None
        self._pause_s = FIRST_PAUSE_S
        self._not_before = 0.0
        self._wanted = False

    @property
    def pid(self) -> int | None:
        return self.process.pid if self.process else None

    def start(self) -> None:
        """From the supervisor's main thread: the parent-death signal comes when the *thread* that forked ends."""
        self._wanted = True
        self.before_start()
        cap_log(self.log)
        descriptor = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            self.process = subprocess.Popen(
                [os.fspath(part) for part in self.command.argv],
                env=dict(self.command.environment),
                cwd=self.command.cwd,
                stdin=subprocess.DEVNULL,
                stdout=descriptor,  # the file itself, no pipe: a child never blocks on us, nor loses its last words
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches the supervisor alone, which then stops children in order
                preexec_fn=die_with_parent(self.command.orphan_signal),
                **self.command.run_as.popen(),
            )
        finally:
            os.close(descriptor)
        self.started_at, self.is_ready, self.exit_code = time.time(), False, None

    def tend(self) -> bool:
        """Look after it; True when something changed. Reaping matters: a zombie still owns `postmaster.pid`."""
        if self.process is None:
            if self._wanted and time.monotonic() >= self._not_before:
                self._restart()
                return True
            return False
        if (code := self.process.poll()) is not None:
            self._died(code)
            return True
        if not self.is_ready and self.ready():
            self.is_ready = True
            return True
        return False

    def stop(self) -> None:
        """The orderly signal, a patient wait, then SIGKILL."""
        self._wanted = False
        if (process := self.process) is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(self.command.stop_signal)
        try:
            process.wait(self.command.stop_wait_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        self.process, self.is_ready = None, False

    def renew(self) -> None:
        """Stop it in order and start it anew; one that cannot be started now is tried again, as after a death."""
        self.stop()
        self._wanted = True
        self._restart()

    def kill(self) -> None:
        """At once, for what may be lost."""
        self._wanted = False
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def last_words(self, lines: int = 12) -> str:
        """The end of its log, for an error message."""
        try:
            text = self.log.read_bytes()[-8192:].decode(errors="replace")
        except FileNotFoundError:
            return ""
        return "\n".join(text.splitlines()[-lines:])

    def _restart(self) -> None:
        self.restarts += 1
        try:
            self.start()
        except (OSError, Refused) as error:  # a full disk, a port taken meanwhile: try again later, do not fall over
            self._note(f"could not be started: {error}")
            self._died(127)

    def _note(self, text: str) -> None:
        with contextlib.suppress(OSError), self.log.open("a") as file:
            file.write(f"[supervisor] {self.name} {text}\n")

    def _died(self, code: int) -> None:
        self.process, self.is_ready, self.exit_code = None, False, code
        self._note(f"ended with {code}; next start in {self._pause_s:.1f} s")
        if time.time() - self.started_at > STEADY_S:
            self._pause_s = FIRST_PAUSE_S
        self._not_before = time.monotonic() + self._pause_s
        self._pause_s = min(self._pause_s * 2, LONGEST_PAUSE_S)


def cap_log(log: Path) -> None:
    """Move a log past its cap aside, keeping one predecessor. The writer appends, so truncating under it is safe."""
    with contextlib.suppress(FileNotFoundError):
        if log.stat().st_size > MAX_LOG_BYTES:
            shutil.copyfile(log, log.with_name(f"{log.name}.1"))
            log.with_name(f"{log.name}.1").chmod(0o600)
            os.truncate(log, 0)
