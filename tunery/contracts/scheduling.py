"""What the scheduling policy sees and what it may decide. Plain values: the policy is a pure function of them."""

import uuid
from dataclasses import dataclass


@dataclass(frozen=True)
class GpuView:
    id: uuid.UUID
    node_id: uuid.UUID
    name: str
    kind: str
    usable_bytes: int
    free_bytes: int


@dataclass(frozen=True)
class NodeView:
    id: uuid.UUID
    name: str
    free_slots: int
    gpus: tuple[GpuView, ...]


@dataclass(frozen=True)
class JobView:
    """A job that waits. `required_bytes` is its estimate for each of its GPUs."""

    id: uuid.UUID
    organization_id: uuid.UUID
    project_id: uuid.UUID
    queued_at: float
    gpus: int
    required_bytes: int


@dataclass(frozen=True)
class Snapshot:
    """Waiting jobs, and the healthy nodes with what is free on them."""

    jobs: tuple[JobView, ...]
    nodes: tuple[NodeView, ...]


@dataclass(frozen=True)
class Start:
    """Run this job on these GPUs of one node; with an engine, inside it."""

    job_id: uuid.UUID
    node_id: uuid.UUID
    gpu_ids: tuple[uuid.UUID, ...]
    bytes_per_gpu: int
    exclusive: bool = True
    engine_id: uuid.UUID | None = None


@dataclass(frozen=True)
class Wait:
    """Why this job does not start now; shown to its owner."""

    job_id: uuid.UUID
    reason: str


Decision = Start | Wait
