"""Why a job waits and when it starts: the same in every object that shows a waiting job."""

import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from api.schemas.common import Out
from tunery import forecasts, waiting
from tunery.contracts.scheduling import JobView, Reason, WaitCode
from tunery.forecasts import Forecast, Outlook
from tunery.jobs import AttemptView, Job, view_of
from tunery.states import JobState

_OTHERS_COUNT = (WaitCode.BUSY, WaitCode.FRAGMENTED, WaitCode.NO_SLOT, WaitCode.RESERVED, WaitCode.BEHIND)
"""Reasons that come from other jobs; elsewhere their number explains nothing."""


class ReasonOut(Out):
    """`code` is a stable word, `numbers` those in `message`; docs/scheduler.md lists them. Times are Unix seconds."""

    code: str
    message: str
    numbers: dict[str, Any]


class AheadOut(Out):
    """Waiting jobs that are expected to start before this one. Other projects' are counted, never named."""

    own: int
    others: int | None
    """Null until the scheduler has forecast it."""


class StartOut(Out):
    """When it starts, Unix seconds: as likely before as after `p50`, and nine times in ten before `p90`."""

    p50: int | None
    p90: int | None
    not_before: int | None
    """Where the others are not known: in no future that was looked at it starts earlier."""


class WaitOut(Out):
    reason: ReasonOut
    position: int | None
    """Among all waiting jobs, in the order in which they are expected to start. Null until that is known."""
    jobs_ahead: AheadOut
    estimated_start: StartOut | None
    """Null until the scheduler has forecast it, and when its forecast is too old to be true."""
    advice: list[str]
    """What would help."""


@dataclass(frozen=True)
class Told:
    """What the scheduler said of a project's queue, for a page of its jobs."""

    reasons: dict[str, Any] = field(default_factory=dict)
    outlook: Outlook | None = None
    ranks: dict[uuid.UUID, int] = field(default_factory=dict)
    """Of those jobs that wait: their places among their project's."""


def wait_out(job: Job, attempts: list[AttemptView], told: Told) -> WaitOut | None:
    """None: it does not wait."""
    if job.state != JobState.QUEUED:
        return None
    newest = attempts[-1] if attempts else None
    if newest is not None and newest.attempt.ended_at is None:
        message = f"assigned to node {newest.node}, which has not begun yet"
        return _starting("assigned", message, {"node": newest.node})
    rank = told.ranks.get(job.id)
    if rank is None:
        return _starting("assigned", "assigned to a node, which has not begun yet", {})
    view = view_of(job)
    forecast = forecasts.of_job(told.outlook, job.id, rank)
    reason = waiting.reason_of(told.reasons, view)
    return WaitOut(
        reason=reason_out(reason, view, forecast),
        position=forecast.position if forecast else None,
        jobs_ahead=AheadOut(
            own=forecast.ahead_own if forecast else rank - 1, others=forecast.ahead_others if forecast else None
        ),
        estimated_start=start_out(forecast) if forecast else None,
        advice=waiting.advice(reason, view) if reason else [],
    )


def _starting(code: str, message: str, numbers: dict[str, Any]) -> WaitOut:
    reason = ReasonOut(code=code, message=message, numbers=numbers)
    return WaitOut(reason=reason, position=None, jobs_ahead=AheadOut(own=0, others=0), estimated_start=None, advice=[])


def reason_out(reason: Reason | None, job: JobView, forecast: Forecast | None) -> ReasonOut:
    if reason is None:
        return ReasonOut(code="not_looked_at", message="the scheduler has not looked at it yet", numbers={})
    message = waiting.message(reason, job)
    if forecast is not None and reason.code in _OTHERS_COUNT and "ahead" not in dict(reason.numbers):
        message += waiting.ahead(forecast.ahead_own, forecast.ahead_others)
    return ReasonOut(code=reason.code.value, message=message, numbers=dict(reason.numbers))


def start_out(forecast: Forecast) -> StartOut:
    """What was forecast for a moment that has passed is still to come."""
    now = time.time()
    return StartOut(
        p50=None if forecast.start_p50 is None else round(max(forecast.start_p50, now)),
        p90=None if forecast.start_p90 is None else round(max(forecast.start_p90, now)),
        not_before=None if forecast.not_before is None else round(max(forecast.not_before, now)),
    )
