"""Column kinds that every table shares, and the constraints that keep a row inside its project."""

import uuid
from collections.abc import Iterable
from datetime import datetime
from typing import Annotated, Any

from sqlalchemy import CheckConstraint, DateTime, ForeignKeyConstraint, UniqueConstraint, func
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import mapped_column

from tunery.ids import uuid7

Id = Annotated[uuid.UUID, mapped_column(primary_key=True, default=uuid7)]
Moment = Annotated[datetime, mapped_column(DateTime(timezone=True))]
Created = Annotated[datetime, mapped_column(DateTime(timezone=True), server_default=func.now())]
Json = Annotated[dict[str, Any], mapped_column(JSONB)]


def one_of(column: str, values: Iterable[str]) -> CheckConstraint:
    """The database refuses a word that the code does not know."""
    words = ", ".join(f"'{value}'" for value in sorted(values))
    return CheckConstraint(f"{column} IN ({words})", name=f"{column}_known")


def project_key() -> UniqueConstraint:
    """What composite foreign keys point at."""
    return UniqueConstraint("project_id", "id")


def same_project(column: str, table: str, *, use_alter: bool = False) -> ForeignKeyConstraint:
    """A foreign key that cannot cross projects: row-level security does not filter plain ones.

    `use_alter` adds it after both tables exist, for two tables that point at each other.
    """
    return ForeignKeyConstraint(["project_id", column], [f"{table}.project_id", f"{table}.id"], use_alter=use_alter)
