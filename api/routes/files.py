"""`/v1/files`. An object is stored whole before its row exists, and no transaction is open meanwhile."""

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import structlog
from fastapi import APIRouter, Depends, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import StreamingResponse
from starlette.datastructures import UploadFile
from starlette.types import Message, Receive

from api import pages
from api.deps import Scope, SessionDep, SettingsDep, StorageDep, Tenant, TenantDep
from api.documentation import BINARY, MULTIPART, problems
from api.errors import too_large
from api.metrics import UPLOADED_BYTES
from api.middleware import FRAMING_BYTES
from api.schemas.common import Deleted, Page
from api.schemas.files import FileOut, file_out
from api.streams import stream
from tunery import datasets, failpoints, files, ids, usage
from tunery.errors import Invalid, NotFound
from tunery.files import PURPOSES, File
from tunery.settings import ApiSettings
from tunery.storage import Storage
from tunery.usage import StorageUsage

log = structlog.get_logger(__name__)
router = APIRouter(prefix="/v1/files", tags=["Files"])
READ, WRITE = [Depends(Scope("files:read"))], [Depends(Scope("files:write"))]

MAX_FILES = 10_000
_NAME_LENGTH = 255


@dataclass(frozen=True)
class Upload:
    """A parsed upload: its bytes lie in an unnamed temporary file, gone when the request ends."""

    content: UploadFile
    filename: str
    purpose: str


async def uploaded(request: Request, tenant: TenantDep, settings: SettingsDep) -> AsyncIterator[Upload]:
    """Parsed only here, after authentication: declared as a body it would be read before anybody asks who sends it."""
    used = await run_in_threadpool(_used, tenant, settings)
    form = await Request(request.scope, _within(request, used)).form(max_files=1, max_fields=20)
    try:
        yield _upload(form)
    finally:
        await form.close()


def _used(tenant: Tenant, settings: ApiSettings) -> StorageUsage:
    with tenant.transaction() as session:
        return usage.storage(session, tenant.project_id, settings.max_project_bytes)


def _within(request: Request, used: StorageUsage) -> Receive:
    """The body, as far as the project has room: refused by its announced length, else where it goes over."""
    room = used.room_bytes + FRAMING_BYTES
    length = request.headers.get("content-length", "")
    if used.room_bytes <= 0 or (length.isdigit() and int(length) > room):
        raise usage.exceeded(used)
    seen = 0

    async def receive() -> Message:
        nonlocal seen
        message = await request.receive()
        seen += len(message.get("body", b""))
        if seen > room:
            raise usage.exceeded(used)
        return message

    return receive


def _upload(form: Any) -> Upload:
    for name in form:
        if name not in ("file", "purpose"):
            raise Invalid(f"Unknown parameter: '{name[:80]}'.", param=name[:80], fix="Send 'file' and 'purpose' alone.")
    content, purpose = form.get("file"), form.get("purpose")
    if not isinstance(content, UploadFile):
        raise Invalid("Missing required parameter: 'file'.", param="file", fix="Send multipart/form-data.")
    if purpose is None:
        raise Invalid("Missing required parameter: 'purpose'.", param="purpose", fix="Send purpose=fine-tune.")
    if purpose not in PURPOSES:
        fix = f"Use one of: {', '.join(PURPOSES)}."
        raise Invalid(f"Invalid 'purpose': '{str(purpose)[:40]}' is not known.", param="purpose", fix=fix)
    return Upload(content, _filename(content.filename), purpose)


def _filename(given: str | None) -> str:
    """The last part of what was sent, without what no file name should hold. It is shown, never used as a path."""
    last = (given or "").replace("\\", "/").rsplit("/", 1)[-1]
    return "".join(letter for letter in last if letter.isprintable())[:_NAME_LENGTH] or "file"


@router.post("", dependencies=WRITE, responses=problems(400, 413, 429), openapi_extra=MULTIPART)
def create_file(
    tenant: TenantDep,
    storage: StorageDep,
    settings: SettingsDep,
    upload: Annotated[Upload, Depends(uploaded, scope="function")],
) -> FileOut:
    """Upload a file. For purpose `fine-tune` every line must be a JSON object."""
    if (upload.content.size or 0) > settings.max_file_bytes:
        raise too_large(settings.max_file_bytes)
    content = upload.content.file
    _check(upload)
    content.seek(0)
    size, sha256 = datasets.digest(content)
    content.seek(0)
    file_id = ids.uuid7()
    key = files.object_key(tenant.project_id, file_id)
    try:
        storage.put(key, content)
        failpoints.reach("upload.stored")
        with tenant.transaction() as session:
            usage.refuse_if_full(session, tenant.project_id, settings.max_project_bytes, size)
            file = files.record(
                session,
                tenant.project_id,
                file_id,
                filename=upload.filename,
                purpose=upload.purpose,
                size=size,
                sha256=sha256,
            )
    except BaseException:
        _discard(tenant, storage, ids.encode(ids.FILE, file_id), key)
        raise
    UPLOADED_BYTES.inc(size)
    return file_out(file)


def _check(upload: Upload) -> None:
    if not upload.content.size:
        raise Invalid("The file is empty.", param="file", fix="Upload a file with at least one line.")
    if upload.purpose != "fine-tune":
        return
    report = datasets.check_json(upload.content.file)
    fix = 'Each line must be one JSON object, as in {"messages": [...]}.'
    if report.errors:
        more = f" ({report.error_count} lines are wrong)" if report.error_count > 1 else ""
        details: list[dict[str, object]] = [{"line": error.line, "message": error.message} for error in report.errors]
        raise Invalid(f"{report.errors[0]}{more}", param="file", fix=fix, code="invalid_file", details=details)
    if not report.rows:
        raise Invalid("The file has no rows.", param="file", fix=fix, code="invalid_file")


def _discard(tenant: Tenant, storage: Storage, file_id: str, key: str) -> None:
    """Remove the object of a file that was not recorded. A commit whose reply was lost may have recorded it after
    all: then it stays, and so it does while nobody can tell. A stray object wastes space; a lost one is data."""
    try:
        with tenant.transaction() as session, contextlib.suppress(NotFound):
            files.get(session, tenant.project_id, file_id)
            return
        storage.delete(key)
    except Exception:  # the request fails for its own reason; this one is for the operator
        log.warning("an unrecorded object was left behind", key=key, exc_info=True)


@router.get("", dependencies=READ, responses=problems(400))
def list_files(
    tenant: TenantDep,
    session: SessionDep,
    after: pages.After = None,
    limit: Annotated[int, pages.limit_query(MAX_FILES)] = 0,
    order: Annotated[Literal["asc", "desc"], Query(description="By age.")] = "desc",
    purpose: Annotated[str | None, Query(description="Only files of this purpose.")] = None,
) -> Page[FileOut]:
    """List this project's files."""
    rows, more = files.page(
        session,
        tenant.project_id,
        after=pages.cursor(ids.FILE, after, ascending=order == "asc"),
        limit=limit or MAX_FILES,
        order=order,
        purpose=purpose,
    )
    return pages.page(rows, more, file_out)


@router.get("/{file_id}", dependencies=READ, responses=problems(404))
def retrieve_file(file_id: str, tenant: TenantDep, session: SessionDep) -> FileOut:
    """Look at one file."""
    return file_out(files.get(session, tenant.project_id, file_id))


@router.get("/{file_id}/content", dependencies=READ, responses=problems(404) | BINARY, response_class=StreamingResponse)
def download_file(file_id: str, tenant: TenantDep, storage: StorageDep) -> StreamingResponse:
    """The bytes as they were uploaded."""
    with tenant.transaction() as session:
        file: File = files.get(session, tenant.project_id, file_id)
    gone = NotFound(f"No such File object: {file_id[:80]}", param="file_id")
    return stream(storage, file.object_key, size=file.bytes, sha256=file.sha256, filename=file.filename, gone=gone)


@router.delete("/{file_id}", dependencies=WRITE, responses=problems(404, 409))
def delete_file(file_id: str, tenant: TenantDep, session: SessionDep) -> Deleted:
    """Delete a file. Jobs that have ended keep their rows; one that has not ended stands in the way."""
    files.delete(session, tenant.project_id, file_id)
    return Deleted(id=file_id, object="file")
