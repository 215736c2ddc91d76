"""What projects may spend in a month, what their jobs hold of it, and what they were told."""

import uuid
from datetime import date
from decimal import Decimal

from sqlalchemy import CheckConstraint, ForeignKey, Index, Numeric
from sqlalchemy.orm import Mapped, mapped_column

from tunery.db import Base
from tunery.models.columns import Created, one_of, same_project


class Budget(Base):
    """Of one project, for each calendar month (UTC). Both limits None: it had one, and has none now."""

    __tablename__ = "budgets"
    __table_args__ = (
        CheckConstraint(
            "coalesce(monthly_gpu_hours, 0) >= 0 AND coalesce(monthly_amount, 0) >= 0", name="limits_positive"
        ),
    )

    project_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("projects.id"), primary_key=True)
    monthly_gpu_hours: Mapped[Decimal | None] = mapped_column(Numeric(14, 4))
    monthly_amount: Mapped[Decimal | None] = mapped_column(Numeric(14, 4))
    exhausted_month: Mapped[date | None]
    """First day of the month in which it was used up. It stays so until the month turns or the budget is set anew:
    what a stop refunds would otherwise start the same jobs again, to be stopped again."""
    updated_at: Mapped[Created]


class BudgetAlert(Base):
    """A threshold that was passed: told once a month and project."""

    __tablename__ = "budget_alerts"
    __table_args__ = (one_of("kind", ("gpu_hours", "amount")),)

    project_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("projects.id"), primary_key=True)
    month: Mapped[date] = mapped_column(primary_key=True)
    threshold: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    """Per cent."""
    kind: Mapped[str]
    """Which of the two limits."""
    used: Mapped[Decimal] = mapped_column(Numeric(14, 4))
    budget: Mapped[Decimal] = mapped_column(Numeric(14, 4))
    created_at: Mapped[Created]


class UsageTotal(Base):
    """What a project was charged in a month (UTC): the sum of its rows in `usage`, kept by triggers there."""

    __tablename__ = "usage_totals"

    project_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("projects.id"), primary_key=True)
    month: Mapped[date] = mapped_column(primary_key=True)
    charged_s: Mapped[float] = mapped_column(default=0.0, server_default="0")
    amount: Mapped[Decimal] = mapped_column(Numeric(), default=Decimal(), server_default="0")


class UsageHold(Base):
    """What an accepted job is expected to use, attempts all together; gone once the job has ended."""

    __tablename__ = "usage_holds"
    __table_args__ = (
        same_project("job_id", "jobs"),
        CheckConstraint("gpu_seconds >= 0", name="positive"),
        Index("ix_usage_holds_project", "project_id"),
    )

    job_id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    project_id: Mapped[uuid.UUID]
    gpu_seconds: Mapped[float]
    price_per_hour: Mapped[Decimal | None] = mapped_column(Numeric(12, 4))
    """The highest that it may be charged, by the price list of its submission; None: there was none."""
    created_at: Mapped[Created]
