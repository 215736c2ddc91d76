"""Events on their way to Postgres: batched, in order, kept while the database is away."""

import threading
from collections import deque
from contextlib import suppress

import structlog
from sqlalchemy.exc import DBAPIError

from tunery import failpoints, progress
from tunery.contracts.events import DROPPABLE, Event
from tunery.db import Sessions, transaction
from tunery.leases import Fenced
from worker.patience import OutageTooLong, passing, persist
from worker.workspace import Work

log = structlog.get_logger(__name__)

_EVERY_S = 1.0
_BATCH = 1000
_CAPACITY = 50_000
"""Events kept through an outage; above it metrics go first, oldest first."""


class Recorder:
    def __init__(self, work: Work, sessions: Sessions) -> None:
        self._work, self._sessions = work, sessions
        self._waiting: deque[Event] = deque()
        self._lock = threading.Lock()
        self._writing = threading.Lock()
        self._over = threading.Event()
        self.dropped = 0
        self._thread = threading.Thread(target=self._run, name="recorder", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def add(self, event: Event) -> None:
        with self._lock:
            if len(self._waiting) >= _CAPACITY:
                self._make_room()
            self._waiting.append(event)

    def write_through(self, seq: int) -> None:
        """Store every event up to `seq` now. Raises Fenced, and DBAPIError while the database is away."""
        while (oldest := self._oldest()) is not None and oldest.seq <= seq:
            try:
                self._flush()
            except DBAPIError as error:
                if passing(error):
                    raise
                self._salvage()

    def finish(self, grace_s: float) -> None:
        """Write what is left. Raises Fenced or OutageTooLong."""
        self._over.set()
        self._thread.join(timeout=60)
        while self._waiting:
            try:
                persist("storing events", self._flush, grace_s)
            except (Fenced, OutageTooLong):
                raise
            except Exception:  # noqa: BLE001 - what a trainer says may fail in any way it likes
                self._salvage()

    def _run(self) -> None:
        while not self._over.wait(_EVERY_S):
            try:
                self._flush()
            except Fenced:
                return  # the keeper finds out for itself, and acts
            except Exception as error:  # noqa: BLE001 - an event may fail before it reaches Postgres, too
                if not _later(error):
                    with suppress(Fenced):  # the next round meets it again
                        self._salvage()
                self._over.wait(1)

    def _oldest(self) -> Event | None:
        with self._lock:  # the recorder's own thread may be taking it out right now
            return self._waiting[0] if self._waiting else None

    def _flush(self) -> None:
        self._write(_BATCH)

    def _write(self, most: int) -> None:
        with self._writing:
            with self._lock:
                batch = [self._waiting[index] for index in range(min(most, len(self._waiting)))]
            if not batch:
                return
            with transaction(self._sessions) as session:
                progress.ingest(session, self._work.attempt_id, self._work.fence, batch)
                failpoints.reach("events.written")
            with self._lock:
                written = {event.seq for event in batch}
                while self._waiting and self._waiting[0].seq in written:
                    self._waiting.popleft()

    def _salvage(self) -> None:
        """One event that can never be stored must not hold back, or take along, the ones around it."""
        for _ in range(_BATCH):
            try:
                self._write(1)
            except Fenced:
                raise
            except Exception as error:
                if _later(error):
                    return
                log.warning("an event was refused and left out", exc_info=True)
                with self._lock:
                    if self._waiting:
                        self._waiting.popleft()
                self.dropped += 1

    def _make_room(self) -> None:
        for index, event in enumerate(self._waiting):
            if isinstance(event, DROPPABLE):
                del self._waiting[index]
                self.dropped += 1
                return


def _later(error: Exception) -> bool:
    """May the same write succeed another time?"""
    return isinstance(error, DBAPIError) and passing(error)
