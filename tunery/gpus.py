"""The deployment's devices: what each is, where it is, and how much of it is taken. Other projects are counted only."""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

from sqlalchemy import ColumnElement, func, select, text
from sqlalchemy.orm import Session

from tunery.membership import SILENT_AFTER_S
from tunery.models import Gpu, Node


@dataclass(frozen=True)
class GpuState:
    """A device as any key may see it."""

    gpu: Gpu
    node: str
    usable: bool
    """Healthy, on a node that is up, heard and takes work."""
    attempts: int
    """Of all projects."""
    own_jobs: Sequence[uuid.UUID]

    @property
    def state(self) -> str:
        """What a person wants to know first."""
        if self.gpu.state != "healthy":
            return self.gpu.state
        if self.attempts or self.gpu.reserved_bytes:
            return "busy"
        return "free" if self.usable else "unavailable"


def page(session: Session, *, after: uuid.UUID | None, limit: int) -> tuple[list[GpuState], bool]:
    """Devices of nodes that belong, in the order in which they came, and whether there are more."""
    present = (Node.removed_at.is_(None), Gpu.state != "absent")
    query = select(Gpu, Node.name, _takes_work().label("usable")).join(Node, Node.id == Gpu.node_id).where(*present)
    if after is not None:
        query = query.where(Gpu.id > after)
    rows = session.execute(query.order_by(Gpu.id).limit(limit + 1)).all()
    held = {row.gpu_id: row for row in session.execute(text("SELECT * FROM gpu_occupancy()"))}
    found = [
        GpuState(
            row.Gpu,
            row.name,
            row.usable,
            attempts=held[row.Gpu.id].attempts if row.Gpu.id in held else 0,
            own_jobs=held[row.Gpu.id].own_jobs if row.Gpu.id in held else (),
        )
        for row in rows[:limit]
    ]
    return found, len(rows) > limit


@dataclass(frozen=True)
class Room:
    """Devices of one class."""

    total: int
    available: int
    """Healthy, held by nobody, on a node that takes work."""


def room(session: Session) -> dict[str, Room]:
    """By class; what belongs to the deployment, also while its node is away."""
    free = (Gpu.state == "healthy") & (Gpu.reserved_bytes == 0) & _takes_work()
    query = (
        select(Gpu.gpu_class, func.count().label("total"), func.count().filter(free).label("available"))
        .join(Node, Node.id == Gpu.node_id)
        .where(Node.removed_at.is_(None), Gpu.state != "absent")
        .group_by(Gpu.gpu_class)
    )
    return {row.gpu_class: Room(row.total, row.available) for row in session.execute(query)}


def _takes_work() -> ColumnElement[bool]:
    heard = Node.last_seen_at > func.now() - timedelta(seconds=SILENT_AFTER_S)
    return (Node.state == "up") & heard & Node.info["disk_full"].as_boolean().is_not(True)
