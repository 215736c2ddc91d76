"""Giving up what is no longer needed: rows first, in short fenced transactions, then the objects, outside of them.

Every step may be repeated, and a scheduler that was deposed in the middle does no harm: a key is never used twice, so
what nobody refers to now nobody will refer to later.
"""

import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from itertools import islice

import structlog
from sqlalchemy.orm import Session

from tunery import orphans, queue, retention, trash
from tunery.db import Sessions, transaction
from tunery.settings import Retention
from tunery.storage import Storage

log = structlog.get_logger(__name__)

_BATCH = 500


class Tidy:
    def __init__(self, sessions: Sessions, storage: Storage, rules: Retention) -> None:
        self._sessions, self._storage, self._rules = sessions, storage, rules
        self._sweep_at = 0.0

    def run(self, epoch: int) -> None:
        """One look. Raises queue.Deposed, errors.Unavailable."""
        self._give_up_rows(epoch)
        self._empty_trash(epoch)
        if time.monotonic() >= self._sweep_at:
            self._sweep_at = time.monotonic() + self._rules.orphan_sweep_s  # first: one that fails waits its turn too
            self._sweep(epoch)

    def _give_up_rows(self, epoch: int) -> None:
        rules = self._rules
        keep, days = rules.keep_checkpoints, rules.keep_optimizer_days
        with transaction(self._sessions) as session:
            jobs = retention.jobs_with_old_state(session, keep, days)
        for job_id in jobs:
            if count := self._decide(epoch, lambda session, job=job_id: retention.drop_state(session, job, keep, days)):
                log.info("optimizer states given up", job=str(job_id), checkpoints=count)
        for what, step in (
            ("expired files", retention.expire_files),
            ("datasets without a job", retention.forget_datasets),
            ("old logs", lambda session: retention.expire_logs(session, rules.keep_logs_days)),
        ):
            if count := self._decide(epoch, step):
                log.info("given up", what=what, count=count)

    def _decide(self, epoch: int, step: Callable[[Session], int]) -> int:
        with transaction(self._sessions) as session:
            queue.assert_leader(session, epoch)
            return step(session)

    def _empty_trash(self, epoch: int) -> None:
        while True:
            with transaction(self._sessions) as session:
                queue.assert_leader(session, epoch)
                batch = trash.batch(session, _BATCH)
            if not batch:
                return
            self._storage.delete_all([key for _, entry in batch for key in self._below(entry)])
            with transaction(self._sessions) as session:
                trash.done(session, [number for number, _ in batch])
            log.info("objects deleted", entries=len(batch))

    def _below(self, entry: str) -> Iterator[str]:
        return self._storage.keys(entry) if entry.endswith("/") else iter((entry,))

    def _sweep(self, epoch: int) -> None:
        """What crashes left behind: objects without a row, and uploads in parts that nobody finished."""
        before = datetime.now(UTC) - timedelta(seconds=self._rules.orphan_age_s)
        deleted = 0
        for prefix in ("u/", "a/"):
            old = (found.key for found in self._storage.objects(prefix) if found.modified < before)
            while keys := list(islice(old, _BATCH)):
                with transaction(self._sessions) as session:
                    queue.assert_leader(session, epoch)
                    lost = orphans.unreferenced(session, keys)
                    if trash.held(session):
                        return
                self._storage.delete_all(lost)
                deleted += len(lost)
        aborted = self._storage.abort_uploads(before)
        if deleted or aborted:
            log.info("orphans deleted", objects=deleted, uploads=aborted)
