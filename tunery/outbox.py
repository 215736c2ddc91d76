"""Messages that leave after commit. Only hints travel: whoever receives one asks Postgres what is true."""

import uuid
from datetime import timedelta
from typing import Any

from sqlalchemy import delete, func, select, update
from sqlalchemy.orm import Session

from tunery import wake
from tunery.models import Outbox

RING_NODE = "ring_node"
"""{"node_id", "attempt_id", "traceparent"}: an attempt was assigned to this node, or it should look at one it has."""
RING_TASK = "ring_task"
"""{"task_id"}: some node should look for tasks."""
JOB_ENDED = "job_ended"
"""{"job_id", "state"}: told once on the Redis channel `training:done:<job id>`, and to webhooks."""

BUDGET_ALERT = "budget_alert"
"""{"project_id", "month", "threshold", "kind", "used", "budget"}: a project has used so many per cent of its budget.
Told once on the Redis channel `budget:alert:<project id>`, and to webhooks."""


def send(session: Session, topic: str, project_id: uuid.UUID, payload: dict[str, Any]) -> None:
    """Add a message to this transaction."""
    session.add(Outbox(topic=topic, payload=payload, project_id=project_id))
    wake.scheduler(session)


def unsent(session: Session, limit: int = 100) -> list[Outbox]:
    """The oldest messages that wait. Not locked: sending one twice does no harm, and no lock outlives a slow Redis."""
    return list(session.scalars(select(Outbox).where(Outbox.published_at.is_(None)).order_by(Outbox.id).limit(limit)))


def mark_sent(session: Session, ids: list[int]) -> None:
    session.execute(update(Outbox).where(Outbox.id.in_(ids)).values(published_at=func.now()))


def sweep(session: Session, keep: timedelta = timedelta(days=1)) -> None:
    """Forget messages sent long ago."""
    session.execute(delete(Outbox).where(Outbox.published_at < func.now() - keep))
