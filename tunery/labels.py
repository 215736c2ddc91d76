"""Labels of nodes: `rack=b`, `interconnect=nvlink`. A node says its own; the operator's win over them."""

import re
from collections.abc import Mapping

_KEY = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._/-]{0,61}[A-Za-z0-9])?")
_VALUE = re.compile(r"([A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?)?")
MOST = 64
"""Labels of one node."""


def parse(text: str) -> dict[str, str]:
    """`rack=b,interconnect=nvlink`. Raises ValueError that says what is wrong."""
    found: dict[str, str] = {}
    for part in filter(None, (one.strip() for one in text.split(","))):
        key, equals, value = part.partition("=")
        if not equals:
            raise ValueError(f"{part!r} is no label: write name=value, with commas between")
        check(key.strip(), value.strip())
        found[key.strip()] = value.strip()
    if len(found) > MOST:
        raise ValueError(f"{len(found)} labels; a node has at most {MOST}")
    return found


def check(key: str, value: str | None) -> None:
    """Raises ValueError unless both are short words that Kubernetes would take, too."""
    if not _KEY.fullmatch(key):
        raise ValueError(f"{key!r} is no label's name: up to 63 letters, digits, '.', '_', '-' or '/'")
    if value is not None and not _VALUE.fullmatch(value):
        raise ValueError(f"{value!r} is no label's value: up to 63 letters, digits, '.', '_' or '-'")


def merge(own: Mapping[str, str], operator: Mapping[str, str | None]) -> dict[str, str]:
    """What holds: the operator's value where there is one; None there takes the node's own away."""
    both = {**own, **operator}
    return {key: value for key, value in sorted(both.items()) if value is not None}
