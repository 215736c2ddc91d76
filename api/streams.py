"""Objects on their way out, block by block; the first one is fetched before the answer begins."""

import itertools
from urllib.parse import quote

from fastapi.responses import StreamingResponse

from tunery.errors import NotFound
from tunery.storage import Storage


def stream(storage: Storage, key: str, *, size: int, sha256: str, filename: str, gone: NotFound) -> StreamingResponse:
    """Raises Unavailable, or `gone` if the object went after its row was read; both while they can still be told."""
    blocks = storage.read(key)
    try:
        first = next(blocks, b"")
    except KeyError:
        raise gone from None
    headers = {
        "content-length": str(size),
        "content-disposition": f"attachment; filename*=UTF-8''{quote(filename.rsplit('/', 1)[-1])}",
        "etag": f'"{sha256}"',
        "x-content-type-options": "nosniff",
    }
    return StreamingResponse(itertools.chain((first,), blocks), media_type="application/octet-stream", headers=headers)
