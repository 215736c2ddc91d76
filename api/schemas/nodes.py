"""Nodes, the tokens that admit them, and what an admitted one is told."""

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from api.schemas.common import In, Out, unix
from tunery import ids
from tunery.membership import Admitted, JoinToken, NodeView, Place

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class JoinTokenIn(In):
    expires_in: Annotated[int, Field(ge=60, le=7 * 24 * 3600)] = 3600
    """Seconds."""


class JoinTokenOut(Out):
    id: str
    object: Literal["tunery.join_token"] = "tunery.join_token"
    token: str
    """Shown this once; it admits one node."""
    created_at: int
    expires_at: int


class JoinIn(In):
    name: Annotated[str, Field(min_length=1, max_length=63)]
    version: Annotated[str, Field(max_length=40)]
    """Of the checkout that will run as the node."""
    dry_run: bool = False
    """Check everything and tell the addresses; the token stays good."""

    @field_validator("name")
    @classmethod
    def _speakable(cls, name: str) -> str:
        if not _NAME.fullmatch(name):
            raise ValueError("expected letters, digits, '.', '_' or '-', beginning with a letter or digit")
        return name


class AdmissionOut(Out):
    """`environment` holds the node's own credentials, told this once; empty on a dry run."""

    object: Literal["tunery.node_admission"] = "tunery.node_admission"
    id: str | None
    name: str
    version: str
    addresses: dict[str, str]
    """What the node has to reach: host and port by server."""
    environment: dict[str, str]


class NodeIn(In):
    labels: Annotated[dict[str, str | None], Field(min_length=1, max_length=64)]
    """Those to set; `null` takes one away. Others stay as they are."""


class DeviceOut(Out):
    index: int
    kind: Literal["cuda", "cpu"]
    name: str
    gpu_class: str
    state: str
    total_bytes: int
    usable_bytes: int
    reserved_bytes: int


class NodeOut(Out):
    id: str
    object: Literal["tunery.node"] = "tunery.node"
    name: str
    state: Literal["up", "cordoned", "draining", "drained", "down", "silent"]
    """`silent`: it should be there, and has said nothing for 45 seconds. `drained`: nothing is left on it."""
    labels: dict[str, str]
    """Its own, with an operator's over them; jobs may ask for some."""
    attempts: int
    """That run there, of all projects."""
    tasks: int
    """Data checks and imports that run there."""
    joined: bool
    """It has logins of its own; otherwise it shares the deployment's."""
    version: str
    task_slots: int
    registered_at: int
    last_seen_at: int
    devices: list[DeviceOut]
    info: dict[str, Any]
    """What the node says of its host, such as how its trainers are isolated."""


def join_token_out(token: JoinToken, plain: str) -> JoinTokenOut:
    return JoinTokenOut(
        id=ids.encode(ids.JOIN_TOKEN, token.id),
        token=plain,
        created_at=unix(token.created_at),
        expires_at=unix(token.expires_at),
    )


def admission_out(name: str, version: str, places: list[Place], admitted: Admitted | None) -> AdmissionOut:
    return AdmissionOut(
        id=ids.encode(ids.NODE, admitted.node_id) if admitted else None,
        name=name,
        version=version,
        addresses={place.what: place.address for place in places},
        environment=admitted.environment if admitted else {},
    )


def node_out(view: NodeView) -> NodeOut:
    node = view.node
    devices = [
        DeviceOut(
            index=gpu.index,
            kind=gpu.kind,  # type: ignore[arg-type]
            name=gpu.name,
            gpu_class=gpu.gpu_class,
            state=gpu.state,
            total_bytes=gpu.total_bytes,
            usable_bytes=gpu.usable_bytes,
            reserved_bytes=gpu.reserved_bytes,
        )
        for gpu in view.devices
        if gpu.state != "absent"
    ]
    return NodeOut(
        id=ids.encode(ids.NODE, node.id),
        name=node.name,
        state=view.state,  # type: ignore[arg-type]
        labels=node.labels,
        attempts=view.attempts,
        tasks=view.tasks,
        joined=view.joined,
        version=node.version,
        task_slots=node.task_slots,
        registered_at=unix(node.registered_at),
        last_seen_at=unix(node.last_seen_at),
        devices=devices,
        info=node.info,
    )
