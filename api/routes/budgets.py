"""Budgets: a project sees its own; whoever operates the deployment sets them."""

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Annotated

import structlog
from fastapi import APIRouter, Depends
from sqlalchemy.orm import Session

from api.deps import Scope, SessionDep, Tenant, TenantDep
from api.documentation import problems
from api.schemas.budgets import BudgetIn, BudgetOut, budget_out
from tunery import budgets, db, ids, tenancy

log = structlog.get_logger(__name__)
router = APIRouter(prefix="/v1", tags=["Usage"])
ADMIN = [Depends(Scope("admin"))]


def project_id(project: str, tenant: TenantDep) -> uuid.UUID:
    """From the path: an id, or the name of the key's own project."""
    if project == tenant.identity.project:
        return tenant.project_id
    return ids.decode(ids.PROJECT, project)


ProjectId = Annotated[uuid.UUID, Depends(project_id)]


@router.get("/budget", dependencies=[Depends(Scope("jobs:read"))])
def own_budget(tenant: TenantDep, session: SessionDep) -> BudgetOut:
    """This month: the budget, what is used, held and left, and what was told."""
    return budget_out(tenant.project_id, budgets.standing(session, tenant.project_id))


@router.get("/projects/{project}/budget", dependencies=ADMIN, responses=problems(404))
def project_budget(target: ProjectId, tenant: TenantDep) -> BudgetOut:
    """The same of any project."""
    with _of(tenant, target) as session:
        return budget_out(target, budgets.standing(session, target))


@router.put("/projects/{project}/budget", dependencies=ADMIN, responses=problems(400, 404))
def set_project_budget(target: ProjectId, body: BudgetIn, tenant: TenantDep) -> BudgetOut:
    """Set a project's monthly budget. One that had been used up starts its jobs again within seconds, if it now may."""
    with _of(tenant, target) as session:
        budgets.put(session, target, body.monthly_gpu_hours, body.monthly_amount)
        now = budgets.standing(session, target)
    log.info("budget set", project=ids.encode(ids.PROJECT, target), budget=budgets.words(now.limits))
    return budget_out(target, now)


@router.delete("/projects/{project}/budget", dependencies=ADMIN, responses=problems(404))
def delete_project_budget(target: ProjectId, tenant: TenantDep) -> BudgetOut:
    """Take a project's budget away: it may use what it gets."""
    with _of(tenant, target) as session:
        budgets.put(session, target, None, None)
        now = budgets.standing(session, target)
    log.info("budget deleted", project=ids.encode(ids.PROJECT, target))
    return budget_out(target, now)


@contextmanager
def _of(tenant: Tenant, target: uuid.UUID) -> Iterator[Session]:
    """A transaction that sees the project which is meant, and no other. Raises NotFound."""
    with db.transaction(partial(db.for_project, tenant.sessions, target)) as session:
        tenancy.project(session, target)
        yield session
