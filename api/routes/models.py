"""`/v1/models`: what a job may name and what jobs have made, as OpenAI lists them."""

from fastapi import APIRouter, Depends

from api.deps import Scope, SessionDep, TenantDep
from api.documentation import problems
from api.schemas.common import Deleted
from api.schemas.registry import ModelList, ModelOut, base_model_as_model, version_as_model
from tunery import adapters, catalogue

router = APIRouter(prefix="/v1/models", tags=["Models"])
READ, WRITE = [Depends(Scope("models:read"))], [Depends(Scope("jobs:write"))]


@router.get("", dependencies=READ)
def list_models(tenant: TenantDep, session: SessionDep) -> ModelList:
    """Base models that are ready, then this project's own, newest first."""
    ready = [model for model in catalogue.listing(session) if model.state == "ready"]
    tuned = adapters.tuned_models(session, tenant.project_id)
    own = [version_as_model(version, tenant.identity) for version in tuned]
    return ModelList(data=[*map(base_model_as_model, ready), *own])


@router.get("/{model:path}", dependencies=READ, responses=problems(404))
def retrieve_model(model: str, tenant: TenantDep, session: SessionDep) -> ModelOut:
    """A base model or one of this project's own, by name."""
    version = adapters.by_model_name(session, tenant.project_id, model)
    if version is not None:
        return version_as_model(version, tenant.identity)
    return base_model_as_model(catalogue.ready_one(session, model))


@router.delete("/{model:path}", dependencies=WRITE, responses=problems(404))
def delete_model(model: str, tenant: TenantDep, session: SessionDep) -> Deleted:
    """Delete a model that a job of this project made. Base models belong to the deployment."""
    adapters.delete(session, tenant.project_id, model)
    return Deleted(id=model, object="model")
