"""The queue in numbers: what waits, runs and has ended, and which GPUs are free. By GPU class, and in all."""

from collections import Counter, defaultdict
from dataclasses import dataclass, field

from sqlalchemy import text
from sqlalchemy.orm import Session

from tunery import gpus
from tunery.gpus import Room


@dataclass(frozen=True)
class Counts:
    """Jobs. Of a class: `queued` are those that may run there, so one that takes any class waits in each."""

    queued: int = 0
    running: int = 0
    """They hold GPUs."""
    completed: int = 0
    """They succeeded within the last 24 hours."""


@dataclass(frozen=True)
class Pool:
    """One GPU class, or all together."""

    everybody: Counts
    own: Counts
    """Of the calling project."""
    room: Room = field(default_factory=lambda: Room(0, 0))


@dataclass(frozen=True)
class Queue:
    total: Pool
    pools: dict[str, Pool]
    """By class."""


def counts(session: Session) -> Queue:
    """Of the whole deployment; the rows of other projects are counted by the database and never seen here."""
    told: dict[tuple[str, str], Counter[str | None]] = defaultdict(Counter)
    for row in session.execute(text("SELECT * FROM queue_counts()")):
        told["everybody", row.what][row.gpu_class] += row.everybody
        told["own", row.what][row.gpu_class] += row.own
    room = gpus.room(session)
    classes = {name for one in told.values() for name in one if name is not None} | room.keys()
    total = Room(sum(one.total for one in room.values()), sum(one.available for one in room.values()))
    return Queue(
        Pool(_counts(told, "everybody", None), _counts(told, "own", None), total),
        {
            name: Pool(_counts(told, "everybody", name), _counts(told, "own", name), room.get(name, Room(0, 0)))
            for name in sorted(classes)
        },
    )


def _counts(told: dict[tuple[str, str], Counter[str | None]], whose: str, gpu_class: str | None) -> Counts:
    # a job that has been assigned is still `queued` until its node claims it
    waiting, assigned = told[whose, "waiting"], told[whose, "assigned"]
    still = waiting - assigned
    queued = still.total() if gpu_class is None else still[gpu_class] + still[None]
    return Counts(queued, told[whose, "running"][gpu_class], told[whose, "completed"][gpu_class])
