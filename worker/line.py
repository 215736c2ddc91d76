"""The supervisor's end of its attempt's socket: what the trainer says comes out of a queue, checked; commands go in."""

import queue
import socket
import struct
import threading
from contextlib import suppress

import structlog
from pydantic import ValidationError

from tunery.contracts.channel import LineTooLong, read_lines, send_line
from tunery.contracts.events import EVENTS, PROTOCOL, Checkpoint, Command, Event, Failed, Finished, Started, Stop
from tunery.states import FailureCode
from worker.workspace import Workspace

log = structlog.get_logger(__name__)

Said = Event | type[EOFError]
"""An event, or that the trainer's end is closed."""
_NUL, _REPLACEMENT = b"\\u0000", b"\\ufffd"
"""Postgres stores no NUL; what a model wrote must not stop its own result from being stored."""
_SEND_S = 5


class Line:
    """One trainer, or one attempt of an engine, connects to it. `tell` from any thread."""

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace
        self._inbox: queue.Queue[Said] = queue.Queue(maxsize=10_000)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._connection: socket.socket | None = None
        self._telling = threading.Lock()
        self._untold: Stop | None = None

    @property
    def connected(self) -> bool:
        return self._connection is not None

    def open(self) -> None:
        """Before the trainer starts: whoever comes later finds somebody listening."""
        self._listener.bind(str(self._workspace.socket))
        self._workspace.socket.chmod(0o600)
        self._listener.listen(1)

    def start(self) -> None:
        threading.Thread(target=self._listen, name="listener", daemon=True).start()

    def hear(self, timeout_s: float) -> Said:
        """The next that was said. Raises queue.Empty."""
        return self._inbox.get(timeout=timeout_s)

    def tell(self, command: Command) -> None:
        with self._telling, suppress(OSError):  # a closed end is noticed by whoever reads it
            if self._connection is not None:
                send_line(self._connection, command)
            elif isinstance(command, Stop):
                self._untold = command  # said as soon as somebody listens

    def hang_up(self) -> None:
        """An engine detaches the attempt when its connection closes, and must do so before its bytes are given on."""
        if self._connection is not None:
            with suppress(OSError):
                self._connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.hang_up()
        self._listener.close()

    def _listen(self) -> None:
        """Accept the trainer and pass on what it says. The bounded inbox makes a flood wait in the socket."""
        try:
            connection, _ = self._listener.accept()
            # a trainer that does not read must not make us wait when we tell it something
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", _SEND_S, 0))
            with self._telling:
                self._connection, untold = connection, self._untold
            if untold is not None:
                self.tell(untold)
            for line in read_lines(connection):
                event = _understood(EVENTS.validate_json(line.replace(_NUL, _REPLACEMENT)))
                self._inbox.put(self._ours(event))
        except OSError:
            pass  # closed because the attempt is over
        except (LineTooLong, ValidationError) as error:
            log.error("the trainer broke the protocol", error=str(error)[:500])
            self._inbox.put(Failed(code=FailureCode.INTERNAL, message="The trainer sent a line that is no event."))
        self._inbox.put(EOFError)

    def _ours(self, event: Event) -> Event:
        """The event; or, when a trainer names a folder that is not its own to store or delete, its end."""
        if not isinstance(event, Checkpoint | Finished) or self._workspace.holds(event.path):
            return event
        return _ended(event, f"The trainer named a folder outside its workspace: {event.path[:200]}")


def _understood(event: Event) -> Event:
    """The event; or, when a trainer of another release introduces itself, the end of its attempt."""
    if not isinstance(event, Started) or event.protocol == PROTOCOL:
        return event
    return _ended(
        event,
        f"The trainer speaks version {event.protocol} of the protocol, this node version {PROTOCOL}: they are of "
        "different releases. Restart the node (docs/upgrade.md).",
    )


def _ended(event: Event, message: str) -> Failed:
    return Failed(code=FailureCode.INTERNAL, message=message, seq=event.seq, time=event.time, step=event.step)
