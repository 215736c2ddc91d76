"""The look at a used-up budget: each one is written down, and what comes too late is not."""

import contextlib
import itertools
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from sqlalchemy import text
from sqlalchemy.orm import Session

from tests import factories
from tests.chaos.evidence import Blocked
from tests.chaos.treasury import Treasury
from tests.factories import Database, Tenant


class Fleet:
    """Looks as the owner, and tells when the first look of each budget is over."""

    def __init__(self, database: Database) -> None:
        self._database, self.looked = database, threading.Semaphore(0)

    @contextlib.contextmanager
    def look(self) -> Iterator[Session]:
        with factories.owner(self._database) as session:
            yield session
        self.looked.release()


def test_every_used_up_budget_is_written_down(database: Database, project: Tenant) -> None:
    """The operator's orders change nothing here: the project is blocked all the time."""
    with factories.owner(database) as session:
        session.execute(text("UPDATE projects SET blocked = 'a test' WHERE id = :id"), {"id": project.project_id})
        session.commit()
    fleet, blocked = Fleet(database), list[Blocked]()
    operator: Any = SimpleNamespace(order=lambda *_, **__: {"gpu_hours": {"used": 0.0}})
    deployment: Any = SimpleNamespace(fleet=fleet, blocked=blocked, projects=[project.project_id])
    treasury = Treasury(deployment, operator, seed=1)
    for _ in range(12):
        assert treasury.run_out() == project.project_id
        assert fleet.looked.acquire(timeout=60)  # it saw that the project is blocked
        treasury.lift(project.project_id)
        assert fleet.looked.acquire(timeout=60)  # it read what the jobs say
    assert len(blocked) == 12
    assert all(before.until <= after.since for before, after in itertools.pairwise(blocked))
