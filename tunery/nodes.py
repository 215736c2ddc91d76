"""A node's own rows: itself, its devices, its slots, the attempts assigned to it."""

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import case, cast, func, select, update
from sqlalchemy.dialects.postgresql import JSONB, insert
from sqlalchemy.orm import Session

from tunery import gpu_classes, wake
from tunery.models import Allocation, Attempt, Engine, Gpu, Node, Slot
from tunery.states import LIVE_ATTEMPT, AttemptState


@dataclass(frozen=True)
class Device:
    """One device as the node found it. Memory in bytes; `usable` leaves room for the driver and for others."""

    uuid: str
    index: int
    kind: str
    name: str
    total_bytes: int
    usable_bytes: int


@dataclass(frozen=True)
class Assigned:
    attempt_id: uuid.UUID
    state: AttemptState
    claimed_by: str | None


def register(
    session: Session,
    node_id: uuid.UUID,
    *,
    name: str,
    boot_id: uuid.UUID,
    devices: Sequence[Device],
    slots: int,
    task_slots: int,
    version: str,
    info: dict[str, Any],
    labels: Mapping[str, str] | None = None,
) -> None:
    """Write down what this node is, at every start of its process. A device that is gone becomes `absent`.

    `labels` are the node's own; those that an operator gave it stay, and win.
    """
    own = dict(labels or {})
    node = {"name": name, "boot_id": boot_id, "task_slots": task_slots, "version": version}
    node |= {"info": info | {"labels": own}, "labels": own}
    fresh = insert(Node).values(id=node_id, state="up", **node)
    # a cordoned node stays cordoned through a restart; only one that went down comes up
    state = case((Node.state == "down", "up"), else_=Node.state)
    both = func.jsonb_strip_nulls(cast(own, JSONB).op("||")(Node.operator_labels))
    renewed = node | {"last_seen_at": func.now(), "state": state, "labels": both}
    session.execute(fresh.on_conflict_do_update(index_elements=["id"], set_=renewed))
    for name in sorted({gpu_classes.class_of(one.kind, one.name, one.total_bytes) for one in devices}):
        gpu_classes.known(session, name)
    known = {gpu.uuid: gpu for gpu in session.scalars(select(Gpu).where(Gpu.node_id == node_id).with_for_update())}
    for device in devices:
        gpu = known.pop(device.uuid, None)
        if gpu is None:
            session.add(gpu := Gpu(node_id=node_id, uuid=device.uuid))
        gpu.index, gpu.kind, gpu.name = device.index, device.kind, device.name
        gpu.total_bytes = device.total_bytes
        gpu.gpu_class = gpu_classes.class_of(device.kind, device.name, device.total_bytes)
        # what is reserved now stays within bounds even if less memory is free than at the last start
        gpu.usable_bytes = max(device.usable_bytes, gpu.reserved_bytes or 0)
        gpu.state = "healthy"
    for gone in known.values():
        gone.state = "absent"
    have = set(session.scalars(select(Slot.no).where(Slot.node_id == node_id)))
    session.add_all(Slot(node_id=node_id, no=no) for no in range(slots) if no not in have)
    wake.scheduler(session)


def heartbeat(session: Session, node_id: uuid.UUID, boot_id: uuid.UUID, said: Mapping[str, Any] | None = None) -> bool:
    """Say that this node lives, and what has changed in its `info`; `disk_full` there keeps new work away.

    False: another process has registered under this node's id.
    """
    mine = (Node.id == node_id, Node.boot_id == boot_id)
    news: dict[str, Any] = {"last_seen_at": func.now()}
    if said:
        news["info"] = Node.info.op("||")(cast(said, JSONB))
    found = session.execute(update(Node).where(*mine).values(news).returning(Node.id))
    return found.first() is not None


def go_down(session: Session, node_id: uuid.UUID) -> None:
    """This node stops: nothing more is assigned to it."""
    session.execute(update(Node).where(Node.id == node_id, Node.state == "up").values(state="down"))


def assigned(session: Session, node_id: uuid.UUID) -> list[Assigned]:
    """Attempts that this node should start or is running."""
    query = select(Attempt.id, Attempt.state, Attempt.claimed_by).where(
        Attempt.node_id == node_id, Attempt.state.in_(LIVE_ATTEMPT)
    )
    return [
        Assigned(row.id, AttemptState(row.state), row.claimed_by) for row in session.execute(query.order_by(Attempt.id))
    ]


def unreleased(session: Session, node_id: uuid.UUID) -> list[uuid.UUID]:
    """Ended attempts that still hold this node's devices: nobody has seen their trainers die yet."""
    query = (
        select(Attempt.id)
        .join(Allocation, Allocation.owner_attempt == Attempt.id)
        .where(Attempt.node_id == node_id, Attempt.state.not_in(LIVE_ATTEMPT), Allocation.released_at.is_(None))
    )
    return list(session.scalars(query.distinct()))


def devices_of(session: Session, attempt_id: uuid.UUID) -> list[Gpu]:
    """The devices an attempt was given, by index."""
    query = select(Gpu).join(Allocation, Allocation.gpu_id == Gpu.id).where(Allocation.owner_attempt == attempt_id)
    return list(session.scalars(query.order_by(Gpu.index)))


def engine_socket(session: Session, engine_id: uuid.UUID) -> str | None:
    """Where an engine of this node takes attempts; None if it is not up."""
    return session.scalar(select(Engine.socket).where(Engine.id == engine_id, Engine.state == "up"))


# ---- GPUs that are not clean ------------------------------------------------------------------------------------


def neighbours(session: Session, attempt_id: uuid.UUID) -> list[uuid.UUID]:
    """Other attempts that hold a share of this one's devices."""
    mine = select(Allocation.gpu_id).where(Allocation.owner_attempt == attempt_id)
    others = select(Allocation.owner_attempt).where(
        Allocation.gpu_id.in_(mine),
        Allocation.released_at.is_(None),
        Allocation.owner_attempt.is_not(None),
        Allocation.owner_attempt != attempt_id,
    )
    return [one for one in session.scalars(others.distinct()) if one is not None]


def mark_dirty(session: Session, node_id: uuid.UUID, reasons: Mapping[str, str]) -> None:
    """These devices, by the driver's UUID, get no work until `mark_clean`. Why stands in the node's `info`."""
    for device, reason in reasons.items():
        _mark(session, node_id, device, "healthy", "dirty")
        _note(session, node_id, device, reason)


def mark_clean(session: Session, node_id: uuid.UUID, device: str) -> None:
    _mark(session, node_id, device, "dirty", "healthy")
    _note(session, node_id, device, None)


def dirty(session: Session, node_id: uuid.UUID) -> list[tuple[str, str]]:
    """Kind and UUID of this node's devices to look at again: those that nobody holds any more."""
    query = select(Gpu.kind, Gpu.uuid).where(Gpu.node_id == node_id, Gpu.state == "dirty", Gpu.reserved_bytes == 0)
    return [(row.kind, row.uuid) for row in session.execute(query)]


def gpus(session: Session, node_id: uuid.UUID) -> dict[str, str]:
    """State of each GPU that this node has, by the driver's UUID."""
    mine = (Gpu.node_id == node_id, Gpu.kind == "cuda", Gpu.state != "absent")
    return {row.uuid: row.state for row in session.execute(select(Gpu.uuid, Gpu.state).where(*mine))}


def mark_unhealthy(session: Session, node_id: uuid.UUID, device: str, reason: str) -> list[uuid.UUID]:
    """This GPU is broken: no more work, whatever it was before. Returns the attempts that hold some of it."""
    mine = (Gpu.node_id == node_id, Gpu.uuid == device)
    session.execute(update(Gpu).where(*mine).values(state="unhealthy"))
    _note(session, node_id, device, reason)
    query = select(Allocation.owner_attempt).join(Gpu, Gpu.id == Allocation.gpu_id)
    held = session.scalars(query.where(*mine, Allocation.released_at.is_(None)).distinct())
    return [attempt_id for attempt_id in held if attempt_id is not None]


def mark_healthy(session: Session, node_id: uuid.UUID, device: str) -> None:
    """It answers again; whether anybody is on it is looked at before anything starts there."""
    _mark(session, node_id, device, "unhealthy", "healthy")
    _note(session, node_id, device, None)


def _mark(session: Session, node_id: uuid.UUID, device: str, before: str, after: str) -> None:
    mine = (Gpu.node_id == node_id, Gpu.uuid == device, Gpu.state == before)
    session.execute(update(Gpu).where(*mine).values(state=after))


def _note(session: Session, node_id: uuid.UUID, device: str, reason: str | None) -> None:
    node = session.get_one(Node, node_id, with_for_update=True, populate_existing=True)
    known = {name: why for name, why in node.info.get("dirty", {}).items() if name != device}
    node.info = node.info | {"dirty": known | ({device: reason} if reason else {})}
