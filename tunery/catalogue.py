"""Base models: which there are, where they came from, and the shape that memory estimates need."""

import uuid
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from tunery import tasks
from tunery.errors import Conflict, Invalid, NotFound
from tunery.models import BaseModel

SOURCES = ("demo", "hub", "path")
DEMO_NAME = "smollm2-135m-instruct"


def listing(session: Session) -> list[BaseModel]:
    return list(session.scalars(select(BaseModel).order_by(BaseModel.name)))


def get(session: Session, name: str) -> BaseModel:
    """Raises NotFound."""
    if (found := session.scalar(select(BaseModel).where(BaseModel.name == name))) is None:
        fix = "`tunery models list` shows the base models; `tunery models import` adds one."
        raise NotFound(f"The model '{name[:80]}' does not exist.", param="model", fix=fix, code="model_not_found")
    return found


def ready_one(session: Session, name: str) -> BaseModel:
    """One that jobs can train on. Raises NotFound."""
    model = get(session, name)
    if model.state != "ready":
        fix = f"`tunery models show {name}` says how its import goes."
        raise NotFound(f"The model '{name[:80]}' is not ready.", param="model", fix=fix, code="model_not_found")
    return model


def by_id(session: Session, model_id: uuid.UUID) -> BaseModel:
    return session.get_one(BaseModel, model_id)


def begin_import(session: Session, project_id: uuid.UUID, name: str | None, request: dict[str, Any]) -> BaseModel:
    """Enter a model and queue the task that brings it. A ready or importing one is returned as it is.

    Raises:
        Invalid: the request names no usable source.
        Conflict: this name is taken by a model from elsewhere.
    """
    source = request.get("source")
    if source not in SOURCES:
        raise Invalid(f"'{source}' is not a source.", param="source", fix=f"Use one of: {', '.join(SOURCES)}.")
    for field in {"hub": ("repo", "revision"), "path": ("path",)}.get(source, ()):
        if not request.get(field):
            raise Invalid(f"Source '{source}' needs '{field}'.", param=field, fix=f"Add '{field}' to the request.")
    name = name or _default_name(request)
    model = session.scalar(select(BaseModel).where(BaseModel.name == name).with_for_update())
    if model is not None and model.state != "failed":
        if model.request != request:
            raise Conflict(
                f"The name '{name}' is taken by a model from elsewhere.", param="name", fix="Choose another name."
            )
        return model
    if model is None:
        session.add(model := BaseModel(name=name, request=request))
    model.state, model.request, model.error = "importing", request, None
    session.flush()
    tasks.enqueue(session, tasks.IMPORT_BASE, project_id, base_model_id=model.id, payload={"name": name} | request)
    session.refresh(model)
    return model


def ready(model: BaseModel, card: dict[str, Any], object_prefix: str) -> None:
    """The files are stored and hashed. `card` is what the import wrote as base.json."""
    model.hub_id, model.revision, model.source = card["hub_id"], card["revision"], card["source"]
    model.license, model.parameters, model.card = card["license"], card["parameters"], card
    model.bytes = sum(file["bytes"] for file in card["files"])
    model.object_prefix, model.state, model.error = object_prefix, "ready", None


def failed(model: BaseModel, error: str) -> None:
    model.state, model.error = "failed", error[:4000]


def _default_name(request: dict[str, Any]) -> str:
    if request["source"] == "demo":
        return DEMO_NAME
    text = str(request.get("repo") or request["path"]).rstrip("/").rsplit("/", 1)[-1]
    return text.lower()
