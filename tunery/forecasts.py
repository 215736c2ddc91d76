"""When waiting jobs will start: what the scheduler forecasts for each project, and its answers to what-if questions.

Whoever forecasts sees every project; what is stored for one project counts the jobs of the others and names none.
"""

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self, cast

from sqlalchemy import delete, func, null, select, text
from sqlalchemy.orm import Session

from tunery import durations, wake
from tunery.contracts.scheduling import JobView, Snapshot
from tunery.errors import QuotaExceeded
from tunery.ids import uuid7
from tunery.models import Job, QueueQuestion, QueueView

TOLD = 50
"""So many waiting jobs of each project are told when they start; those behind them, when not before."""
ROUND_S = 300
"""Times of an answer are rounded up to this: more would tell about other projects' jobs, and be no truer."""
RECENT = 1000
MOST_WAITING = 20
FORGET_S = 60.0
"""A question is of no use to anybody after this."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """Of one waiting job. Times are seconds since the epoch; None: not within what was looked at."""

    position: int
    """In the order in which all waiting jobs are expected to start; the next one is 1."""
    ahead_own: int
    ahead_others: int
    start_p50: float | None = None
    start_p90: float | None = None
    not_before: float | None = None
    """Said where the others are not known."""


@dataclass(frozen=True, slots=True)
class Outlook:
    """Of one project."""

    jobs: Mapping[uuid.UUID, Forecast]
    """The first `TOLD`."""
    beyond: Forecast | None = None
    """Of every job behind them: at least this position, not before this time."""


# ---- of what waits ------------------------------------------------------------------------------------------------


def store(session: Session, outlooks: Mapping[uuid.UUID, Outlook], as_of: float, keep_s: float) -> None:
    """Replace what every project was told. It is shown for `keep_s` after `as_of`; then it is too old to be true."""
    ordered = sorted(outlooks)
    session.execute(_STORE, {"ids": ordered, "told": [_told(outlooks[one], keep_s) for one in ordered], "at": as_of})
    session.execute(_CLEAR, {"ids": ordered})


_STORE = text(
    """
    INSERT INTO queue_views (project_id, forecast, forecast_at)
    SELECT p.id, v.told, to_timestamp(:at)
    FROM unnest(CAST(:ids AS uuid[]), CAST(:told AS jsonb[])) AS v (id, told) JOIN projects p ON p.id = v.id
    ORDER BY p.id
    ON CONFLICT (project_id) DO UPDATE SET forecast = excluded.forecast, forecast_at = excluded.forecast_at
    """
)
_CLEAR = text("UPDATE queue_views SET forecast = '{}' WHERE project_id <> ALL(:ids) AND forecast <> '{}'")


def _told(outlook: Outlook, keep_s: float) -> str:
    jobs = {str(job_id): _short(one) for job_id, one in outlook.jobs.items()}
    return json.dumps({"keep_s": keep_s, "jobs": jobs, "beyond": _short(outlook.beyond) if outlook.beyond else None})


def _short(one: Forecast) -> dict[str, Any]:
    return {name: value for name, value in asdict(one).items() if value is not None}


def of_project(session: Session, project_id: uuid.UUID) -> Outlook | None:
    """What the scheduler last forecast for this project's jobs; None when it is too old to be shown."""
    fresh = QueueView.forecast_at > func.now() - text("make_interval(secs => (forecast ->> 'keep_s')::float8)")
    query = select(QueueView.forecast).where(QueueView.project_id == project_id, QueueView.forecast != {}, fresh)
    if (told := session.scalar(query)) is None:
        return None
    beyond = told.get("beyond")
    jobs = {uuid.UUID(job_id): Forecast(**one) for job_id, one in told["jobs"].items()}
    return Outlook(jobs, Forecast(**beyond) if beyond else None)


def of_job(outlook: Outlook | None, job_id: uuid.UUID, own_rank: int) -> Forecast | None:
    """`own_rank`: among its project's waiting jobs, the first one 1."""
    if outlook is None:
        return None
    if (found := outlook.jobs.get(job_id)) is not None:
        return found
    if (beyond := outlook.beyond) is None or own_rank <= len(outlook.jobs):
        return None  # it has come since
    behind = own_rank - 1 - beyond.ahead_own
    return Forecast(beyond.position + max(behind, 0), own_rank - 1, beyond.ahead_others, not_before=beyond.not_before)


@dataclass(frozen=True, slots=True)
class Arrival:
    """A job that was submitted lately: the like of it will come again."""

    job: JobView
    """`queued_at` is when it came."""
    expected_s: tuple[float, float]
    """How long the whole of it was expected to hold its GPUs: median and p90."""


def expected(session: Session, snapshot: Snapshot) -> dict[uuid.UUID, tuple[float, float]]:
    """Seconds that each job of a snapshot, waiting or running, holds its GPUs from now on: median and p90."""
    ids = [job.id for job in snapshot.jobs] + [one.job_id for one in snapshot.running]
    return durations.of_ids(session, ids) if ids else {}


def recent(session: Session) -> list[Arrival]:
    """The last day's jobs, but no more than `RECENT` of them."""
    lately = Job.queued_at > func.now() - text("interval '1 day'")
    query = select(*_SHAPE, null().label("progress")).where(lately, Job.required_bytes.is_not(None))
    rows = session.execute(query.order_by(Job.queued_at.desc()).limit(RECENT)).all()
    whole = durations.of_jobs(session, cast("Sequence[Job]", rows))
    return [Arrival(_view(row), whole[row.id]) for row in rows]


_SHAPE = (
    Job.id, Job.organization_id, Job.project_id, Job.queued_at, Job.gpus, Job.required_bytes, Job.limit_s,
    Job.gpu_class, Job.node_labels, Job.shareable, Job.preemptible, Job.base_model_id, Job.recipe, Job.estimated_tokens,
)  # fmt: skip


def _view(row: Any) -> JobView:
    return JobView(
        row.id,
        row.organization_id,
        row.project_id,
        row.queued_at.timestamp(),
        row.gpus,
        row.required_bytes,
        limit_s=row.limit_s,
        gpu_class=row.gpu_class,
        labels=frozenset(row.node_labels.items()),
        shareable=row.shareable,
        preemptible=row.preemptible,
    )


# ---- what-if ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Question:
    """A job that has not been submitted: when would it start?"""

    id: uuid.UUID
    job: JobView
    expected_s: tuple[float, float]
    """How long it would hold its GPUs: median and p90."""


@dataclass(frozen=True, slots=True)
class Answer:
    """Times are multiples of `ROUND_S`, in seconds from when it was asked; None: not within what was looked at."""

    forecast: Forecast
    reason: Mapping[str, Any] | None
    """Why it would wait, as in `queue_views.reasons`; None: it would start at once."""

    @classmethod
    def read(cls, told: Mapping[str, Any]) -> Self:
        return cls(Forecast(**told["forecast"]), told["reason"])


def ask(session: Session, job: JobView, expected_s: tuple[float, float]) -> uuid.UUID:
    """Put a question to the scheduler, which is woken when this transaction commits. Returns the question's id.

    Raises:
        QuotaExceeded: `MOST_WAITING` questions of this project wait for their answers.
    """
    waiting = select(func.count()).select_from(QueueQuestion).where(QueueQuestion.answer.is_(None))
    waiting = waiting.where(QueueQuestion.created_at > func.now() - _interval(FORGET_S))
    if (session.scalar(waiting) or 0) >= MOST_WAITING:
        message = f"This project already has {MOST_WAITING} unanswered questions to the scheduler."
        raise QuotaExceeded(message, fix="Ask again in a minute.")
    asked = {
        "organization_id": str(job.organization_id),
        "gpus": job.gpus,
        "required_bytes": job.required_bytes,
        "priority": job.priority,
        "urgent": job.urgent,
        "limit_s": job.limit_s,
        "gpu_class": job.gpu_class,
        "labels": dict(job.labels),
        "shareable": job.shareable,
        "preemptible": job.preemptible,
        "expected_s": list(expected_s),
    }
    session.add(question := QueueQuestion(id=uuid7(), project_id=job.project_id, asked=asked))
    session.flush()
    wake.forecaster(session)
    return question.id


def answer_of(session: Session, question_id: uuid.UUID) -> Answer | None:
    """None: it has not been answered."""
    told = session.scalar(select(QueueQuestion.answer).where(QueueQuestion.id == question_id))
    return Answer.read(told) if told is not None else None


def questions(session: Session) -> list[Question]:
    """The unanswered ones that somebody may still wait for, the oldest first; older ones are forgotten."""
    session.execute(delete(QueueQuestion).where(QueueQuestion.created_at < func.now() - _interval(FORGET_S)))
    query = select(QueueQuestion, func.extract("epoch", QueueQuestion.created_at))
    query = query.where(QueueQuestion.answer.is_(None)).order_by(QueueQuestion.created_at).limit(20)
    return [_question(row, float(at)) for row, at in session.execute(query)]


def _interval(seconds: float) -> Any:
    return func.make_interval(0, 0, 0, 0, 0, 0, seconds)


def _question(row: QueueQuestion, at: float) -> Question:
    asked = dict(row.asked)
    p50, p90 = asked.pop("expected_s")
    labels = frozenset(asked.pop("labels").items())
    organization_id = uuid.UUID(asked.pop("organization_id"))
    job = JobView(row.id, organization_id, row.project_id, at, labels=labels, **asked)
    return Question(row.id, job, (p50, p90))


def answer(session: Session, question_id: uuid.UUID, found: Answer) -> None:
    told = {"forecast": _short(found.forecast), "reason": found.reason}
    session.execute(_ANSWER, {"id": question_id, "told": json.dumps(told)})


_ANSWER = text("UPDATE queue_questions SET answer = CAST(:told AS jsonb), answered_at = now() WHERE id = :id")


def rounded(seconds: float | None) -> float | None:
    """Up to the next multiple of `ROUND_S`; 0 stays 0."""
    return None if seconds is None else -(-max(seconds, 0.0) // ROUND_S) * ROUND_S


def in_own_order(jobs: Sequence[JobView]) -> list[JobView]:
    """As the policy takes the jobs of one project."""
    return sorted(jobs, key=lambda job: (not job.urgent, -job.priority, job.queued_at, job.id.int))
