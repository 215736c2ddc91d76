"""When will they start? The policy simulated forward from a snapshot, several times over.

How long a job runs is known as a median and a bound that nine of ten keep: read as a log-normal. Each future takes
every job's duration from another part of it, so nine futures cover each job's range evenly; which part in which future
depends on the job's id alone, so a forecast repeats exactly. Jobs that nobody has submitted yet are not in it.
"""

import math
import uuid
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from statistics import NormalDist

from scheduler.policy import schedule
from scheduler.simulation import Simulation, Work
from tunery.contracts.scheduling import Snapshot

FUTURES = 9
"""The fifth and the ninth of nine are the median and the nine-tenths bound (plotting position k / (n + 1))."""

_Z90 = 1.2815515655446004
_NORMAL = NormalDist()
_GOLDEN, _MIX, _MASK = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, (1 << 64) - 1
"""Ids that follow each other must not draw alike."""


@dataclass(frozen=True, slots=True)
class Eta:
    """Of a start, seconds since the epoch. Infinite: not within what was simulated."""

    p50: float
    p90: float


def forecast(
    snapshot: Snapshot,
    expected_s: Mapping[uuid.UUID, tuple[float, float]],
    of: Collection[uuid.UUID] | None = None,
    *,
    futures: int = FUTURES,
    batch_s: float = 5.0,
    passes: int = 2000,
    until: float = math.inf,
) -> dict[uuid.UUID, Eta]:
    """When each waiting job of `of` (None: every one) starts.

    `expected_s`: p50 and p90 of the seconds for which an attempt of the job holds its GPUs: of a waiting job, the next
    one; of a running one, this one since its start. A job that is not in it runs to its limit. Each future ends after
    so many passes, or at `until`; a job that has not started by then gets infinity.
    """
    asked = None if of is None else set(of)
    wanted = [job.id for job in snapshot.jobs if asked is None or job.id in asked]
    seen: dict[uuid.UUID, list[float]] = {job_id: [] for job_id in wanted}
    for number in range(futures):
        simulation = Simulation(
            snapshot,
            {
                **_of_waiting(snapshot, expected_s, number, futures),
                **_of_running(snapshot, expected_s, number, futures),
            },
            policy=partial(schedule, explained=False),
            batch_s=batch_s,
        )
        simulation.run(until, wanted, passes)
        for job_id in wanted:
            starts = simulation.fates[job_id].starts
            seen[job_id].append(starts[0] if starts else math.inf)
    return {job_id: Eta(_quantile(starts, 0.5), _quantile(starts, 0.9)) for job_id, starts in seen.items()}


def _quantile(values: list[float], share: float) -> float:
    """The smallest that so large a share of further values would keep to."""
    ordered = sorted(values)
    return ordered[min(len(ordered), math.ceil(share * (len(ordered) + 1) - 1e-9)) - 1]


def _of_waiting(
    snapshot: Snapshot, expected_s: Mapping[uuid.UUID, tuple[float, float]], number: int, futures: int
) -> dict[uuid.UUID, Work]:
    return {
        job.id: Work(_drawn(expected_s[job.id], _part(job.id, number, futures)))
        for job in snapshot.jobs
        if job.id in expected_s
    }


def _of_running(
    snapshot: Snapshot, expected_s: Mapping[uuid.UUID, tuple[float, float]], number: int, futures: int
) -> dict[uuid.UUID, Work]:
    """Given that it has run so long already."""
    return {
        one.job_id: Work(
            _drawn(expected_s[one.job_id], _part(one.job_id, number, futures), snapshot.now - one.started_at)
        )
        for one in snapshot.running
        if one.job_id in expected_s and not one.ended
    }


def _part(job_id: uuid.UUID, number: int, futures: int) -> float:
    """In (0, 1): the middle of another one of `futures` equal parts in each future, in an order that the id decides."""
    mixed = (job_id.int * _GOLDEN) & _MASK
    mixed = ((mixed ^ (mixed >> 31)) * _MIX) & _MASK
    return ((number + (mixed >> 20)) % futures + 0.5) / futures


def _drawn(expected: tuple[float, float], part: float, elapsed_s: float = 0.0) -> float:
    """The quantile `part` of what lasts longer than `elapsed_s`."""
    p50, p90 = expected
    sigma = math.log(max(p90, p50) / p50) / _Z90
    if sigma < 1e-6:
        return max(p50, elapsed_s)
    passed = _NORMAL.cdf(math.log(elapsed_s / p50) / sigma) if elapsed_s > 0 else 0.0
    at = min(max(passed + (1 - passed) * part, 1e-6), 1 - 1e-6)
    return max(p50 * math.exp(sigma * _NORMAL.inv_cdf(at)), elapsed_s)
