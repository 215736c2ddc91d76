"""Monthly budgets of projects: what is used, what accepted jobs hold, what is left; alerts, and the stop at the end.

A job holds what it is expected to use from its acceptance to its end, less what it has used by then. Used is what the
ledger charges. At 100 % nothing of the project starts any more, and what runs is asked to checkpoint and stop; it goes
on when the month turns (UTC) or the budget is set anew.
"""

import uuid
from dataclasses import dataclass, field
from datetime import date
from decimal import Decimal

from sqlalchemy import func, select, text, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from tunery import audit, ids, ledger, outbox, wake
from tunery.audit import Actor
from tunery.errors import QuotaExceeded
from tunery.models import Attempt, Budget, BudgetAlert, Job, Project, UsageHold
from tunery.shares import Known
from tunery.states import AttemptState

THRESHOLDS = (80, 100)
"""Per cent of the budget at which somebody is told."""
_EXHAUSTED = "the monthly budget"
"""How `projects.blocked` begins where a budget is the reason: no other block is ever lifted here."""
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Amounts:
    """By the two measures of a budget. `money` is in the price list's unit."""

    gpu_hours: float = 0.0
    money: float = 0.0


@dataclass(frozen=True)
class Limits:
    """None is no limit."""

    gpu_hours: float | None = None
    money: float | None = None

    def __bool__(self) -> bool:
        return self.gpu_hours is not None or self.money is not None


@dataclass(frozen=True)
class Standing:
    """One project in this month."""

    month: date
    limits: Limits
    used: Amounts
    held: Amounts
    holding_jobs: int
    blocked: str | None
    alerts: list[BudgetAlert] = field(default_factory=list)

    @property
    def left(self) -> Limits:
        """Neither used nor held. Never negative."""
        hours, money = self.limits.gpu_hours, self.limits.money
        return Limits(
            None if hours is None else max(0.0, hours - self.used.gpu_hours - self.held.gpu_hours),
            None if money is None else max(0.0, money - self.used.money - self.held.money),
        )


# ---- by the api -------------------------------------------------------------------------------------------------


def standing(session: Session, project_id: uuid.UUID) -> Standing:
    """What one project may use, has used and holds, and what it was told this month."""
    month = ledger.this_month(session)
    used, held, jobs = _sums(session, project_id, month)
    told = select(BudgetAlert).where(BudgetAlert.project_id == project_id, BudgetAlert.month == month)
    blocked = session.scalar(select(Project.blocked).where(Project.id == project_id))
    alerts = list(session.scalars(told.order_by(BudgetAlert.threshold)))
    return Standing(month, _limits(session, project_id), used, held, jobs, blocked, alerts)


def put(session: Session, actor: Actor, project: Known, gpu_hours: Decimal | None, money: Decimal | None) -> None:
    """Set a project's budget; both None takes it away. What was blocked is looked at anew within seconds."""
    before = _limits(session, project.id)
    new = {"monthly_gpu_hours": gpu_hours, "monthly_amount": money, "exhausted_month": None}
    row = insert(Budget).values(project_id=project.id, **new)
    session.execute(row.on_conflict_do_update(index_elements=["project_id"], set_=new | {"updated_at": func.now()}))
    after = _limits(session, project.id)
    if before or after:  # the same budget set anew is a decision, too: it unblocks; taking away none is not
        target = f"{project.organization}:{project.name}"
        audit.record(session, actor, "project.budget", target, before=_shown(before), after=_shown(after))


def hold(session: Session, job: Job) -> None:
    """Hold what a job that is being accepted is expected to use. Its rows are not known yet: its time limit counts.

    Submits of one project take turns from here on, so that two that fit alone must fit together.

    Raises:
        QuotaExceeded: it does not fit into what is left of the month.
    """
    own = UsageHold(job_id=job.id, project_id=job.project_id, gpu_seconds=job.gpus * (job.time_limit_s or job.limit_s))
    own.price_per_hour = _price(session, job.gpu_class)
    if limits := _limits(session, job.project_id):
        key = func.hashtextextended(f"budget:{job.project_id}", 0)
        session.execute(select(func.pg_advisory_xact_lock(key)))
        month = ledger.this_month(session)
        used, held, jobs = _sums(session, job.project_id, month)
        _refuse_excess(Standing(month, limits, used, held, jobs, None), job, own)
    session.add(own)


def refine(session: Session, job: Job, expected_s: float | None = None) -> None:
    """The rows are known: hold what the job is now expected to take, its limit at most. What was accepted stays so."""
    seconds = job.gpus * min(job.limit_s, expected_s or job.limit_s)
    session.execute(update(UsageHold).where(UsageHold.job_id == job.id).values(gpu_seconds=seconds))


# ---- by the scheduler -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seen:
    """A project with a budget, or one that a budget still blocks."""

    project_id: uuid.UUID
    month: date
    limits: Limits
    used: Amounts
    exhausted: bool
    """It was used up this month and has not been set anew."""
    blocked: str | None
    told: frozenset[int]

    @property
    def level(self) -> tuple[float, str]:
        """Part of the budget that is used, by the measure that is nearer its end, and which one that is."""
        parts = [(0.0, "gpu_hours")]
        for kind, limit, used in (
            ("gpu_hours", self.limits.gpu_hours, self.used.gpu_hours),
            ("amount", self.limits.money, self.used.money),
        ):
            if limit is not None:
                parts.append((used / limit if limit else float("inf"), kind))
        return max(parts)

    @property
    def over(self) -> bool:
        return bool(self.limits) and (self.exhausted or self.level[0] >= 1)

    @property
    def reason(self) -> str | None:
        """What `projects.blocked` should say."""
        if not self.over:
            return None
        turns = f"it turns on {ledger.after(self.month).isoformat()} (UTC)"
        return f"{_EXHAUSTED} of {words(self.limits)} is used up; {turns}"

    @property
    def passed(self) -> list[int]:
        """Thresholds that nobody was told of yet."""
        level = self.level[0] if self.limits else 0
        return [one for one in THRESHOLDS if level * 100 >= one and one not in self.told]

    @property
    def settled(self) -> bool:
        """There is nothing to write about it."""
        ours = self.blocked is None or self.blocked.startswith(_EXHAUSTED)
        return not self.passed and (self.reason == self.blocked or not ours) and self.over == self.exhausted


def look(session: Session, project_id: uuid.UUID | None = None) -> list[Seen]:
    """Every project that a budget concerns, or that one alone: one query, whatever their number."""
    query = """
      WITH m AS (SELECT date_trunc('month', now()) AS start),
      wanted AS (
        SELECT p.id, p.blocked, b.monthly_gpu_hours, b.monthly_amount, b.exhausted_month
        FROM projects p LEFT JOIN budgets b ON b.project_id = p.id
        WHERE (b.monthly_gpu_hours IS NOT NULL OR b.monthly_amount IS NOT NULL OR starts_with(p.blocked, :ours))
          AND (CAST(:one AS uuid) IS NULL OR p.id = :one)),
      lines AS (
        SELECT t.project_id, t.charged_s, t.amount FROM usage_totals t, m WHERE t.month = m.start::date
        UNION ALL
        SELECT l.project_id, s.charged_s, s.charged_s::numeric / 3600 * l.price_per_hour
        FROM live_usage(:one) l, LATERAL (SELECT (l.gpu_seconds - l.platform_fault_s) * l.share AS charged_s) s),
      sums AS (
        SELECT project_id, sum(charged_s) / 3600 AS hours, sum(amount) AS money FROM lines GROUP BY project_id)
      SELECT w.*, m.start::date AS month, coalesce(s.hours, 0) AS hours, coalesce(s.money, 0) AS money,
        ARRAY(SELECT threshold FROM budget_alerts a WHERE a.project_id = w.id AND a.month = m.start::date) AS told
      FROM wanted w CROSS JOIN m LEFT JOIN sums s ON s.project_id = w.id ORDER BY w.id"""
    return [
        Seen(
            row.id,
            row.month,
            Limits(_float(row.monthly_gpu_hours), _float(row.monthly_amount)),
            Amounts(float(row.hours), float(row.money)),
            row.exhausted_month == row.month,
            row.blocked,
            frozenset(row.told),
        )
        for row in session.execute(text(query), {"ours": _EXHAUSTED, "one": project_id})
    ]


def settle(session: Session, project_id: uuid.UUID) -> tuple[Seen, list[int]] | None:
    """Write down where a project stands by now: the alerts that are new (returned), and whether it is blocked.

    Its budget is locked first, so that one that is set anew meanwhile is not judged by what it was.
    """
    session.execute(select(Budget.project_id).where(Budget.project_id == project_id).with_for_update())
    if not (found := look(session, project_id)):
        return None
    (seen,) = found
    fresh = [threshold for threshold in seen.passed if _tell(session, seen, threshold)]
    if seen.over and not seen.exhausted:
        session.execute(update(Budget).where(Budget.project_id == project_id).values(exhausted_month=seen.month))
    if not seen.settled and seen.reason != seen.blocked and (not seen.blocked or seen.blocked.startswith(_EXHAUSTED)):
        session.execute(update(Project).where(Project.id == project_id).values(blocked=seen.reason))
        wake.scheduler(session)
    return seen, fresh


def running(session: Session, project_id: uuid.UUID) -> list[uuid.UUID]:
    """Attempts that hold GPUs and that nobody has asked to stop."""
    going = (AttemptState.ASSIGNED, AttemptState.CLAIMED, AttemptState.RUNNING)
    query = select(Attempt.id).where(Attempt.project_id == project_id, Attempt.state.in_(going))
    return list(session.scalars(query.where(Attempt.stop_reason.is_(None)).order_by(Attempt.id)))


# ---- helpers ----------------------------------------------------------------------------------------------------


def words(limits: Limits | Amounts) -> str:
    """`10 GPU-hours and 25.50`: what there is a limit for."""
    hours = None if limits.gpu_hours is None else f"{_number(limits.gpu_hours)} GPU-hours"
    money = None if limits.money is None else f"{_number(limits.money)} in money"
    return " and ".join(filter(None, (hours, money)))


def _tell(session: Session, seen: Seen, threshold: int) -> bool:
    """Once a month and project, whoever tells it: the row decides, and the message goes with it."""
    _, kind = seen.level
    used = seen.used.gpu_hours if kind == "gpu_hours" else seen.used.money
    budget = seen.limits.gpu_hours if kind == "gpu_hours" else seen.limits.money
    row = insert(BudgetAlert).values(
        project_id=seen.project_id, month=seen.month, threshold=threshold, kind=kind, used=used, budget=budget
    )
    if session.execute(row.on_conflict_do_nothing().returning(BudgetAlert.threshold)).first() is None:
        return False
    payload = {
        "project_id": ids.encode(ids.PROJECT, seen.project_id),
        "month": seen.month.strftime("%Y-%m"),
        "threshold": threshold,
        "kind": kind,
        "used": round(used, 4),
        "budget": budget,
    }
    outbox.send(session, outbox.BUDGET_ALERT, seen.project_id, payload)
    return True


def _sums(session: Session, project_id: uuid.UUID, month: date) -> tuple[Amounts, Amounts, int]:
    """Used this month, still held by unfinished jobs, and how many of them hold anything."""
    spent = ledger.charged(session, project_id, month)
    holds = list(session.scalars(select(UsageHold).where(UsageHold.project_id == project_id)))
    done = ledger.of_jobs(session, project_id, [one.job_id for one in holds])
    rest = [max(0.0, one.gpu_seconds - done.get(one.job_id, ledger.Used()).charged_s) / 3600 for one in holds]
    money = sum(hours * float(one.price_per_hour or 0) for hours, one in zip(rest, holds, strict=True))
    used = Amounts(spent.seconds / 3600, float(spent.amount))
    return used, Amounts(sum(rest), money), sum(hours > 0 for hours in rest)


def _price(session: Session, gpu_class: str | None) -> Decimal | None:
    """Of the class that the job asks for; else the highest, since it may get any."""
    query = "SELECT max(price_per_hour) FROM gpu_classes WHERE CAST(:name AS varchar) IS NULL OR name = :name"
    return session.execute(text(query), {"name": gpu_class}).scalar()


def _refuse_excess(now: Standing, job: Job, own: UsageHold) -> None:
    hours = own.gpu_seconds / 3600
    asked = Amounts(hours, hours * float(own.price_per_hour or 0))
    for measure, unit in (("gpu_hours", " GPU-hours"), ("money", " in money")):
        limit, left = getattr(now.limits, measure), getattr(now.left, measure)
        if limit is None or getattr(asked, measure) <= left + _ROUNDING:
            continue
        used, held, needs = (_number(getattr(part, measure)) for part in (now.used, now.held, asked))
        raise QuotaExceeded(
            f"The project has {_number(left)} of {_number(limit)}{unit} left in {now.month:%Y-%m} ({used} used, {held} "
            f"held by {now.holding_jobs} unfinished jobs). This job would hold {needs}: {job.gpus} x GPU for up to "
            f"{_number(own.gpu_seconds / job.gpus / 60)} minutes.",
            fix="Set a shorter time limit, wait for jobs to end, or ask your operator for a larger budget; "
            f"the month turns on {ledger.after(now.month).isoformat()} (UTC).",
            code="budget_exceeded",
        )


def _limits(session: Session, project_id: uuid.UUID) -> Limits:
    query = select(Budget.monthly_gpu_hours, Budget.monthly_amount).where(Budget.project_id == project_id)
    row = session.execute(query).one_or_none()
    return Limits(_float(row[0]), _float(row[1])) if row else Limits()


def _shown(limits: Limits) -> dict[str, float | None]:
    """As the API names them."""
    return {"monthly_gpu_hours": limits.gpu_hours, "monthly_amount": limits.money}


def _float(value: Decimal | None) -> float | None:
    return None if value is None else float(value)


def _number(value: float) -> str:
    """As many digits behind the point as say something."""
    return f"{value:,.{2 if value >= 1 else 4}f}".rstrip("0").rstrip(".")
