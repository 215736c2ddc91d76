"""An operator who sets a project's monthly budget so low that it runs out, and lifts it again; and what that did.

Everything is asked for through the API. What the history checker is told of it was read off Postgres while it lasted:
the times in which a project was blocked for certain, and what its waiting jobs said at the end of each.
"""

import random
import threading
import uuid
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from sqlalchemy import select, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from tests.chaos.evidence import Blocked, Books
from tests.chaos.workload import Workload
from tests.fleet import Fleet
from tunery import budgets, ids, jobs, waiting
from tunery.db import for_project, transaction
from tunery.models import Job

if TYPE_CHECKING:
    from tests.chaos.deployment import Deployment

SLIVER_H = 0.0005
"""GPU-hours: jobs that run use it up within a second or two."""
_PATIENCE = 1000
_CLOCK = text("SELECT extract(epoch FROM clock_timestamp())")
_SEEN_BLOCKED = text(
    "SELECT extract(epoch FROM clock_timestamp()) FROM projects WHERE id = :id AND blocked IS NOT NULL"
)
_FOR_A_WHILE = (
    "NOT EXISTS (SELECT FROM events e WHERE e.job_id = jobs.id AND e.created_at > now() - interval '3 seconds')"
)
_CHARGED = text(
    "SELECT p.id, coalesce(sum((u.gpu_seconds - u.platform_fault_s) * u.share), 0) AS charged FROM projects p "
    "LEFT JOIN usage u ON u.project_id = p.id AND u.created_at >= date_trunc('month', now()) GROUP BY p.id"
)


class Treasury:
    def __init__(self, deployment: "Deployment", workload: Workload, seed: int) -> None:
        self._fleet, self._blocked = deployment.fleet, deployment.blocked
        self._projects, self._workload, self._random = deployment.projects, workload, random.Random(seed)
        self._low: dict[uuid.UUID, threading.Event] = {}
        """Projects whose budget is low, and what ends the look at each."""
        self.ordered = 0
        """Budgets that somebody took the order to set."""
        self._looks: dict[uuid.UUID, threading.Thread] = {}
        self._sent: set[threading.Event] = set()
        """What was lifted by an order that is on its way: too late to say anything of it."""
        self._lock = threading.Lock()

    def run_out(self) -> uuid.UUID | None:
        """Give one project a budget that is used up, or soon will be. None if nobody took the order."""
        with self._lock:
            free = [id for id in self._projects if id not in self._low]
            if not free:
                return None
            project_id = self._random.choice(free)
            self._low[project_id] = lifted = threading.Event()
        sliver = self._random.choice((0.0, 0.0, SLIVER_H))
        path = f"/projects/{ids.encode(ids.PROJECT, project_id)}/budget"
        limit = 0.0
        if sliver and (now := self._workload.order("GET", path, tries=3)) is not None:
            limit = round(now["gpu_hours"]["used"] + sliver, 4)
        if self._workload.order("PUT", path, json={"monthly_gpu_hours": limit}) is None:
            self.lift(project_id)  # the answer may have been lost on its way
            return None
        self.ordered += 1
        self._looks[project_id] = look = threading.Thread(target=self._look, args=(project_id, lifted), daemon=True)
        look.start()
        return project_id

    def lift(self, project_id: uuid.UUID) -> None:
        """Take the budget away. Again is harmless."""
        with self._lock:
            if (lifted := self._low.get(project_id)) is None or lifted.is_set():
                return
            lifted.set()
        if (look := self._looks.pop(project_id, None)) is not None:
            look.join(20)  # it has to write down what it saw before the order changes that
        with self._lock:
            self._sent.add(lifted)
        # until it takes: nobody else would, and the project would wait for next month
        self._workload.order("DELETE", f"/projects/{ids.encode(ids.PROJECT, project_id)}/budget", tries=_PATIENCE)
        with self._lock:
            self._low.pop(project_id, None)

    def _look(self, project_id: uuid.UUID, lifted: threading.Event) -> None:
        since = None
        while since is None and not lifted.wait(0.05):
            with suppress(SQLAlchemyError), self._fleet.look() as session:
                since = session.scalar(_SEEN_BLOCKED, {"id": project_id})
        lifted.wait()
        if since is None:
            return
        with suppress(SQLAlchemyError):  # then nothing is known of its end
            with self._fleet.look() as session:
                seen = Blocked(project_id, float(since), _now(session), _waiting(session, project_id))
            with self._lock:
                if lifted not in self._sent:
                    self._blocked.append(seen)


def _now(session: Session) -> float:
    return float(session.execute(_CLOCK).scalar_one())


def _waiting(session: Session, project_id: uuid.UUID) -> dict[uuid.UUID, str]:
    """Of those that the scheduler has had time to look at."""
    told = jobs.queue_view(session, project_id)
    query = select(Job).where(Job.project_id == project_id, Job.state == "queued").where(text(_FOR_A_WHILE))
    found = {}
    for job in session.scalars(query):
        reason = waiting.reason_of(told, jobs.view_of(job))
        found[job.id] = reason.code.value if reason else "nothing"
    return found


def books(fleet: Fleet) -> list[Books]:
    """Read as each project's own, and as the owner's sum."""
    with fleet.look() as session:
        charged = {row.id: float(row.charged) for row in session.execute(_CHARGED)}
    found = []
    for project_id, sum_s in charged.items():
        with transaction(partial(for_project, fleet.api, project_id)) as session:
            found.append(Books(project_id, budgets.standing(session, project_id).used.gpu_hours * 3600, sum_s))
    return found
