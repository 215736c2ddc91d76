"""Files as OpenAI shows them."""

from typing import Literal

from api.schemas.common import Out, unix, unix_or_none
from tunery import ids
from tunery.files import File

_SHOWN_AS = {"evals": "user_data"}
"""OpenAI takes `evals` on upload, but its strict client knows no file of that purpose."""


class FileExtra(Out):
    sha256: str


class FileOut(Out):
    """An uploaded file. It exists only once it is complete, so it is always `processed`."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: Literal["processed"] = "processed"
    expires_at: int | None = None
    status_details: str | None = None
    tunery: FileExtra


def file_out(file: File) -> FileOut:
    return FileOut(
        id=ids.encode(ids.FILE, file.id),
        bytes=file.bytes,
        created_at=unix(file.created_at),
        filename=file.filename,
        purpose=_SHOWN_AS.get(file.purpose, file.purpose),
        expires_at=unix_or_none(file.expires_at),
        tunery=FileExtra(sha256=file.sha256),
    )
