"""The two ends of a trainer's socket: a writer that never blocks a step, a reader that no flood can fill."""

import contextlib
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator

from pydantic import BaseModel

from tunery.contracts.events import DROPPABLE, MAX_LINE_BYTES, Event


class LineTooLong(ValueError):
    """The peer sent a line of more than `MAX_LINE_BYTES`."""


def read_lines(connection: socket.socket) -> Iterator[bytes]:
    """Yield whole lines until the peer closes.

    Raises:
        LineTooLong: before more than `MAX_LINE_BYTES` of one line are held.
    """
    buffer = bytearray()
    while True:
        try:
            block = connection.recv(65536)
        except (ConnectionResetError, OSError):
            return
        if not block:
            return
        buffer += block
        *lines, rest = buffer.split(b"\n")
        yield from (bytes(line) for line in lines if line)
        buffer = bytearray(rest)
        if len(buffer) > MAX_LINE_BYTES:
            raise LineTooLong(f"a line of more than {MAX_LINE_BYTES} bytes")


def send_line(connection: socket.socket, message: BaseModel) -> None:
    """Write one message, blocking. For the supervisor's small commands.

    Raises:
        OSError: the peer is gone.
    """
    connection.sendall(message.model_dump_json().encode() + b"\n")


def _elapsed() -> float:
    """Seconds of a clock that nobody sets; where there is one, it also counts while the host is suspended."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


class EventWriter:
    """Numbers events and sends them from a thread of its own, so that a slow reader never delays a step.

    Above `capacity` waiting events, droppable ones are dropped and counted; the others always wait their turn.
    """

    def __init__(self, connection: socket.socket, capacity: int = 1000) -> None:
        self.dropped = 0
        self._connection = connection
        self._capacity = capacity
        self._seq = 0
        # steps are timed by these stamps, so a clock that is set meanwhile must not move them
        self._began = time.time() - _elapsed()
        self._queue: deque[bytes] = deque()
        self._wake = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._drain, name="events", daemon=True)
        self._thread.start()

    def send(self, event: Event) -> None:
        """Queue one event. Never blocks, never raises."""
        with self._wake:
            if isinstance(event, DROPPABLE) and len(self._queue) >= self._capacity:
                self.dropped += 1
                return
            self._seq += 1
            numbered = event.model_copy(update={"seq": self._seq, "time": self._began + _elapsed()})
            self._queue.append(numbered.model_dump_json().encode() + b"\n")
            self._wake.notify()

    def close(self, timeout_s: float = 10.0) -> None:
        """Send what waits, then half-close, so that the reader sees the end after the last event."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join(timeout_s)
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_WR)

    def _drain(self) -> None:
        while True:
            with self._wake:
                while not self._queue and not self._closed:
                    self._wake.wait()
                if not self._queue:
                    return
                line = self._queue.popleft()
            try:
                self._connection.sendall(line)
            except OSError:  # nobody listens any more; the missing tick will stop us
                with self._wake:
                    self._queue.clear()
                    self._closed = True
                return
