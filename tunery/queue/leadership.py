"""Who decides: a row with an expiry, and an epoch that every decision carries."""

import uuid
from datetime import timedelta

from sqlalchemy import func, select, text, update
from sqlalchemy.orm import Session

from tunery.models import Leader, Node


class Deposed(Exception):
    """Another scheduler leads now; nothing of this transaction may stand."""


def lead(session: Session, holder: str, ttl_s: float) -> int | None:
    """Become or stay the leader. Returns the epoch, or None while another leads.

    A row with an expiry, not an advisory lock: a SIGSTOPped leader keeps its lock, and its late writes would count.
    """
    row = session.scalar(select(Leader).where(Leader.id == 1).with_for_update())
    if row is None:
        # two first schedulers may meet here; the second finds the row on its next try
        inserted = session.execute(
            text(
                "INSERT INTO leader (id, holder, epoch, expires_at, swept_at) "
                "VALUES (1, :holder, 1, now() + make_interval(secs => :ttl), now()) "
                "ON CONFLICT DO NOTHING RETURNING epoch"
            ),
            {"holder": holder, "ttl": ttl_s},
        ).first()
        return inserted.epoch if inserted else None
    mine = row.holder == holder
    if not mine and not session.scalar(select(Leader.expires_at < func.now()).where(Leader.id == 1)):
        return None
    if not mine:
        row.holder, row.epoch = holder, row.epoch + 1
    row.expires_at = func.now() + timedelta(seconds=ttl_s)
    return row.epoch


def resign(session: Session, holder: str) -> None:
    """Let the next scheduler start at once."""
    session.execute(update(Leader).where(Leader.id == 1, Leader.holder == holder).values(expires_at=func.now()))


def epoch_of(session: Session, holder: str) -> int | None:
    """The epoch in which this scheduler leads now; None while it does not."""
    mine = (Leader.id == 1, Leader.holder == holder, Leader.expires_at > func.now())
    return session.scalar(select(Leader.epoch).where(*mine))


def assert_leader(session: Session, epoch: int) -> None:
    """Bind this transaction to our leadership: nobody can take over before it ends. Raises Deposed."""
    query = select(Leader.id).where(Leader.id == 1, Leader.epoch == epoch, Leader.expires_at > func.now())
    if session.scalar(query.with_for_update(read=True)) is None:
        raise Deposed


def live_nodes(session: Session, silent_after_s: float) -> list[uuid.UUID]:
    """Nodes that spoke lately."""
    heard = Node.last_seen_at > func.now() - timedelta(seconds=silent_after_s)
    return list(session.scalars(select(Node.id).where(heard)))
