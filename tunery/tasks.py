"""CPU work on nodes: leased and fenced like an attempt, tried again when a node falls silent."""

import uuid
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from tunery import outbox
from tunery.models import Node, Task
from tunery.models.fleet import fence_seq

CHECK_DATA = "check_data"
IMPORT_BASE = "import_base"
MAX_TRIES = 5


class TaskFenced(Exception):
    """The task is no longer this caller's."""


@dataclass(frozen=True)
class Lease:
    id: uuid.UUID
    kind: str
    project_id: uuid.UUID
    job_id: uuid.UUID | None
    base_model_id: uuid.UUID | None
    payload: dict[str, Any]
    fence: int
    tries: int


def enqueue(
    session: Session,
    kind: str,
    project_id: uuid.UUID,
    *,
    job_id: uuid.UUID | None = None,
    base_model_id: uuid.UUID | None = None,
    payload: dict[str, Any] | None = None,
) -> uuid.UUID:
    """Add a task to this transaction and a message that tells nodes of it."""
    task = Task(kind=kind, project_id=project_id, job_id=job_id, base_model_id=base_model_id, payload=payload or {})
    session.add(task)
    session.flush()
    outbox.send(session, outbox.RING_TASK, project_id, {"task_id": str(task.id)})
    return task.id


def claim(session: Session, node_id: uuid.UUID, lease_s: float) -> Lease | None:
    """Take the oldest task that waits, or None. A node that is to be empty takes none."""
    draining = select(Node.id).where(Node.id == node_id, Node.state == "draining").exists()
    ready = (Task.state == "queued", Task.not_before <= func.now(), ~draining)
    waiting = select(Task).where(*ready).order_by(Task.id).limit(1)
    task = session.scalar(waiting.with_for_update(skip_locked=True))
    if task is None:
        return None
    task.fence = session.scalar(select(fence_seq.next_value())) or 0
    task.state, task.node_id, task.tries = "leased", node_id, task.tries + 1
    task.lease_expires_at = func.now() + timedelta(seconds=lease_s)
    return Lease(
        task.id, task.kind, task.project_id, task.job_id, task.base_model_id, task.payload, task.fence, task.tries
    )


def hold(session: Session, lease: Lease) -> Task:
    """Lock a task that this caller still holds. Raises TaskFenced."""
    mine = (Task.id == lease.id, Task.fence == lease.fence, Task.state == "leased")
    task = session.scalar(select(Task).where(*mine).with_for_update().execution_options(populate_existing=True))
    if task is None:
        raise TaskFenced
    return task


def renew(session: Session, lease: Lease, lease_s: float) -> None:
    hold(session, lease).lease_expires_at = func.now() + timedelta(seconds=lease_s)


def finish(task: Task) -> None:
    _end(task, "succeeded")


def fail(task: Task, error: str, *, retry: bool) -> bool:
    """End a try; `retry` puts the task back for later, until its tries are used up. True if it is over."""
    task.error = error[:4000]
    if retry and task.tries < MAX_TRIES:
        task.state, task.lease_expires_at = "queued", None
        task.not_before = func.now() + timedelta(seconds=min(60, 2**task.tries))
        return False
    _end(task, "failed")
    return True


def postpone(task: Task, error: str, for_s: float) -> None:
    """A server was away: nobody's fault, so it uses up no try, however long that lasts."""
    task.error = error[:4000]
    task.tries -= 1
    task.state, task.lease_expires_at = "queued", None
    task.not_before = func.now() + timedelta(seconds=for_s)


def expired(session: Session, grace_s: float) -> list[tuple[uuid.UUID, uuid.UUID | None]]:
    """Leased tasks whose node fell silent, and their jobs. Not locked: a job is locked before its task."""
    late = Task.lease_expires_at < func.now() - timedelta(seconds=grace_s)
    return list(session.execute(select(Task.id, Task.job_id).where(Task.state == "leased", late)).tuples())


def lock_expired(session: Session, task_id: uuid.UUID, grace_s: float) -> Task | None:
    """The task, locked, if its lease is still over."""
    late = Task.lease_expires_at < func.now() - timedelta(seconds=grace_s)
    return session.scalar(select(Task).where(Task.id == task_id, Task.state == "leased", late).with_for_update())


def give_back(session: Session, node_id: uuid.UUID) -> None:
    """A node that stops, or starts anew, runs none of the tasks it had: others may take them at once."""
    # one that has used up its tries keeps its lease: the sweep ends it, and its job with it
    mine = (Task.node_id == node_id, Task.state == "leased", Task.tries < MAX_TRIES)
    session.execute(update(Task).where(*mine).values(state="queued", lease_expires_at=None))


def give_all_back(session: Session) -> None:
    """Nobody runs any of them: after a restore."""
    session.execute(update(Task).where(Task.state == "leased").values(state="queued", lease_expires_at=None))


def _end(task: Task, state: str) -> None:
    task.state, task.lease_expires_at, task.finished_at = state, None, func.now()
