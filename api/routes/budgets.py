"""Budgets: a project sees its own; whoever operates the deployment sets them."""

from decimal import Decimal

from fastapi import APIRouter, Depends

from api.deps import Scope, SessionDep, Tenant, TenantDep
from api.documentation import problems
from api.schemas.budgets import BudgetIn, BudgetOut, budget_out
from tunery import budgets, shares
from tunery.shares import Known

router = APIRouter(prefix="/v1", tags=["Usage"])
ADMIN = [Depends(Scope("admin"))]


@router.get("/budget", dependencies=[Depends(Scope("jobs:read"))])
def own_budget(tenant: TenantDep, session: SessionDep) -> BudgetOut:
    """This month: the budget, what is used, held and left, and what was told."""
    return budget_out(tenant.project_id, budgets.standing(session, tenant.project_id))


@router.get("/projects/{project}/budget", dependencies=ADMIN, responses=problems(404, 409))
def project_budget(project: str, tenant: TenantDep) -> BudgetOut:
    """The same of any project, by id, name or `organization:name`."""
    known = _find(tenant, project)
    with tenant.of(known.id).transaction() as session:
        return budget_out(known.id, budgets.standing(session, known.id))


@router.put("/projects/{project}/budget", dependencies=ADMIN, responses=problems(400, 404, 409))
def set_project_budget(project: str, body: BudgetIn, tenant: TenantDep) -> BudgetOut:
    """Set a project's monthly budget. One that had been used up starts its jobs again within seconds, if it now may."""
    return _put(tenant, project, body.monthly_gpu_hours, body.monthly_amount)


@router.delete("/projects/{project}/budget", dependencies=ADMIN, responses=problems(404, 409))
def delete_project_budget(project: str, tenant: TenantDep) -> BudgetOut:
    """Take a project's budget away: it may use what it gets."""
    return _put(tenant, project, None, None)


def _put(tenant: Tenant, project: str, gpu_hours: Decimal | None, amount: Decimal | None) -> BudgetOut:
    known = _find(tenant, project)
    with tenant.of(known.id).transaction() as session:
        budgets.put(session, tenant.actor, known, gpu_hours, amount)
        return budget_out(known.id, budgets.standing(session, known.id))


def _find(tenant: Tenant, project: str) -> Known:
    with tenant.transaction() as session:
        return shares.find(session, project)
