"""`/v1/adapters`: what jobs have published, and its files."""

from typing import Annotated

from fastapi import APIRouter, Depends, Path
from fastapi.responses import StreamingResponse

from api import pages
from api.deps import Scope, SessionDep, StorageDep, TenantDep
from api.documentation import BINARY, problems
from api.schemas.common import Page
from api.schemas.registry import AdapterOut, AdapterVersionOut, adapter_out, version_out
from api.streams import stream
from tunery import adapters, ids
from tunery.errors import NotFound

router = APIRouter(prefix="/v1/adapters", tags=["Adapters"], dependencies=[Depends(Scope("adapters:read"))])
MAX_ADAPTERS = 1000

Number = Annotated[int, Path(ge=1, lt=2**31)]


@router.get("", responses=problems(400))
def list_adapters(
    tenant: TenantDep,
    session: SessionDep,
    storage: StorageDep,
    after: pages.After = None,
    limit: Annotated[int, pages.limit_query(MAX_ADAPTERS)] = 0,
) -> Page[AdapterOut]:
    """This project's adapters with their versions, newest first."""
    at = pages.cursor(ids.ADAPTER, after)
    rows, more = adapters.page(session, tenant.project_id, after=at, limit=limit or 100)
    return pages.page(rows, more, lambda row: adapter_out(*row, storage))


# The longer paths come first: a name may hold a slash, and `{name_or_id:path}` would swallow the rest.


@router.get(
    "/{name_or_id:path}/versions/{version}/files/{filename:path}",
    responses=problems(400, 404) | BINARY,
    response_class=StreamingResponse,
)
def download_adapter_file(
    name_or_id: str, version: Number, filename: str, tenant: TenantDep, storage: StorageDep
) -> StreamingResponse:
    """One file of a version, as its manifest names it."""
    with tenant.transaction() as session:
        found = adapters.version(session, adapters.get(session, tenant.project_id, name_or_id), version)
    gone = NotFound("The version has no such file.", param="filename", fix="`files` of the version lists them.")
    entry = next((file for file in found.files if file["name"] == filename), None)
    if entry is None:
        raise gone
    key = f"{found.object_prefix}/{entry['name']}"
    return stream(storage, key, size=entry["bytes"], sha256=entry["sha256"], filename=entry["name"], gone=gone)


@router.get("/{name_or_id:path}/versions/{version}", responses=problems(400, 404))
def retrieve_adapter_version(
    name_or_id: str, version: Number, tenant: TenantDep, session: SessionDep, storage: StorageDep
) -> AdapterVersionOut:
    """One version: which job made it, its files and their hashes."""
    adapter = adapters.get(session, tenant.project_id, name_or_id)
    return version_out(adapters.version(session, adapter, version), adapter, storage)


@router.get("/{name_or_id:path}", responses=problems(404))
def retrieve_adapter(name_or_id: str, tenant: TenantDep, session: SessionDep, storage: StorageDep) -> AdapterOut:
    """One adapter, by its name, its id, or the name of a model it holds."""
    adapter = adapters.get(session, tenant.project_id, name_or_id)
    return adapter_out(adapter, adapters.versions(session, adapter), storage)
