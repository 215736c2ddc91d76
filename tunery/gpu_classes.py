"""Kinds of GPU: what a device is called, what a second on it costs in fair share, and its price."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import func, select, text
from sqlalchemy.orm import Session

from tunery import audit, wake
from tunery.audit import Actor
from tunery.errors import Invalid, NotFound
from tunery.models import Gpu, GpuClass, Node

GIB = 1 << 30
NAME = re.compile(r"[a-z0-9][a-z0-9.-]{0,62}")
_NOISE = re.compile(
    r"nvidia|geforce|tesla|quadro|graphics|gpu|device|generation|edition|server|workstation|sxm\d?|pcie?|nvl|hbm\d?e?"
)
"""Words that tell makers, form factors and memory kinds, not what a GPU can do."""
_MEMORY = re.compile(r"\d+(gb|g|gib)")
_SOLD_GIB = (
    1,
    2,
    3,
    4,
    5,
    6,
    8,
    10,
    11,
    12,
    16,
    20,
    24,
    32,
    36,
    40,
    48,
    64,
    72,
    80,
    94,
    96,
    120,
    128,
    141,
    144,
    180,
    186,
    192,
)
"""Sizes that GPUs and their MIG slices are sold with. The driver shows a little less: error correction takes 6 %."""


def class_of(kind: str, name: str, total_bytes: int) -> str:
    """`h100-80gb` of NVML's name and memory; `cpu` of a host without a GPU.

    Form factors are not told apart: label nodes where they matter.
    """
    if kind == "cpu":
        return "cpu"
    words = re.findall(r"[a-z0-9.]+", name.lower())
    mig = "mig" in words
    if mig:  # `... MIG 1g.10gb`: the slice's memory is in `total_bytes`
        words = words[: words.index("mig")]
    model = "".join(word for word in words if not _NOISE.fullmatch(word) and not _MEMORY.fullmatch(word))
    return "-".join([*filter(None, [model or "gpu", "mig" if mig else ""]), f"{_sold_gib(total_bytes)}gb"])


def _sold_gib(total_bytes: int) -> int:
    seen = total_bytes / GIB
    return next((size for size in _SOLD_GIB if seen - 0.25 <= size <= seen * 1.1 + 0.5), round(seen))


@dataclass(frozen=True)
class ClassView:
    """A class with the devices of it that there are, whatever their state."""

    gpu_class: GpuClass
    devices: int


def known(session: Session, name: str) -> None:
    """Called by nodes for each class they bring. One that an operator has priced keeps its price."""
    # Core would also insert the defaults, and a node may write the name alone
    session.execute(text("INSERT INTO gpu_classes (name) VALUES (:name) ON CONFLICT DO NOTHING"), {"name": name})


def listing(session: Session) -> list[ClassView]:
    """By name."""
    counted = (
        select(Gpu.gpu_class, func.count().label("devices"))
        .join(Node, Node.id == Gpu.node_id)
        .where(Node.removed_at.is_(None), Gpu.state != "absent")
        .group_by(Gpu.gpu_class)
        .subquery()
    )
    query = select(GpuClass, counted.c.devices).outerjoin(counted, counted.c.gpu_class == GpuClass.name)
    return [ClassView(row.GpuClass, row.devices or 0) for row in session.execute(query.order_by(GpuClass.name))]


def get(session: Session, name: str) -> ClassView:
    """Raises NotFound."""
    found = next((one for one in listing(session) if one.gpu_class.name == name), None)
    if found is None:
        fix = "`tunery gpus classes` lists them; nodes bring them along."
        raise NotFound(f"No such GPU class: '{name[:80]}'", param="gpu_class", fix=fix)
    return found


def put(session: Session, actor: Actor, name: str, changes: Mapping[str, Any]) -> ClassView:
    """Say what a class costs (`cost`, `price_per_hour`; others stay), also before the first node brings one.

    What has been used keeps the price it had.

    Raises:
        Invalid: not a name that a class can have.
    """
    if not NAME.fullmatch(name):
        fix = "Use small letters, digits, '.' and '-': h100-80gb."
        raise Invalid(f"'{name[:80]}' is no GPU class.", param="gpu_class", fix=fix)
    known(session, name)
    found = session.get_one(GpuClass, name, with_for_update=True)
    before = _told(found)
    for field, value in changes.items():
        setattr(found, field, value)
    if (after := _told(found)) != before:
        audit.record(session, actor, "gpu_class.set", name, before=before, after=after)
        wake.scheduler(session)
    session.flush()
    return get(session, name)


def _told(one: GpuClass) -> dict[str, object]:
    price = one.price_per_hour
    return {"cost": one.cost, "price_per_hour": None if price is None else f"{price.normalize():f}"}
