"""What GPU time was used and what it costs: rows written when an attempt gives its GPUs back, and what runs now.

Seconds are GPU-seconds: those on a GPU that an attempt shared count by its share of the device's memory. Charged is
everything but `platform_fault_s`, which is refunded. Nothing is split at a month's boundary: a row belongs to the
month (UTC) in which its attempt gave the GPU back, and what runs now belongs, so far an estimate, to this month.
"""

import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, datetime
from decimal import Decimal

from sqlalchemy import text
from sqlalchemy.orm import Session

from tunery.errors import Invalid

_ROW = """
  job_id, attempt_id, gpu_id, gpu_class, {at} AS at, share, price_per_hour,
  gpu_seconds * share AS gpu_seconds, loading_s * share AS loading_s, productive_s * share AS productive_s,
  user_fault_s * share AS user_fault_s, platform_fault_s * share AS platform_fault_s,
  (gpu_seconds - platform_fault_s) * share AS charged_s, {running} AS running
"""
_ENDED = f"SELECT {_ROW.format(at='created_at', running='false')} FROM usage WHERE project_id = :project"
_LIVE = f"SELECT {_ROW.format(at='now()', running='true')} FROM live_usage(:project)"
_MONTH = f"""
  {_ENDED} AND created_at >= :start AND created_at < :start + interval '1 month'
  UNION ALL {_LIVE} WHERE :start = date_trunc('month', now())
"""
_SUMS = """
  sum(gpu_seconds) AS gpu_seconds, sum(loading_s) AS loading_s, sum(productive_s) AS productive_s,
  sum(user_fault_s) AS user_fault_s, sum(platform_fault_s) AS platform_fault_s, sum(charged_s) AS charged_s,
  sum(charged_s::numeric / 3600 * price_per_hour) AS amount,
  coalesce(sum(gpu_seconds) FILTER (WHERE running), 0) AS running_s
"""


@dataclass(frozen=True)
class Used:
    """GPU-seconds of whatever was added up. The four kinds are all there is, but for rows of the first release."""

    gpu_seconds: float = 0.0
    loading_s: float = 0.0
    productive_s: float = 0.0
    user_fault_s: float = 0.0
    platform_fault_s: float = 0.0
    charged_s: float = 0.0
    amount: Decimal | None = None
    """None: nothing of it had a price."""
    running_s: float = 0.0
    """Of `gpu_seconds`: of attempts that still run."""


@dataclass(frozen=True)
class Line:
    """One attempt on one GPU."""

    job_id: uuid.UUID
    attempt_id: uuid.UUID
    gpu_id: uuid.UUID
    gpu_class: str
    at: datetime
    """When it gave the GPU back; now, while it runs."""
    share: float
    price_per_hour: Decimal | None
    gpu_seconds: float
    loading_s: float
    productive_s: float
    user_fault_s: float
    platform_fault_s: float
    charged_s: float
    running: bool

    @property
    def amount(self) -> Decimal | None:
        return None if self.price_per_hour is None else Decimal(self.charged_s) / 3600 * self.price_per_hour


def this_month(session: Session) -> date:
    """The first day of the month, by the database's clock."""
    return session.execute(text("SELECT date_trunc('month', now())::date")).scalar_one()


def month(session: Session, asked: str | None) -> date:
    """The first day of `2026-11`, or of this month. Raises Invalid."""
    if asked is None:
        return this_month(session)
    if not re.fullmatch(r"[12]\d{3}-(0[1-9]|1[0-2])", asked):
        fix = "Write it as year and month: 2026-11."
        raise Invalid(f"Invalid 'month': '{asked[:20]}' is no month.", param="month", fix=fix)
    return date.fromisoformat(f"{asked}-01")


def after(first: date) -> date:
    """The first day of the next month."""
    return date(first.year + first.month // 12, first.month % 12 + 1, 1)


def by_class(session: Session, project_id: uuid.UUID, start: date) -> dict[str, Used]:
    """A month of one project."""
    query = f"SELECT gpu_class, {_SUMS} FROM ({_MONTH}) lines GROUP BY gpu_class ORDER BY gpu_class"
    rows = session.execute(text(query), {"project": project_id, "start": start}).mappings()
    return {row["gpu_class"]: Used(**{name: row[name] for name in Used.__annotations__}) for row in rows}


def total(parts: Sequence[Used]) -> Used:
    priced = [part.amount for part in parts if part.amount is not None]
    names = [name for name in Used.__annotations__ if name != "amount"]
    seconds: dict[str, float] = {name: sum(getattr(part, name) for part in parts) for name in names}
    return Used(**seconds, amount=sum(priced, Decimal()) if priced else None)


@dataclass(frozen=True)
class Charged:
    seconds: float
    amount: Decimal


def charged(session: Session, project_id: uuid.UUID, start: date) -> Charged:
    """A month of one project in one figure, however many rows it has; what runs now is in it, so far."""
    query = """
      SELECT coalesce(sum(charged_s), 0) AS seconds, coalesce(sum(amount), 0) AS amount FROM (
        SELECT charged_s, amount FROM usage_totals WHERE project_id = :project AND month = :start
        UNION ALL
        SELECT s.charged_s, s.charged_s::numeric / 3600 * l.price_per_hour FROM live_usage(:project) l,
          LATERAL (SELECT (l.gpu_seconds - l.platform_fault_s) * l.share AS charged_s) s
        WHERE :start = date_trunc('month', now())) lines"""
    row = session.execute(text(query), {"project": project_id, "start": start}).one()
    return Charged(float(row.seconds), Decimal(row.amount))


def lines(session: Session, project_id: uuid.UUID, start: date) -> list[Line]:
    """A month of one project, in the order in which attempts ended; those that run come last."""
    query = f"SELECT * FROM ({_MONTH}) lines ORDER BY running, at, attempt_id, gpu_id"
    rows = session.execute(text(query), {"project": project_id, "start": start}).mappings()
    return [Line(**row) for row in rows]


def of_jobs(session: Session, project_id: uuid.UUID, job_ids: Sequence[uuid.UUID]) -> dict[uuid.UUID, Used]:
    """Of each job that ever held a GPU: all of its attempts, whichever month they belong to."""
    if not job_ids:
        return {}
    every = f"SELECT * FROM ({_ENDED} AND job_id = ANY(:jobs) UNION ALL {_LIVE} WHERE job_id = ANY(:jobs)) lines"
    query = f"SELECT job_id, {_SUMS} FROM ({every}) mine GROUP BY job_id"
    rows = session.execute(text(query), {"project": project_id, "jobs": list(job_ids)}).mappings()
    return {row["job_id"]: Used(**{name: row[name] for name in Used.__annotations__}) for row in rows}
