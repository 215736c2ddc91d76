"""Models, base models, adapters, and who is asking."""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from api.schemas.common import In, Out, unix, unix_or_none
from tunery import ids
from tunery.adapters import Adapter, AdapterVersion
from tunery.catalogue import BaseModel
from tunery.storage import Storage
from tunery.tenancy import Identity

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?")


class ModelOut(Out):
    """OpenAI's model object."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    shutdown_date: str | None = None


class ModelList(Out):
    """Never paged, as OpenAI's is not."""

    object: Literal["list"] = "list"
    data: list[ModelOut]


class FileEntryOut(Out):
    name: str
    bytes: int
    sha256: str


class BaseModelIn(In):
    """Where to take a base model from."""

    source: Literal["demo", "hub", "path"]
    name: Annotated[str | None, Field(max_length=128)] = None
    """What jobs will call it; by default the last part of its repository or path."""
    repo: Annotated[str | None, Field(max_length=256)] = None
    revision: Annotated[str | None, Field(max_length=128)] = None
    path: Annotated[str | None, Field(max_length=1024)] = None
    """A folder on the node that imports it."""

    @model_validator(mode="after")
    def _nameable(self) -> Self:
        last = (self.path or "").rstrip("/").rsplit("/", 1)[-1]
        if self.name is None and self.source == "path" and not _NAME.fullmatch(last):
            raise ValueError("the folder's name cannot be a model's name; add 'name'")
        return self

    @field_validator("name")
    @classmethod
    def _speakable(cls, name: str | None) -> str | None:
        if name is not None and not _NAME.fullmatch(name):
            raise ValueError("expected letters, digits, '.', '_' or '-', with at most one '/' between them")
        return name


class BaseModelOut(Out):
    id: str
    object: Literal["tunery.base_model"] = "tunery.base_model"
    hub_id: str | None
    revision: str | None
    source: str | None
    license: str | None
    parameters: int | None
    bytes: int | None
    state: Literal["importing", "ready", "failed"]
    error: str | None
    files: list[FileEntryOut]
    created_at: int


class AdapterVersionOut(Out):
    """An immutable published result; the files are in PEFT's layout."""

    id: str
    object: Literal["tunery.adapter_version"] = "tunery.adapter_version"
    adapter: str
    version: int
    model_name: str
    job_id: str
    base_model: str
    bytes: int
    sha256: str
    """Of the weights file."""
    uri: str
    files: list[FileEntryOut]
    metrics: dict[str, Any]
    created_at: int


class AdapterOut(Out):
    id: str
    object: Literal["tunery.adapter"] = "tunery.adapter"
    name: str
    created_at: int
    versions: list[AdapterVersionOut]
    """Newest first."""


class NamedOut(Out):
    id: str
    name: str


class KeyOut(NamedOut):
    scopes: list[str]
    expires_at: int | None


class IdentityOut(Out):
    object: Literal["tunery.identity"] = "tunery.identity"
    organization: NamedOut
    project: NamedOut
    key: KeyOut


def base_model_as_model(model: BaseModel) -> ModelOut:
    return ModelOut(id=model.name, created=unix(model.created_at), owned_by="tunery")


def version_as_model(version: AdapterVersion, who: Identity) -> ModelOut:
    return ModelOut(id=version.model_name, created=unix(version.created_at), owned_by=who.organization)


def base_model_out(model: BaseModel) -> BaseModelOut:
    return BaseModelOut(
        id=model.name,
        hub_id=model.hub_id,
        revision=model.revision,
        source=model.source or model.request.get("source"),
        license=model.license,
        parameters=model.parameters,
        bytes=model.bytes,
        state=model.state,  # pyright: ignore[reportArgumentType] - a CHECK keeps it to these words
        error=model.error,
        files=_entries((model.card or {}).get("files", [])),
        created_at=unix(model.created_at),
    )


def version_out(version: AdapterVersion, adapter: Adapter, storage: Storage) -> AdapterVersionOut:
    return AdapterVersionOut(
        id=ids.encode(ids.ADAPTER_VERSION, version.id),
        adapter=adapter.name,
        version=version.version,
        model_name=version.model_name,
        job_id=ids.encode(ids.JOB, version.job_id),
        base_model=version.model_name.split(":")[1],
        bytes=version.bytes,
        sha256=version.sha256,
        uri=storage.uri(version.object_prefix),
        files=_entries(version.files),
        metrics=version.metrics,
        created_at=unix(version.created_at),
    )


def adapter_out(adapter: Adapter, versions: list[AdapterVersion], storage: Storage) -> AdapterOut:
    return AdapterOut(
        id=ids.encode(ids.ADAPTER, adapter.id),
        name=adapter.name,
        created_at=unix(adapter.created_at),
        versions=[version_out(version, adapter, storage) for version in versions],
    )


def identity_out(who: Identity) -> IdentityOut:
    return IdentityOut(
        organization=NamedOut(id=ids.encode(ids.ORGANIZATION, who.organization_id), name=who.organization),
        project=NamedOut(id=ids.encode(ids.PROJECT, who.project_id), name=who.project),
        key=KeyOut(
            id=ids.encode(ids.KEY, who.key_id),
            name=who.key_name,
            scopes=sorted(who.scopes),
            expires_at=unix_or_none(who.expires_at),
        ),
    )


def _entries(files: list[dict[str, Any]]) -> list[FileEntryOut]:
    return [FileEntryOut(name=file["name"], bytes=file["bytes"], sha256=file["sha256"]) for file in files]
