"""GPUs, their classes, the queue in numbers, shares, and the audit log."""

from decimal import Decimal
from typing import Annotated, Any, Literal

from pydantic import Field

from api.schemas.common import In, Out, unix
from tunery import ids
from tunery.audit import AuditEntry
from tunery.gpu_classes import ClassView
from tunery.gpus import GpuState
from tunery.queue_info import Pool, Queue
from tunery.shares import Capacity, Organization, ProjectShare

# ---- GPUs ---------------------------------------------------------------------------------------------------------


class GpuOut(Out):
    id: str
    object: Literal["tunery.gpu"] = "tunery.gpu"
    node: str
    index: int
    kind: Literal["cuda", "cpu"]
    name: str
    gpu_class: str
    state: Literal["free", "busy", "unavailable", "unhealthy", "dirty"]
    """`unavailable`: its node takes no work. `unhealthy`: it is broken. `dirty`: somebody else computes on it."""
    busy: bool
    """Somebody holds some of it."""
    total_bytes: int
    usable_bytes: int
    reserved_bytes: int
    attempts: int
    """That hold some of it, of all projects."""
    jobs: list[str]
    """Those of your project."""


class GpuClassIn(In):
    """What is left out stays as it is."""

    cost: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """What a second on it counts in fair share; an ordinary GPU has 1."""
    price_per_hour: Annotated[Decimal, Field(ge=0, max_digits=12, decimal_places=4)] | None = None
    """In your currency; `null`: none."""


class GpuClassOut(Out):
    id: str
    object: Literal["tunery.gpu_class"] = "tunery.gpu_class"
    cost: float
    price_per_hour: float | None
    devices: int


def gpu_out(one: GpuState) -> GpuOut:
    gpu = one.gpu
    return GpuOut(
        id=ids.encode(ids.GPU, gpu.id),
        node=one.node,
        index=gpu.index,
        kind=gpu.kind,  # type: ignore[arg-type]
        name=gpu.name,
        gpu_class=gpu.gpu_class,
        state=one.state,  # type: ignore[arg-type]
        busy=bool(one.attempts or gpu.reserved_bytes),
        total_bytes=gpu.total_bytes,
        usable_bytes=gpu.usable_bytes,
        reserved_bytes=gpu.reserved_bytes,
        attempts=one.attempts,
        jobs=[ids.encode(ids.JOB, job_id) for job_id in one.own_jobs],
    )


def gpu_class_out(view: ClassView) -> GpuClassOut:
    one = view.gpu_class
    price = None if one.price_per_hour is None else float(one.price_per_hour)
    return GpuClassOut(id=one.name, cost=one.cost, price_per_hour=price, devices=view.devices)


# ---- the queue ------------------------------------------------------------------------------------------------------


class OwnCounts(Out):
    queued: int
    running: int
    completed: int


class PoolOut(Out):
    queued: int
    """Jobs of all projects that wait for a GPU; of a class, those that may run on it."""
    running: int
    """Jobs that hold GPUs."""
    completed: int
    """Jobs that succeeded within the last 24 hours."""
    available_gpus: int
    """Healthy, held by nobody, on a node that takes work."""
    total_gpus: int
    project: OwnCounts
    """The same of your own project."""


class CountsOut(PoolOut):
    object: Literal["queue"] = "queue"
    pools: dict[str, PoolOut]
    """By GPU class. A job that takes any class waits in each of them."""


def counts_out(queue: Queue) -> CountsOut:
    pools = {name: PoolOut(**_pool(pool)) for name, pool in queue.pools.items()}
    return CountsOut(**_pool(queue.total), pools=pools)


def _pool(pool: Pool) -> dict[str, Any]:
    both, own = pool.everybody, pool.own
    return {
        "queued": both.queued,
        "running": both.running,
        "completed": both.completed,
        "available_gpus": pool.room.available,
        "total_gpus": pool.room.total,
        "project": OwnCounts(queued=own.queued, running=own.running, completed=own.completed),
    }


# ---- shares ---------------------------------------------------------------------------------------------------------

_Rate = Annotated[float, Field(ge=0, le=1_000_000)]


class ShareIn(In):
    """What is left out stays as it is. Rates: GPUs times their class's cost."""

    weight: Annotated[float, Field(gt=0, le=1_000_000)] = 1.0
    """Twice the weight gets twice the share, while both have work waiting."""
    guarantee: _Rate = 0.0
    """Served before anybody's share is looked at."""
    cap: _Rate | None = None
    """Never exceeded; `null`: no cap."""


class ProjectIn(ShareIn):
    max_running_jobs: Annotated[int, Field(ge=0, le=1_000_000)] | None = None
    """`null`: no limit."""


class NamedOut(Out):
    id: str
    name: str


class CapacityOut(Out):
    """Rates."""

    total: float
    """Of every device that belongs to the deployment."""
    guaranteed: float
    """To projects, in all. More than `total` where devices have gone since."""


class ProjectOut(Out):
    id: str
    object: Literal["tunery.project"] = "tunery.project"
    name: str
    organization: NamedOut
    status: str
    weight: float
    guarantee: float
    cap: float | None
    max_running_jobs: int | None
    blocked: str | None
    """Why none of its jobs start, such as its budget."""
    cluster: CapacityOut


class OrganizationOut(Out):
    id: str
    object: Literal["tunery.organization"] = "tunery.organization"
    name: str
    weight: float
    guarantee: float
    cap: float | None


class ProjectNameOut(Out):
    id: str
    object: Literal["tunery.project_name"] = "tunery.project_name"
    name: str
    organization: NamedOut
    status: str
    guarantee: float


def project_out(share: ProjectShare, capacity: Capacity) -> ProjectOut:
    project = share.project
    return ProjectOut(
        id=ids.encode(ids.PROJECT, project.id),
        name=project.name,
        organization=NamedOut(id=ids.encode(ids.ORGANIZATION, share.organization.id), name=share.organization.name),
        status=project.status,
        weight=project.weight,
        guarantee=project.guarantee,
        cap=project.cap,
        max_running_jobs=project.max_running_jobs,
        blocked=project.blocked,
        cluster=CapacityOut(total=capacity.total, guaranteed=capacity.guaranteed),
    )


def organization_out(one: Organization) -> OrganizationOut:
    return OrganizationOut(
        id=ids.encode(ids.ORGANIZATION, one.id),
        name=one.name,
        weight=one.weight,
        guarantee=one.guarantee,
        cap=one.cap,
    )


# ---- the audit log --------------------------------------------------------------------------------------------------


class AuditOut(Out):
    id: str
    object: Literal["tunery.audit_entry"] = "tunery.audit_entry"
    created_at: int
    action: str
    """`node.drain`, `project.share`, ..."""
    target: str
    before: dict[str, Any] | None
    after: dict[str, Any] | None
    key: NamedOut
    """Who did it."""
    project_id: str
    """The key's."""
    request_id: str | None


def audit_out(entry: AuditEntry) -> AuditOut:
    return AuditOut(
        id=ids.encode(ids.AUDIT, entry.id),
        created_at=unix(entry.at),
        action=entry.action,
        target=entry.target,
        before=entry.before,
        after=entry.after,
        key=NamedOut(id=ids.encode(ids.KEY, entry.key_id), name=entry.key_name),
        project_id=ids.encode(ids.PROJECT, entry.key_project_id),
        request_id=entry.request_id,
    )
