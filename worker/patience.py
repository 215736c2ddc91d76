"""Trying again while a server is away. A refusal is an answer; silence is not."""

import threading
import time
from collections.abc import Callable
from typing import TypeVar

import structlog
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError

from tunery.errors import Unavailable

log = structlog.get_logger(__name__)
T = TypeVar("T")


class OutageTooLong(Exception):
    """A server stayed away for longer than the grace allows."""


def boottime() -> float:
    """Seconds since boot, suspension included: a host that slept must know that it did."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def persist(what: str, work: Callable[[], T], grace_s: float, stop: threading.Event | None = None) -> T:
    """Run `work` until the server answers.

    Database and storage outages are waited out with growing pauses, `grace_s` at most; every other exception is an
    answer and passes through.

    Raises:
        OutageTooLong: the grace is over, or `stop` was set while waiting.
    """
    began, pause = boottime(), 0.2
    while True:
        try:
            return work()
        except (DBAPIError, Unavailable) as error:
            if isinstance(error, DBAPIError) and not passing(error):
                raise
            if boottime() - began > grace_s:
                raise OutageTooLong(what) from error
            log.warning("waiting for a server", what=what, error=str(error)[:200])
        if stop is not None and stop.wait(pause):
            raise OutageTooLong(what)
        if stop is None:
            time.sleep(pause)
        pause = min(pause * 2, 5)


_PASSING = ("08", "25006", "25P03", "40", "53", "55P03", "57", "58")
"""SQLSTATEs (or their classes) that a later try may not meet: connection, a server that is only a replica for now, a
transaction that was idle for too long, rollback, resources, lock timeout, shutdown, system."""


def passing(error: DBAPIError) -> bool:
    """Is this the server's trouble rather than our statement's? No SQLSTATE at all means that nobody answered."""
    state = getattr(error.orig, "sqlstate", None)
    if state is None:  # the client's own word: it may have refused a value without asking anybody
        return error.connection_invalidated or isinstance(error, OperationalError | InterfaceError)
    return state.startswith(_PASSING)
