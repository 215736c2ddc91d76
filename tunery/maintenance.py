"""Taking nodes out of service and bringing them back, and what they are labelled with.

The api says what is wanted, in `nodes.state`; the leading scheduler makes it so, and goes on until it is.
"""

import uuid
from collections.abc import Mapping

from sqlalchemy import select
from sqlalchemy.orm import Session

from tunery import audit, labels, wake
from tunery.audit import Actor
from tunery.errors import Conflict, Invalid
from tunery.models import Attempt, Node
from tunery.states import AttemptState

_BY_STATE = {"cordoned": "node.cordon", "draining": "node.drain", "up": "node.uncordon"}
_TO_END = (AttemptState.ASSIGNED, AttemptState.CLAIMED, AttemptState.RUNNING)
"""One that is stopping or publishing is on its way out as it is."""


def cordon(session: Session, actor: Actor, node_id: uuid.UUID) -> None:
    """Nothing more is assigned to this node; what runs there goes on. Of a node that was draining: no more is asked."""
    _become(session, actor, node_id, "cordoned")


def drain(session: Session, actor: Actor, node_id: uuid.UUID) -> None:
    """As `cordon`, and whatever runs there is asked to checkpoint and goes on elsewhere."""
    _become(session, actor, node_id, "draining")


def uncordon(session: Session, actor: Actor, node_id: uuid.UUID) -> None:
    """The node takes work again, as soon as it says that it lives."""
    _become(session, actor, node_id, "up")


def _become(session: Session, actor: Actor, node_id: uuid.UUID, state: str) -> None:
    node = _lock(session, node_id)
    if node.state == state or (state == "up" and node.state == "down"):
        return  # a node that is down comes up by itself
    audit.record(session, actor, _BY_STATE[state], node.name, before={"state": node.state}, after={"state": state})
    node.state = state
    wake.scheduler(session)


def relabel(session: Session, actor: Actor, node_id: uuid.UUID, changes: Mapping[str, str | None]) -> None:
    """Set the operator's labels; None takes a label away, the node's own included.

    Raises:
        Invalid: a name or a value that is none, or too many.
    """
    node = _lock(session, node_id)
    own = node.info.get("labels") or {}
    try:
        for key, value in changes.items():
            labels.check(key, value)
    except ValueError as wrong:
        raise Invalid(str(wrong), param="labels", fix='Send {"labels": {"rack": "b", "old": null}}.') from wrong
    kept = {**node.operator_labels, **changes}
    # what takes away a label that the node does not have says nothing
    kept = {key: value for key, value in kept.items() if value is not None or key in own}
    merged = labels.merge(own, kept)
    if len(merged) > labels.MOST:
        raise Invalid(f"A node has at most {labels.MOST} labels; these are {len(merged)}.", param="labels")
    if merged == node.labels and kept == node.operator_labels:
        return
    audit.record(session, actor, "node.label", node.name, before={"labels": node.labels}, after={"labels": merged})
    node.labels, node.operator_labels = merged, kept
    wake.scheduler(session)


def to_end(session: Session) -> list[uuid.UUID]:
    """Attempts on draining nodes that nobody has asked to stop yet."""
    query = (
        select(Attempt.id)
        .join(Node, Node.id == Attempt.node_id)
        .where(Node.state == "draining", Attempt.state.in_(_TO_END), Attempt.stop_reason.is_(None))
    )
    return list(session.scalars(query.order_by(Attempt.id)))


def _lock(session: Session, node_id: uuid.UUID) -> Node:
    locked = {"with_for_update": {"key_share": True}, "populate_existing": True}
    node = session.get_one(Node, node_id, **locked)  # type: ignore[arg-type]
    if node.removed_at is not None:
        raise Conflict(f"Node '{node.name}' has been removed.", param="node", fix="`tunery nodes` lists what is left.")
    return node
