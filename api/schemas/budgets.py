"""Budgets: what a project may use in a month, and where it stands."""

import uuid
from datetime import date
from decimal import Decimal
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from api.schemas.common import In, Out, unix
from tunery import ids, ledger
from tunery.budgets import Amounts, Limits, Standing

Limit = Annotated[Decimal, Field(ge=0, max_digits=14, decimal_places=4)]


class BudgetIn(In):
    """At least one of them. A limit that is left out or null is none."""

    monthly_gpu_hours: Limit | None = None
    monthly_amount: Limit | None = None

    @model_validator(mode="after")
    def _something(self) -> Self:
        if self.monthly_gpu_hours is None and self.monthly_amount is None:
            raise ValueError("give 'monthly_gpu_hours' or 'monthly_amount'; DELETE takes a budget away")
        return self


class MeasureOut(Out):
    """By one of the two limits: GPU-hours, or the price list's unit of money."""

    limit: float | None
    """Null: no limit."""
    used: float
    """Charged this month, what runs now included."""
    held: float
    """What unfinished jobs are still expected to use."""
    left: float | None
    """Of the limit, neither used nor held: what a new job may hold."""


class AlertOut(Out):
    """Told once a month."""

    threshold: int
    """Per cent of the limit."""
    kind: Literal["gpu_hours", "amount"]
    used: float
    limit: float
    at: int


class BudgetOut(Out):
    object: Literal["tunery.budget"] = "tunery.budget"
    project_id: str
    month: str
    turns_at: str
    """First day of the next month (UTC)."""
    gpu_hours: MeasureOut
    amount: MeasureOut
    holding_jobs: int
    blocked: str | None
    """Why none of the project's jobs starts; null while they do."""
    alerts: list[AlertOut]


def budget_out(project_id: uuid.UUID, now: Standing) -> BudgetOut:
    return BudgetOut(
        project_id=ids.encode(ids.PROJECT, project_id),
        month=now.month.strftime("%Y-%m"),
        turns_at=_turns(now.month),
        gpu_hours=_measure("gpu_hours", now.limits, now.used, now.held, now.left),
        amount=_measure("money", now.limits, now.used, now.held, now.left),
        holding_jobs=now.holding_jobs,
        blocked=now.blocked,
        alerts=[
            AlertOut(
                threshold=alert.threshold,
                kind="gpu_hours" if alert.kind == "gpu_hours" else "amount",
                used=float(alert.used),
                limit=float(alert.budget),
                at=unix(alert.created_at),
            )
            for alert in now.alerts
        ],
    )


def _turns(month: date) -> str:
    return ledger.after(month).isoformat()


def _measure(name: str, limits: Limits, used: Amounts, held: Amounts, left: Limits) -> MeasureOut:
    rest = getattr(left, name)
    return MeasureOut(
        limit=getattr(limits, name),
        used=round(getattr(used, name), 4),
        held=round(getattr(held, name), 4),
        left=None if rest is None else round(rest, 4),
    )
