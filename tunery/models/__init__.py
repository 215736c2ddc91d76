"""The tables. Only services (`tunery.jobs`, `tunery.queue`, ...) may import them."""

from tunery.models.fleet import (
    Allocation,
    Attempt,
    AttemptNode,
    Engine,
    Gpu,
    JoinToken,
    Leader,
    Node,
    NodeCredentials,
    Outbox,
    Slot,
    Task,
    Usage,
)
from tunery.models.registry import Adapter, AdapterVersion, BaseModel, Checkpoint, Event, MetricChunk, MetricSeries
from tunery.models.tenancy import ApiKey, Dataset, File, Job, Member, Organization, Project

__all__ = [
    "Adapter",
    "AdapterVersion",
    "Allocation",
    "ApiKey",
    "Attempt",
    "AttemptNode",
    "BaseModel",
    "Checkpoint",
    "Dataset",
    "Engine",
    "Event",
    "File",
    "Gpu",
    "Job",
    "JoinToken",
    "Leader",
    "Member",
    "MetricChunk",
    "MetricSeries",
    "Node",
    "NodeCredentials",
    "Organization",
    "Outbox",
    "Project",
    "Slot",
    "Task",
    "Usage",
]
