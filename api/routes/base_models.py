"""`/v1/base_models`: the catalogue, which belongs to the whole deployment."""

from typing import Annotated

from fastapi import APIRouter, Depends

from api import pages
from api.deps import Scope, SessionDep, TenantDep
from api.documentation import problems
from api.schemas.common import Page
from api.schemas.registry import BaseModelIn, BaseModelOut, base_model_out
from tunery import catalogue

router = APIRouter(prefix="/v1/base_models", tags=["Base models"])
READ, ADMIN = [Depends(Scope("models:read"))], [Depends(Scope("admin"))]
MAX_MODELS = 1000


@router.get("", dependencies=READ, responses=problems(400))
def list_base_models(
    session: SessionDep, after: pages.After = None, limit: Annotated[int, pages.limit_query(MAX_MODELS)] = 0
) -> Page[BaseModelOut]:
    """Base models by name, also those that are being imported."""
    rows = [model for model in catalogue.listing(session) if not after or model.name > after]
    wanted = limit or 100
    return pages.page(rows[:wanted], len(rows) > wanted, base_model_out)


@router.post("", status_code=202, dependencies=ADMIN, responses=problems(400, 409))
def import_base_model(body: BaseModelIn, tenant: TenantDep, session: SessionDep) -> BaseModelOut:
    """Bring a base model in; a node does it. Asking for the same one again is the same import."""
    request = body.model_dump(exclude={"name"}, exclude_none=True)
    return base_model_out(catalogue.begin_import(session, tenant.project_id, body.name, request))


@router.get("/{name:path}", dependencies=READ, responses=problems(404))
def retrieve_base_model(name: str, session: SessionDep) -> BaseModelOut:
    """One base model: where it came from, its licence, its files and their hashes."""
    return base_model_out(catalogue.get(session, name))
