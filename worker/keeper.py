"""The heartbeat of an attempt: the lease in one direction, the tick in the other, on threads of their own."""

import threading
from collections.abc import Callable

import structlog
from sqlalchemy.exc import DBAPIError

from tunery import leases
from tunery.db import Sessions, transaction
from tunery.leases import Fenced
from tunery.settings import NodeSettings
from tunery.states import StopReason
from worker.patience import boottime
from worker.workspace import Work

log = structlog.get_logger(__name__)


class Keeper:
    """Renews the lease and says so. Owns its sessions, so that no slow write of anybody delays a renewal."""

    def __init__(
        self,
        work: Work,
        sessions: Sessions,
        settings: NodeSettings,
        *,
        on_stop: Callable[[StopReason, float | None], None],
        on_fenced: Callable[[], None],
        tick: Callable[[], None],
        on_late: Callable[[], None],
    ) -> None:
        self._on_late = on_late
        self._work, self._sessions, self._settings = work, sessions, settings
        self._on_stop, self._on_fenced, self._tick = on_stop, on_fenced, tick
        self._told: StopReason | None = None
        self._heard = boottime()
        self._wake = threading.Event()
        self._over = threading.Event()
        # two threads: a database that hangs must not keep the tick, or the clock of the outage, from going on
        self._threads = [
            threading.Thread(target=self._keep, name="keeper", daemon=True),
            threading.Thread(target=self._tick_on, name="ticker", daemon=True),
        ]

    def start(self) -> None:
        self._heard = boottime()
        for thread in self._threads:
            thread.start()

    def poke(self) -> None:
        """Renew now: the reply may carry news. Safe in a signal handler."""
        self._wake.set()

    def stop(self) -> None:
        self._over.set()
        self._wake.set()
        for thread in self._threads:
            thread.join(timeout=5)

    def _keep(self) -> None:
        while not self._over.is_set():
            self._wake.clear()
            if self._renew():
                if boottime() - self._heard > 2 * self._settings.renew_s:
                    self._on_late()
                self._heard = boottime()
            self._wake.wait(self._settings.renew_s)

    def _tick_on(self) -> None:
        while not self._over.is_set():
            self._tick()
            if boottime() - self._heard > self._settings.outage_grace_s:
                self._tell(StopReason.OUTAGE)
            self._over.wait(self._settings.tick_s)

    def _renew(self) -> bool:
        """True if the database answered. An answer of no rows means that the attempt is not ours any more."""
        try:
            with transaction(self._sessions) as session:
                asked = leases.renew(session, self._work.attempt_id, self._work.fence, self._settings.lease_s)
        except Fenced:
            self._over.set()
            self._wake.set()
            self._on_fenced()
            return True
        except DBAPIError as error:
            log.warning("could not renew; training goes on", error=str(error.orig).strip()[:200])
            return False
        if asked is not None:
            self._tell(asked.reason, asked.within_s)
        return True

    def _tell(self, reason: StopReason, within_s: float | None = None) -> None:
        if reason != self._told:
            self._told = reason
            self._on_stop(reason, within_s)
