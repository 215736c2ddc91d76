"""What the scheduler counts, and what it reads for operators when it is scraped.

It is the one program whose role sees every project's rows, so whatever comes from the database is told here: by every
scheduler alike, the leader and those that wait. What is counted is counted by whoever led at the time.
"""

from collections.abc import Callable, Iterable
from typing import TypeVar

import structlog
from prometheus_client import Counter, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from sqlalchemy.orm import Session

from tunery import census
from tunery.census import Census, Ended
from tunery.db import Sessions, transaction
from tunery.telemetry.asking import Asked

T = TypeVar("T")
log = structlog.get_logger(__name__)

_MINUTES = (1, 5, 15, 30, 60, 300, 900, 1800, 3600, 3 * 3600, 6 * 3600, 12 * 3600, 86400, 3 * 86400)
FINISHED = Counter("tunery_jobs_finished_total", "Jobs that ended.", ["outcome", "method"])
FAILED = Counter("tunery_jobs_failed_total", "Jobs that failed, by whose fault it was.", ["code", "fault"])
QUEUE_WAIT = Histogram("tunery_job_queue_wait_seconds", "From submission to the first GPU.", buckets=_MINUTES)
DURATION = Histogram("tunery_job_duration_seconds", "From submission to the end.", ["outcome"], buckets=_MINUTES)
LOST = Counter("tunery_attempts_lost_total", "Attempts whose supervisor stopped renewing its lease.")
PASS = Histogram(
    "tunery_scheduler_pass_duration_seconds",
    "One pass of the policy over the jobs that wait.",
    buckets=(0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
)
_FRESH_S, _TOTALS_FRESH_S = 5.0, 60.0


def count(ended: Ended) -> None:
    FINISHED.labels(ended.outcome, ended.method).inc()
    DURATION.labels(ended.outcome).observe(ended.duration_s)
    if ended.code is not None:
        FAILED.labels(ended.code, ended.fault).inc()


class Leadership(Collector):
    """Whether this process leads, and under which epoch."""

    def __init__(self, epoch: Callable[[], int | None]) -> None:
        self._epoch = epoch

    def collect(self) -> Iterable[Metric]:
        epoch = self._epoch()
        yield GaugeMetricFamily(
            "tunery_scheduler_leading", "1 where this process leads.", value=float(epoch is not None)
        )
        yield GaugeMetricFamily("tunery_scheduler_epoch", "The epoch it leads under, or 0.", value=epoch or 0)


class Fleet(Collector):
    """Gauges from the database, read at a scrape and kept for seconds; without a database they are absent."""

    def __init__(self, sessions: Sessions, live_s: float) -> None:
        self._live_s = live_s
        self._now = Asked(lambda: _read(sessions, census.take), keep_s=_FRESH_S)
        self._stored = Asked(lambda: _read(sessions, census.stored_bytes), keep_s=_TOTALS_FRESH_S)

    def describe(self) -> Iterable[Metric]:
        return ()  # registering asks nothing

    def collect(self) -> Iterable[Metric]:
        self._now.begin()
        self._stored.begin()
        try:
            yield from _gauges(self._now.get(), self._live_s)
            stored = GaugeMetricFamily("tunery_storage_bytes", "Bytes in the object store.", labels=["kind"])
            for kind, size in self._stored.get().items():
                stored.add_metric([kind], size)
            yield stored
        except Exception as error:  # noqa: BLE001 - a scrape without these still tells the rest
            log.warning("no numbers from the database", error=type(error).__name__)


def _read(sessions: Sessions, what: Callable[[Session], T]) -> T:
    with transaction(sessions) as session:
        return what(session)


def _gauges(now: Census, live_s: float) -> Iterable[Metric]:
    jobs = GaugeMetricFamily("tunery_jobs", "Jobs that have not ended.", labels=["state", "method"])
    for (state, method), number in now.jobs.items():
        jobs.add_metric([state, method], number)
    yield jobs
    yield GaugeMetricFamily(
        "tunery_jobs_oldest_wait_seconds", "Age of the longest waiting job.", value=now.oldest_wait_s
    )
    up = GaugeMetricFamily("tunery_worker_up", "1 for a node that spoke lately.", labels=["worker", "gpu_model"])
    age = GaugeMetricFamily("tunery_worker_heartbeat_age_seconds", "Age of a node's last word.", labels=["worker"])
    for worker in now.workers:
        up.add_metric([worker.name, worker.gpu_model], float(worker.state != "down" and worker.age_s < live_s))
        if worker.state != "down":
            age.add_metric([worker.name], worker.age_s)
    yield up
    yield age
    yield GaugeMetricFamily("tunery_outbox_messages", "Messages that wait to be sent.", value=now.outbox_messages)
    yield GaugeMetricFamily("tunery_outbox_oldest_age_seconds", "Age of the oldest of them.", value=now.outbox_age_s)
    yield GaugeMetricFamily("tunery_leader_up", "1 while some scheduler leads.", value=float(now.led))
