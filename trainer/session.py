"""One attempt's connection to its supervisor: events go out, `tick`, `stop` and `stored` come in.

The commands are read by a thread, so a long step, a load or a generation never delays them. Who trains asks
`stop` or calls `check` where it can let go.
"""

import signal
import socket
import threading
import time
from types import FrameType
from typing import TypeVar

from pydantic import ValidationError

from tunery.contracts.channel import EventWriter, LineTooLong, read_lines
from tunery.contracts.events import COMMANDS, TICK_TIMEOUT_S, Event, Phase, Stop, Stored, Tick, Warning
from tunery.states import StopReason

AnyEvent = TypeVar("AnyEvent", bound=Event)


class Stopping(Exception):
    """Somebody asked for a stop, and the work in hand can be left as it is."""


class Session:
    """The trainer's end of one socket. Threads: the writer's, the reader's and the clock's; all daemons."""

    def __init__(self, connection: socket.socket, tick_timeout_s: float = TICK_TIMEOUT_S) -> None:
        self.step = 0
        """Optimiser steps done since the job's first attempt; stamped on every event."""
        self._connection = connection
        self._writer = EventWriter(connection)
        self._tick_timeout_s = tick_timeout_s
        self._last_tick = time.monotonic()
        self._lock = threading.Lock()
        self._stop: Stop | None = None
        self._unstored: set[int] = set()
        self._phase = ""
        for target, name in ((self._read, "commands"), (self._watch, "ticks")):
            threading.Thread(target=target, name=name, daemon=True).start()

    @classmethod
    def connect(cls, path: str, tick_timeout_s: float = TICK_TIMEOUT_S) -> "Session":
        """Connect to the supervisor's unix stream socket.

        Raises:
            OSError: nobody listens at `path`.
        """
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.connect(path)
        return cls(connection, tick_timeout_s)

    def send(self, event: AnyEvent) -> AnyEvent:
        """Queue one event, stamped with the current step. Never blocks."""
        stamped = event.model_copy(update={"step": self.step})
        self._writer.send(stamped)
        return stamped

    def phase(self, name: str) -> None:
        """Say that `name` begins, unless it is what we are doing already."""
        if name != self._phase:
            self._phase = name
            self.send(Phase(phase=name))

    def warn(self, code: str, message: str) -> None:
        """Tell the job's owner something that does not end the job."""
        self.send(Warning(code=code, message=message))

    @property
    def stop(self) -> Stop | None:
        """The stop that was asked for, if any."""
        return self._stop

    def check(self) -> None:
        """Leave the work in hand if a stop was asked for.

        Raises:
            Stopping: it was.
        """
        if self._stop is not None:
            raise Stopping(self._stop.reason)

    def unstored(self) -> int:
        """How many announced checkpoints the supervisor has not stored yet."""
        with self._lock:
            return len(self._unstored)

    def announced(self, step: int) -> None:
        """Count the checkpoint of `step` as announced, until a `stored` command names it."""
        with self._lock:
            self._unstored.add(step)

    def obey_sigterm(self) -> None:
        """Take SIGTERM for a `stop` with a checkpoint. Call it from the main thread."""

        def handler(_signum: int, _frame: FrameType | None) -> None:
            self._ask(Stop(reason=StopReason.SHUTDOWN, checkpoint=True, deadline_s=60))

        signal.signal(signal.SIGTERM, handler)

    def close(self) -> None:
        """Send what waits and half-close, so that the supervisor sees the end after the outcome."""
        self._writer.close()

    def _ask(self, stop: Stop) -> None:
        # Our own reasons (SIGTERM, silence) never replace a command, and a later command replaces an earlier one:
        # a pause may become a cancellation. No lock: this also runs in a signal handler, and assignment is atomic.
        if self._stop is None:
            self._stop = stop

    def _read(self) -> None:
        try:
            for line in read_lines(self._connection):
                self._obey(line)
        except LineTooLong:
            pass
        self._ask(_ALONE)  # the supervisor is gone

    def _obey(self, line: bytes) -> None:
        try:
            command = COMMANDS.validate_json(line)
        except ValidationError:
            self.warn("unknown_command", f"Ignored a command that this trainer does not know: {line[:100]!r}")
            return
        self._last_tick = time.monotonic()
        if isinstance(command, Stop):
            self._stop = command
        elif isinstance(command, Stored):
            with self._lock:
                self._unstored.discard(command.step)
        else:
            assert isinstance(command, Tick)

    def _watch(self) -> None:
        pause_s = min(1.0, self._tick_timeout_s / 4)
        silent = 0
        while self._stop is None and silent < 2:
            # Twice in a row: after a SIGCONT or a long wait for the interpreter, ticks may lie unread in the socket.
            silent = silent + 1 if time.monotonic() - self._last_tick > self._tick_timeout_s else 0
            time.sleep(pause_s)
        self._ask(_ALONE)


_ALONE = Stop(reason=StopReason.OUTAGE, checkpoint=True, deadline_s=60)
