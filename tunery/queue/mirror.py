"""What a leader remembers from pass to pass, so that a pass reads what changed and not all that waits.

A mirror that is behind costs a refused decision at most: whoever applies one looks again, under locks.
"""

import time
import uuid
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from tunery.contracts.scheduling import JobView
from tunery.jobs import LEAST_LIMIT_S
from tunery.states import JobState

V = TypeVar("V")

_FRESH_S = 300.0
"""A mirror is read anew that often: nothing that we did not think of may last."""
_NO_LABELS: frozenset[tuple[str, str]] = frozenset()
_JOB = f"""
    SELECT id, organization_id, project_id, extract(epoch FROM queued_at)::float8, gpus, coalesce(required_bytes, 0),
      priority, urgent, greatest(limit_s - used_s, {LEAST_LIMIT_S}), gpu_class, node_labels, shareable, preemptible,
      engine_key, coalesce(engine_bytes, 0), state FROM jobs"""
_ALL = f"{_JOB} WHERE state = '{JobState.QUEUED}' ORDER BY queued_at, id"
_CHANGED = f"{_JOB} WHERE changed_in >= %s AND changed_in < %s"


class Mirror:
    """The waiting jobs as this leader last saw them, and the views that have not changed since.

    Whoever applies decisions from it drops it (`forget`) after an error, and when the leader's epoch changes.
    """

    def __init__(self) -> None:
        self.jobs: dict[uuid.UUID, JobView] = {}
        """Every job that is queued, also one that has an assigned attempt already."""
        self.told: dict[uuid.UUID, Any] = {}
        """What each project was last told of its queue."""
        self.first = True
        """Nothing was told by this leader yet."""
        self._read_up_to: int | None = None
        self._read_at = 0.0
        self._views: dict[str, dict[tuple[Any, ...], Any]] = {}

    def forget(self) -> None:
        """Read everything anew at the next pass."""
        self.__init__()

    def read_jobs(self, cursor: Any, oldest_running: int, next_unseen: int) -> None:
        """Bring `jobs` up to date with the cursor's snapshot.

        The two numbers are the snapshot's: every transaction below `oldest_running` had ended when it was taken, so
        the next reading need not look for it; one from `next_unseen` on cannot be in it. Rows may carry such a number
        all the same, when they were restored from another cluster.
        """
        if self._read_up_to is None or time.monotonic() - self._read_at > _FRESH_S:
            rows = cursor.execute(_ALL).fetchall()
            self.jobs = {row[0]: _job(row) for row in rows}
            self._read_at = time.monotonic()
        else:
            for row in cursor.execute(_CHANGED, (self._read_up_to, next_unseen)):
                if row[-1] == JobState.QUEUED:
                    self.jobs[row[0]] = _job(row)
                else:
                    self.jobs.pop(row[0], None)
        self._read_up_to = oldest_running

    def views(self, kind: str, rows: Iterable[tuple[Any, ...]], make: Callable[..., V]) -> list[V]:
        """One view a row; a row that is as it was at the last pass keeps its view. Rows hold plain values only."""
        before = self._views.get(kind, {})
        now: dict[tuple[Any, ...], V] = {}
        for row in rows:
            view = before.get(row)
            now[row] = make(*row) if view is None else view
        self._views[kind] = now
        return list(now.values())


def _job(row: tuple[Any, ...]) -> JobView:
    (id_, organization, project, queued_at, gpus, size, priority, urgent, limit_s, gpu_class, labels, *rest, _) = row
    shareable, preemptible, engine_key, engine_bytes = rest
    return JobView(
        id_,
        organization,
        project,
        queued_at,
        gpus,
        size,
        priority,
        urgent,
        limit_s,
        gpu_class,
        frozenset(labels.items()) if labels else _NO_LABELS,
        shareable,
        preemptible,
        engine_key=engine_key,
        engine_bytes=engine_bytes,
    )
