"""What admins changed: who, when, what it was and what it became. Written with the change, never altered after."""

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import structlog
from sqlalchemy import select
from sqlalchemy.orm import Session

from tunery import ids
from tunery.models import AuditEntry
from tunery.tenancy import Identity

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Actor:
    """Who is doing it: a key, in one request."""

    identity: Identity
    request_id: str | None = None


def record(
    session: Session,
    actor: Actor,
    action: str,
    target: str,
    *,
    before: Mapping[str, Any] | None = None,
    after: Mapping[str, Any] | None = None,
) -> None:
    """Part of the caller's transaction: a change without its entry cannot be. No secrets belong in it."""
    who = actor.identity
    entry = AuditEntry(
        key_id=who.key_id, key_name=who.key_name, key_project_id=who.project_id, action=action, target=target
    )
    entry.before, entry.after = (dict(part) if part is not None else None for part in (before, after))
    entry.request_id = actor.request_id
    session.add(entry)
    log.info("audited", action=action, target=target, key=ids.encode(ids.KEY, who.key_id))


def page(
    session: Session, *, after: uuid.UUID | None, limit: int, target: str | None = None
) -> tuple[list[AuditEntry], bool]:
    """Newest first, and whether there are more."""
    query = select(AuditEntry).order_by(AuditEntry.id.desc()).limit(limit + 1)
    if after is not None:
        query = query.where(AuditEntry.id < after)
    if target is not None:
        query = query.where(AuditEntry.target == target)
    found = list(session.scalars(query))
    return found[:limit], len(found) > limit
