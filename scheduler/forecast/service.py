"""The forecaster's loops: what every project is told of its queue, and the answers to what-if questions."""

import threading
import time
from collections.abc import Callable

import structlog
from sqlalchemy.exc import DBAPIError

from scheduler.forecast import forecast, trim, what_if
from scheduler.service import policy_settings
from tunery import forecasts, queue, wake
from tunery.contracts.scheduling import Snapshot
from tunery.db import Sessions, transaction
from tunery.queue import Deposed
from tunery.settings import SchedulerSettings

log = structlog.get_logger(__name__)

_SHARE = 0.2
"""Of a CPU, at most, for what every project is told."""
_KEEP = 3
"""Forecasts are shown until they are so many pauses old."""
_LOOK_S = 1.0
"""Between two looks for questions when nothing wakes us: behind a pooler notifications do not arrive."""
_AGAIN_S = 1.0


class Forecaster:
    """Works while the scheduler called `holder` leads; what it writes carries that scheduler's epoch."""

    def __init__(self, sessions: Sessions, settings: SchedulerSettings, holder: str) -> None:
        self._sessions, self._settings, self._holder = sessions, settings, holder
        self._policy = policy_settings(settings)
        self._mirrors = {name: queue.Mirror() for name in ("tell", "answer")}
        """One for each loop."""
        self._told = True
        """Something may have been told that no longer holds."""
        self._woken = threading.Event()
        self._stop = threading.Event()

    def run(self, stop: threading.Event) -> None:
        self._stop = stop
        loops: list[tuple[str, Callable[[], object], Callable[[], object]]] = [
            ("tell", self.tell, lambda: stop.wait(self._settings.forecast_s)),
            ("answer", self.answer, self._await_question),
        ]
        threads = [threading.Thread(target=self._loop, args=loop, name=loop[0], daemon=True) for loop in loops]
        threads.append(threading.Thread(target=self._listen, name="listen", daemon=True))
        for thread in threads:
            thread.start()
        stop.wait()
        self._woken.set()
        for thread in threads[:2]:
            thread.join(timeout=5)

    def tell(self) -> int:
        """One forecast for everybody; returns how many projects were told something."""
        with transaction(self._sessions) as session:
            epoch = queue.epoch_of(session, self._holder)
        if epoch is None:
            self._told = True
            return 0
        seen = self._look("tell")
        if not seen.jobs and not self._told:
            return 0
        seen = trim(seen)
        with transaction(self._sessions) as session:
            expected_s = forecasts.expected(session, seen) if seen.jobs else {}
            recent = forecasts.recent(session) if seen.jobs else []
        began = time.thread_time()
        outlooks = forecast(seen, expected_s, recent, budget_s=_SHARE * self._settings.forecast_s)
        spent_s = time.thread_time() - began
        with transaction(self._sessions) as session:
            queue.assert_leader(session, epoch)
            forecasts.store(session, outlooks, seen.now, _KEEP * self._settings.forecast_s)
        self._told = bool(outlooks)
        log.debug("forecast", projects=len(outlooks), jobs=len(seen.jobs), cpu_s=round(spent_s, 3))
        return len(outlooks)

    def answer(self) -> int:
        """Answer what has been asked; returns how many questions that were."""
        with transaction(self._sessions) as session:
            if queue.epoch_of(session, self._holder) is None:
                return 0
            asked = forecasts.questions(session)
        if not asked:
            return 0
        seen = self._look("answer")
        with transaction(self._sessions) as session:
            expected_s = forecasts.expected(session, trim(seen))
            recent = forecasts.recent(session)
        for question in asked:
            found = what_if(seen, expected_s, question, recent)
            with transaction(self._sessions) as session:
                forecasts.answer(session, question.id, found)
        return len(asked)

    def _look(self, name: str) -> Snapshot:
        mirror = self._mirrors[name]
        try:
            with transaction(self._sessions) as session:
                return queue.snapshot(session, self._settings.lease_s, self._policy, mirror)
        except BaseException:
            mirror.forget()
            raise

    def _await_question(self) -> None:
        if self._woken.wait(_LOOK_S) and not self._stop.is_set():
            self._woken.clear()

    def _listen(self) -> None:
        wake.listen_for_questions(self._sessions.kw["bind"], self._woken.set, self._stop)

    def _loop(self, name: str, work: Callable[[], object], rest: Callable[[], object]) -> None:
        while not self._stop.is_set():
            try:
                work()
            except Deposed:
                log.info("its scheduler leads no more", loop=name)
            except DBAPIError as error:
                log.warning("database trouble; trying again", loop=name, error=str(error.orig).strip()[:200])
                self._stop.wait(_AGAIN_S)
            except Exception:  # a loop that dies silently is worse than one that complains
                log.exception("loop failed; trying again", loop=name)
                self._stop.wait(_AGAIN_S)
            rest()
