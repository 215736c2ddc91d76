"""`/v1/fine_tuning/estimate`: what a job would take, before it is submitted."""

from fastapi import APIRouter, Depends

from api.deps import Scope, SessionDep, TenantDep
from api.documentation import problems
from api.schemas.estimates import EstimateIn, EstimateOut, estimate_out, estimate_request_of
from tunery import quotes

router = APIRouter(prefix="/v1/fine_tuning/estimate", tags=["Fine-tuning"], dependencies=[Depends(Scope("jobs:read"))])


@router.post("", responses=problems(400, 404))
def estimate_job(body: EstimateIn, tenant: TenantDep, session: SessionDep) -> EstimateOut:
    """Hours, memory, money and the adapter's size, on each class of GPU that is there. Nothing is kept."""
    return estimate_out(quotes.quote(session, tenant.project_id, estimate_request_of(body)))
