"""`/v1/audit`: what admins changed."""

from typing import Annotated

from fastapi import APIRouter, Depends, Query

from api import pages
from api.deps import Scope, SessionDep
from api.documentation import problems
from api.schemas.cluster import AuditOut, audit_out
from api.schemas.common import Page
from tunery import audit, ids

router = APIRouter(prefix="/v1/audit", tags=["Audit"], dependencies=[Depends(Scope("admin"))])
MAX_ENTRIES = 1000
Target = Annotated[str | None, Query(max_length=300, description="Only what was done to this one.")]


@router.get("", responses=problems(400))
def list_audit_entries(
    session: SessionDep,
    after: pages.After = None,
    limit: Annotated[int, pages.limit_query(MAX_ENTRIES)] = 0,
    target: Target = None,
) -> Page[AuditOut]:
    """Newest first: which key changed what, from what to what, in which request."""
    at = pages.cursor(ids.AUDIT, after)
    rows, more = audit.page(session, after=at, limit=limit or 100, target=target)
    return pages.page(rows, more, audit_out)
