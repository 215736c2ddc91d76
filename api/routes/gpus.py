"""`/v1/gpus`, `/v1/gpu_classes`: the deployment's devices, and what each kind of them costs."""

from typing import Annotated

from fastapi import APIRouter, Depends

from api import pages
from api.deps import Scope, SessionDep, TenantDep
from api.documentation import problems
from api.schemas.cluster import GpuClassIn, GpuClassOut, GpuOut, gpu_class_out, gpu_out
from api.schemas.common import Page
from tunery import gpu_classes, gpus, ids

router = APIRouter(tags=["GPUs"])
READ, ADMIN = [Depends(Scope("jobs:read"))], [Depends(Scope("admin"))]
MAX_GPUS = 1000


@router.get("/v1/gpus", dependencies=READ, responses=problems(400))
def list_gpus(
    session: SessionDep, after: pages.After = None, limit: Annotated[int, pages.limit_query(MAX_GPUS)] = 0
) -> Page[GpuOut]:
    """Every device, and how much of it is taken. Jobs of other projects are counted, never named."""
    at = pages.cursor(ids.GPU, after, ascending=True)
    rows, more = gpus.page(session, after=at, limit=limit or 100)
    return pages.page(rows, more, gpu_out)


@router.get("/v1/gpu_classes", dependencies=READ)
def list_gpu_classes(session: SessionDep) -> Page[GpuClassOut]:
    """Kinds of GPU by name: what a second on one counts in fair share, and its price."""
    return pages.page(gpu_classes.listing(session), False, gpu_class_out)


@router.get("/v1/gpu_classes/{gpu_class}", dependencies=READ, responses=problems(404))
def retrieve_gpu_class(gpu_class: str, session: SessionDep) -> GpuClassOut:
    """One of them."""
    return gpu_class_out(gpu_classes.get(session, gpu_class))


@router.put("/v1/gpu_classes/{gpu_class}", dependencies=ADMIN, responses=problems(400))
def put_gpu_class(gpu_class: str, body: GpuClassIn, tenant: TenantDep, session: SessionDep) -> GpuClassOut:
    """Set its cost or its price, also before the first node brings one. What has been used keeps its price."""
    return gpu_class_out(gpu_classes.put(session, tenant.actor, gpu_class, body.model_dump(exclude_unset=True)))
