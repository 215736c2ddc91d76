"""What the deployment's nodes could ever give, whatever runs there now."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Device:
    """Of one of the deployment's nodes, which is only a number here."""

    node: int
    gpu_class: str
    kind: str
    usable_bytes: int
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Ask:
    """Where a job may run: so many GPUs of one node, of this class (None: any), on nodes with all of these labels."""

    gpus: int = 1
    gpu_class: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)


def suitable(devices: Sequence[Device], ask: Ask) -> list[Device]:
    """Of the class and with the labels; whether one node has enough of them is another question."""
    return [
        one for one in devices if ask.gpu_class in (None, one.gpu_class) and ask.labels.items() <= one.labels.items()
    ]


def most_on_a_node(devices: Sequence[Device]) -> int:
    return max((len(own) for own in _by_node(devices).values()), default=0)


def largest_place(devices: Sequence[Device], ask: Ask) -> int | None:
    """Most bytes that each of its GPUs could have on one node; None where no node has so many."""
    nodes = _by_node(suitable(devices, ask)).values()
    return max((sorted(own, reverse=True)[ask.gpus - 1] for own in nodes if len(own) >= ask.gpus), default=None)


def _by_node(devices: Sequence[Device]) -> dict[int, list[int]]:
    nodes: dict[int, list[int]] = defaultdict(list)
    for one in devices:
        nodes[one.node].append(one.usable_bytes)
    return nodes
