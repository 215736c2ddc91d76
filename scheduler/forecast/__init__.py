"""When each waiting job will start: the policy run forward over possible futures, durations drawn from what is known.

Of a few dozen futures the median and the ninth decile of a job's start are told. Given time for all of them, the same
snapshot gives the same answer; and a job's draws are its own, so that one forecast does not jitter against the next.
"""

import math
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import NormalDist

from scheduler.policy import schedule
from scheduler.simulation import Simulation, Work
from tunery.contracts.scheduling import JobView, Plan, Reason, Snapshot
from tunery.forecasts import ROUND_S, TOLD, Answer, Arrival, Forecast, Outlook, Question, in_own_order, rounded

Expected = Mapping[uuid.UUID, tuple[float, float]]

RUNS = 19
"""Futures of one forecast, if there is time for so many. Prime: see `_uniform`."""
LEAST_RUNS = 3
SEEN = 4000
"""Waiting jobs that take part, shared out among projects; what is behind them starts after what is told."""
HORIZON_S = 30 * 86_400.0
SHARED = 0.3
"""Of the variance of durations, the part that all jobs have in common: where estimates err, they err together."""
BATCH_S = 5.0
"""What happens within so long is decided on in one pass."""
DAY_S = 86_400.0
LEAST_HISTORY_S = 3600.0
"""A deployment of less than that has no rate of arrivals yet: what came is taken to come once in so long."""
_NORMAL = NormalDist()
_Z90 = _NORMAL.inv_cdf(0.9)
_TIMES = {"until": math.ceil, "free_at": math.ceil, "by": math.ceil, "limit_s": math.floor}
"""Numbers of reasons that are times, and how an answer rounds them."""


@dataclass(slots=True)
class _Future:
    """One simulated future: first starts, in their order, and how far it was followed."""

    starts: dict[uuid.UUID, float] = field(default_factory=dict)
    until: float = 0.0
    whole: bool = True
    """Not cut off for lack of time: what has not started by then never does."""

    def start(self, job_id: uuid.UUID) -> float:
        return self.starts.get(job_id, math.inf)

    def no_earlier(self, job_id: uuid.UUID) -> float:
        """It does not start before this; infinity: never."""
        return self.starts.get(job_id, math.inf if self.whole else self.until)


class _OutOfTime(Exception):
    pass


def forecast(
    snapshot: Snapshot,
    expected_s: Expected,
    recent: Sequence[Arrival] = (),
    *,
    budget_s: float = 5.0,
    told: int = TOLD,
) -> dict[uuid.UUID, Outlook]:
    """Every project that waits: its first `told` jobs, and a bound for those behind them.

    `expected_s`: how long jobs, waiting or running, hold their GPUs from now on, median and p90; of one that is not in
    it, its limit. `recent`: what was submitted within the last day; the like is to be expected. `budget_s`: seconds of
    this thread's CPU; with less, fewer futures are looked at, and less far.
    """
    seen = trim(snapshot)
    queues = _queues(seen)
    first = {job.id for queue in queues.values() for job in queue[:told]}
    futures = _futures(seen, expected_s, recent, first, budget_s)
    order = _order(seen.jobs, futures)
    counts = _Counts(order)
    return {project_id: _outlook(queue, told, futures, counts) for project_id, queue in queues.items()}


def what_if(
    snapshot: Snapshot,
    expected_s: Expected,
    question: Question,
    recent: Sequence[Arrival] = (),
    *,
    budget_s: float = 1.0,
) -> Answer:
    """Of a job that nobody has submitted. Times are seconds from now, rounded."""
    job = replace(question.job, queued_at=max(question.job.queued_at, snapshot.now))
    seen = trim(replace(snapshot, jobs=(*snapshot.jobs, job)), always=job)
    expected_s = {**expected_s, job.id: question.expected_s}
    futures = _futures(seen, expected_s, recent, {job.id}, budget_s)
    counts = _Counts(_order(seen.jobs, futures))
    found = _of_job(job, futures, counts)
    now, reason = snapshot.now, schedule(seen).reasons([job]).get(job.id)
    least = ROUND_S if reason is not None else 0.0  # what waits, be it for a checkpoint alone, does not start at once
    relative = replace(
        found,
        start_p50=None if found.start_p50 is None else max(least, rounded(found.start_p50 - now) or 0.0),
        start_p90=None if found.start_p90 is None else max(least, rounded(found.start_p90 - now) or 0.0),
        not_before=None if found.not_before is None else (found.not_before - now) // ROUND_S * ROUND_S,
    )
    return Answer(relative, _coarse(reason) if reason is not None else None)


# ---- futures ------------------------------------------------------------------------------------------------------


def _futures(
    snapshot: Snapshot,
    expected_s: Expected,
    recent: Sequence[Arrival],
    wanted: Iterable[uuid.UUID],
    budget_s: float,
) -> list[_Future]:
    """The first with every duration its median and nobody new; as many more as there is time for, each drawn."""
    wanted, futures = set(wanted), list[_Future]()
    began = time.thread_time()
    for run in range(RUNS + 1):
        spent_s = time.thread_time() - began
        if run > LEAST_RUNS and spent_s * (run + 1) / run > budget_s:
            break
        stop_at = began + spent_s + (budget_s - spent_s) / max(LEAST_RUNS + 1 - run, 1)
        work = _drawn(snapshot, expected_s, run) if run else _medians(snapshot, expected_s)
        futures.append(_future(snapshot, work, _arrivals(snapshot.now, recent, run) if run else [], wanted, stop_at))
    return futures


def _future(
    snapshot: Snapshot,
    work: Mapping[uuid.UUID, Work],
    arrivals: Iterable[tuple[JobView, Work]],
    wanted: set[uuid.UUID],
    stop_at: float,
) -> _Future:
    future = _Future()

    def watch(_simulation: Simulation, _seen: Snapshot, plan: Plan) -> None:
        for start in plan.starts:
            future.starts.setdefault(start.job_id, _simulation.now)
        if time.thread_time() > stop_at:
            raise _OutOfTime

    simulation = Simulation(snapshot, work, policy=_decide, watch=watch, batch_s=BATCH_S)
    for job, its_work in arrivals:
        simulation.arrive(job, its_work)
    try:
        simulation.run(until=snapshot.now + HORIZON_S, starts_of=wanted)
    except _OutOfTime:
        future.whole = False
    future.until = simulation.now
    return future


_decide = partial(schedule, explained=False)


def _medians(snapshot: Snapshot, expected_s: Expected) -> dict[uuid.UUID, Work]:
    return _work(snapshot, lambda job_id, limit_s: expected_s.get(job_id, (limit_s, limit_s))[0])


def _arrivals(now: float, recent: Sequence[Arrival], run: int) -> list[tuple[JobView, Work]]:
    """The last day over again, from another moment on in each future: bursts stay bursts."""
    if not recent:
        return []
    span_s = min(max(now - min(one.job.queued_at for one in recent), LEAST_HISTORY_S), DAY_S)
    shift_s = _uniform(uuid.UUID(int=1), run) * span_s
    made: list[tuple[JobView, Work]] = []
    for one in recent:
        job = replace(
            one.job,
            id=uuid.UUID(int=one.job.id.int ^ (run << 64)),
            queued_at=now + (one.job.queued_at - now + shift_s) % span_s,
        )
        made.append((job, Work(_draw(job.id, one.expected_s, run))))
    return made


def _drawn(snapshot: Snapshot, expected_s: Expected, run: int) -> dict[uuid.UUID, Work]:

    def draw(job_id: uuid.UUID, limit_s: float) -> float:
        return _draw(job_id, expected_s.get(job_id, (limit_s, limit_s)), run)

    return _work(snapshot, draw)


def _draw(job_id: uuid.UUID, expected_s: tuple[float, float], run: int) -> float:
    """Log-normal, as durations are."""
    p50, p90 = expected_s
    if p90 <= p50 or p50 <= 0:
        return max(p50, 1.0)
    together, alone = _deviation(uuid.UUID(int=0), run), _deviation(job_id, run)
    return max(p50 * (p90 / p50) ** ((math.sqrt(SHARED) * together + math.sqrt(1 - SHARED) * alone) / _Z90), 1.0)


def _work(snapshot: Snapshot, seconds: Callable[[uuid.UUID, float], float]) -> dict[uuid.UUID, Work]:
    work = {job.id: Work(max(seconds(job.id, job.limit_s), 1.0)) for job in snapshot.jobs}
    for one in snapshot.running:
        passed_s = max(snapshot.now - one.started_at, 0.0)
        left_s = seconds(one.job_id, max(one.limit_s - passed_s, 1.0))
        work[one.job_id] = Work(passed_s + max(left_s, 1.0))
    return work


def _deviation(job_id: uuid.UUID, run: int) -> float:
    """Standard normal, a function of its arguments."""
    return _NORMAL.inv_cdf(_uniform(job_id, run))


def _uniform(job_id: uuid.UUID, run: int) -> float:
    """Between 0 and 1: the middle of another one of `RUNS` equal parts in each run, in an order of the job's own."""
    mask = (1 << 64) - 1
    # SplitMix64 (Steele et al. 2014): ids that follow each other must not draw alike
    mixed = ((job_id.int ^ (job_id.int >> 64)) + 0x9E3779B97F4A7C15) & mask
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & mask
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & mask
    mixed ^= mixed >> 31
    step, first = 1 + mixed % (RUNS - 1), (mixed >> 32) % RUNS
    return ((step * run + first) % RUNS + 0.5) / RUNS


# ---- what is told of them -----------------------------------------------------------------------------------------


class _Counts:
    """How many jobs, of its own project and of others, come before each."""

    def __init__(self, order: list[JobView]) -> None:
        self.ahead: dict[uuid.UUID, tuple[int, int]] = {}
        own: dict[uuid.UUID, int] = {}
        for place, job in enumerate(order):
            before = own.get(job.project_id, 0)
            self.ahead[job.id] = before, place - before
            own[job.project_id] = before + 1


def _order(jobs: Iterable[JobView], futures: list[_Future]) -> list[JobView]:
    """As they start in the median future; those that do not start there, last."""
    places = {job_id: place for place, job_id in enumerate(futures[0].starts)}
    return sorted(jobs, key=lambda job: (places.get(job.id, len(places)), job.queued_at, job.id))


def _of_job(job: JobView, futures: list[_Future], counts: _Counts) -> Forecast:
    own, others = counts.ahead[job.id]
    drawn = futures[1:] or futures
    p50, p90 = (_quantile([one.start(job.id) for one in drawn], q) for q in (0.5, 0.9))
    not_before = None
    if math.isinf(p90):
        bound = min(one.no_earlier(job.id) for one in futures)
        not_before = bound if math.isfinite(bound) and math.isinf(p50) else None
    return Forecast(
        own + others + 1,
        own,
        others,
        None if math.isinf(p50) else p50,
        None if math.isinf(p90) else p90,
        not_before,
    )


def _quantile(values: list[float], q: float) -> float:
    """The smallest that a share of `q` does not exceed."""
    return sorted(values)[math.ceil(q * len(values)) - 1]


def _outlook(queue: list[JobView], told: int, futures: list[_Future], counts: _Counts) -> Outlook:
    jobs = {job.id: _of_job(job, futures, counts) for job in queue[:told]}
    if len(queue) <= told:
        return Outlook(jobs)
    last = max(jobs.values(), key=lambda one: one.position)
    behind = [job.id for job in queue[told:]]
    bound = min(min([one.until, *(one.starts[each] for each in behind if each in one.starts)]) for one in futures)
    return Outlook(jobs, Forecast(last.position + 1, told, last.ahead_others, not_before=bound))


def _coarse(reason: Reason) -> dict[str, object]:
    numbers = dict(reason.numbers)
    for name, whole in _TIMES.items():
        if isinstance(value := numbers.get(name), int | float):
            numbers[name] = whole(value / ROUND_S) * int(ROUND_S)
    return {"code": reason.code.value, "numbers": numbers}


# ---- what takes part ----------------------------------------------------------------------------------------------


def trim(snapshot: Snapshot, always: JobView | None = None) -> Snapshot:
    """Without the jobs that are too far behind to matter to what is told; `always` stays."""
    queues = _queues(snapshot)
    share = max(TOLD + 10, SEEN // max(len(queues), 1))
    if all(len(queue) <= share for queue in queues.values()):
        return snapshot
    stays = {hold.job_id for hold in snapshot.holds} | ({always.id} if always else set())
    kept = [job for queue in queues.values() for place, job in enumerate(queue) if place < share or job.id in stays]
    return replace(snapshot, jobs=tuple(kept))


def _queues(snapshot: Snapshot) -> dict[uuid.UUID, list[JobView]]:
    queues: dict[uuid.UUID, list[JobView]] = {}
    for job in snapshot.jobs:
        queues.setdefault(job.project_id, []).append(job)
    return {project_id: in_own_order(queue) for project_id, queue in queues.items()}
