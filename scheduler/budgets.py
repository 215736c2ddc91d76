"""Looking after budgets: alerts, blocking what is over, and asking what still runs there to checkpoint and stop."""

import structlog

from tunery import budgets, failpoints, ids, leases, queue
from tunery.budgets import Seen
from tunery.db import Sessions, transaction

log = structlog.get_logger(__name__)

_WHY = "The project's budget for this month is used up"


class Budgets:
    def __init__(self, sessions: Sessions, grace_s: float) -> None:
        self._sessions, self._grace_s = sessions, grace_s

    def run(self, epoch: int) -> None:
        """One look at every project with a budget. Raises queue.Deposed.

        What one look leaves undone, because this scheduler died, the next one finds again.
        """
        with transaction(self._sessions) as session:
            seen = budgets.look(session)
        for project in seen:
            if not project.settled:
                self._settle(epoch, project)
            if project.over:
                self._stop(epoch, project)

    def _settle(self, epoch: int, project: Seen) -> None:
        with transaction(self._sessions) as session:
            queue.assert_leader(session, epoch)
            settled = budgets.settle(session, project.project_id)
            failpoints.reach("budget.settled")
        if settled is None:
            return
        now, alerts = settled
        told = log.bind(project=ids.encode(ids.PROJECT, project.project_id))
        used, budget = budgets.words(now.used), budgets.words(now.limits)
        for threshold in alerts:
            told.warning("budget alert", threshold=threshold, used=used, budget=budget)
        if now.reason != now.blocked:
            told.warning("blocked by its budget" if now.reason else "no longer blocked", reason=now.reason)

    def _stop(self, epoch: int, project: Seen) -> None:
        with transaction(self._sessions) as session:
            attempts = budgets.running(session, project.project_id)
        for attempt_id in attempts:
            with transaction(self._sessions) as session:
                queue.assert_leader(session, epoch)
                if leases.evict(session, attempt_id, self._grace_s, _WHY):
                    log.info("asked to stop by its budget", attempt=str(attempt_id))
