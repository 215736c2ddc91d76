"""`/v1/queue`: counts, the project's own waiting jobs, and what would become of one that has not been submitted."""

import time
from typing import Annotated, Literal

from pydantic import Field

from api.schemas.cluster import CountsOut, counts_out
from api.schemas.common import Out, unix
from api.schemas.job_request import JobIn, hyperparameters_of
from api.schemas.jobs import ResourcesOut, SchedulingOut, resources_out, scheduling_out
from api.schemas.waits import ReasonOut, StartOut, Told, WaitOut, reason_out, wait_out
from tunery import ids, quotes
from tunery.contracts.scheduling import Reason, WaitCode
from tunery.forecasts import Answer
from tunery.jobs import Job
from tunery.queue_info import Queue
from tunery.recipes import Extension
from tunery.whatif import Asked


class QueuedJobOut(Out):
    id: str
    object: Literal["tunery.queued_job"] = "tunery.queued_job"
    model: str
    suffix: str | None
    created_at: int
    resources: ResourcesOut
    scheduling: SchedulingOut
    queue: WaitOut


class QueueOut(CountsOut):
    jobs: list[QueuedJobOut]
    """The first of your own project's waiting jobs, in its order."""


def shown(queue: Queue, rows: list[Job], told: Told) -> QueueOut:
    counts = counts_out(queue)
    waits = [(row, wait_out(row, [], told)) for row in rows]
    return QueueOut(**dict(counts), jobs=[_queued(row, wait) for row, wait in waits if wait is not None])


def _queued(job: Job, wait: WaitOut) -> QueuedJobOut:
    return QueuedJobOut(
        id=ids.encode(ids.JOB, job.id),
        model=job.model,
        suffix=job.suffix,
        created_at=unix(job.created_at),
        resources=resources_out(job),
        scheduling=scheduling_out(job),
        queue=wait,
    )


class SimulateIn(JobIn):
    """A job as it would be submitted. Without a file say how many rows there are."""

    training_file: Annotated[str | None, Field(max_length=256)] = None  # pyright: ignore[reportIncompatibleVariableOverride]
    rows: Annotated[int | None, Field(ge=1, le=10**10)] = None
    """Of a file whose rows have not been checked, or of none at all."""
    row_bytes: Annotated[float, Field(ge=1, le=10**9)] = 1200
    """Mean bytes of a row's JSON; used with `rows` where there is no file."""
    longest_row_bytes: Annotated[int | None, Field(ge=1, le=10**9)] = None


class AheadNowOut(Out):
    own: int
    others: int


class CostEstimateOut(Out):
    """Of the class that fits best. `amount` is null where that class has no price."""

    gpu_class: str | None
    hours: float
    amount: float | None


class SimulationOut(Out):
    """Nothing was submitted. Times are rounded up to five minutes."""

    object: Literal["tunery.queue_simulation"] = "tunery.queue_simulation"
    position: int
    """Among all waiting jobs, in the order in which they are expected to start."""
    jobs_ahead: AheadNowOut
    starts_in: StartOut
    """Seconds from now; 0: at once."""
    estimated_start: StartOut
    """The same as Unix seconds."""
    reason: ReasonOut | None
    """Why it would wait; null: it would start at once."""
    gpu_bytes: int
    """Memory that it would reserve on each GPU."""
    limit_s: float
    cost: CostEstimateOut


def quote_of(body: SimulateIn) -> quotes.Request:
    return quotes.Request(
        model=body.model,
        training_file=body.training_file,
        rows=body.rows,
        row_bytes=body.row_bytes,
        longest_row_bytes=body.longest_row_bytes,
        hyperparameters=hyperparameters_of(body),
        extension=body.tunery or Extension(),
    )


def simulation_out(asked: Asked, answer: Answer) -> SimulationOut:
    told, now = answer.forecast, time.time()
    seconds = (told.start_p50, told.start_p90, told.not_before)
    p50, p90, not_before = (None if one is None else round(one) for one in seconds)
    at = [None if one is None else round(now) + round(one) for one in seconds]
    best = asked.quote.classes[0]
    return SimulationOut(
        position=told.position,
        jobs_ahead=AheadNowOut(own=told.ahead_own, others=told.ahead_others),
        starts_in=StartOut(p50=p50, p90=p90, not_before=not_before),
        estimated_start=StartOut(p50=at[0], p90=at[1], not_before=at[2]),
        reason=_reason(answer, asked),
        gpu_bytes=asked.job.required_bytes,
        limit_s=round(asked.job.limit_s),
        cost=CostEstimateOut(gpu_class=best.gpu_class, hours=round(best.hours, 4), amount=best.amount),
    )


def _reason(answer: Answer, asked: Asked) -> ReasonOut | None:
    if answer.reason is None:
        return None
    reason = Reason(WaitCode(answer.reason["code"]), tuple(answer.reason["numbers"].items()))
    return reason_out(reason, asked.job, answer.forecast)
