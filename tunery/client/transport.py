"""HTTP with patience: one place that retries, and the only one that knows httpx."""

import contextlib
import hashlib
import ipaddress
import os
import random
import tempfile
import time
import urllib.parse
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar, cast

from tunery import __version__
from tunery.client.errors import APIError, CorruptDownload, NotTheAPI, Unreachable, from_response

if TYPE_CHECKING:  # httpx takes 60 ms to import: only a client that is built pays for it
    import httpx

T = TypeVar("T")
Params = Mapping[str, str | int | None]
OnBytes = Callable[[int, int], None]
"""Called with the bytes moved so far and the total (0 when unknown); starts again at 0 on a retry."""
OnRetry = Callable[[APIError | Unreachable, float], None]
"""Called before each wait with what went wrong and the seconds until the next try."""

FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 8.0
UPLOAD_TIMEOUT_S = 600.0
"""The server answers an upload only after it has stored and hashed all of it."""
CHUNK = 1024 * 1024


class Transport:
    def __init__(
        self, base_url: str, api_key: str, *, timeout_s: float, max_retries: int, on_retry: OnRetry | None
    ) -> None:
        import httpx

        self.base_url = base_url.rstrip("/").removesuffix("/v1") + "/v1"
        self._max_retries = max_retries
        self._on_retry = on_retry
        self._timeout_s = timeout_s
        self._http = httpx.Client(
            headers={
                "Authorization": f"Bearer {api_key}",
                "Accept": "application/json",
                "User-Agent": f"tunery/{__version__}",
            },
            timeout=httpx.Timeout(timeout_s, connect=5.0),
            # A proxy for the outside world must not swallow requests to a server on this machine.
            trust_env=not _is_loopback(self.base_url),
        )

    def close(self) -> None:
        self._http.close()

    def call(self, method: str, path: str, *, params: Params | None = None, json: object = None) -> dict[str, Any]:
        """One JSON answer. A POST carries one key for all its tries, so that a lost answer creates nothing twice."""
        headers = {"Idempotency-Key": str(uuid.uuid4())} if method == "POST" else {}
        wanted = {name: value for name, value in (params or {}).items() if value is not None}

        def send() -> dict[str, Any]:
            with self._reached(path):
                reply = self._http.request(method, self.base_url + path, params=wanted, json=json, headers=headers)
            return self._json(reply)

        return self._patiently(send)

    def upload(self, path: str, file: Path, fields: Mapping[str, str], on_bytes: OnBytes | None) -> dict[str, Any]:
        """Multipart, streamed from disk: the file is never whole in memory."""
        import httpx

        headers = {"Idempotency-Key": str(uuid.uuid4())}
        timeout = httpx.Timeout(UPLOAD_TIMEOUT_S, connect=5.0)

        def send() -> dict[str, Any]:
            with file.open("rb") as handle, self._reached(path):
                body = cast("BinaryIO", _Counted(handle, on_bytes))
                reply = self._http.post(
                    self.base_url + path,
                    files={"file": (file.name, body, "application/jsonl")},
                    data=dict(fields),
                    headers=headers,
                    timeout=timeout,
                )
            return self._json(reply)

        return self._patiently(send)

    def download(
        self, path: str, target: Path, *, sha256: str | None, size: int | None, on_bytes: OnBytes | None
    ) -> None:
        """Streams to a temporary name beside `target`, and renames only what has the right length and hash."""
        self._patiently(lambda: self._download_once(path, target, sha256, size, on_bytes))

    def stream(self, path: str, write: Callable[[bytes], object]) -> None:
        """Streams to `write`. Not retried: what has been written cannot be taken back."""
        with self._reached(path), self._http.stream("GET", self.base_url + path) as reply:
            self._refuse_errors(reply)
            for chunk in reply.iter_bytes(CHUNK):
                write(chunk)

    def _download_once(
        self, path: str, target: Path, sha256: str | None, size: int | None, on_bytes: OnBytes | None
    ) -> None:
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
        part = Path(name)
        try:
            with os.fdopen(handle, "wb") as out, self._reached(path):
                digest, received = hashlib.sha256(), 0
                with self._http.stream("GET", self.base_url + path) as reply:
                    self._refuse_errors(reply)
                    total = size or int(reply.headers.get("content-length", 0))
                    for chunk in reply.iter_bytes(CHUNK):
                        out.write(chunk)
                        digest.update(chunk)
                        received += len(chunk)
                        if on_bytes:
                            on_bytes(received, total)
                out.flush()
                os.fsync(out.fileno())
            _verify(target.name, received, digest.hexdigest(), size, sha256)
            part.chmod(0o666 & ~_umask())
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)

    def _patiently(self, send: Callable[[], T]) -> T:
        for attempt in range(self._max_retries):
            try:
                return send()
            except (APIError, Unreachable) as error:
                if isinstance(error, APIError) and not error.retryable:
                    raise
                wait = _wait_s(error, attempt)
                if self._on_retry:
                    self._on_retry(error, wait)
                time.sleep(wait)
        return send()

    @contextlib.contextmanager
    def _reached(self, path: str) -> Iterator[None]:
        import httpx

        try:
            yield
        except httpx.LocalProtocolError as error:
            # Our own side broke the exchange, e.g. a file that grew while it was sent: trying again is no help.
            raise NotTheAPI(self.base_url + path, 0, str(error)) from error
        except httpx.TransportError as error:
            raise Unreachable(self.base_url, _reason(error)) from error

    def _refuse_errors(self, reply: "httpx.Response") -> None:
        if reply.is_success:
            return
        with self._reached(reply.request.url.path):
            reply.read()
        self._json(reply)
        raise NotTheAPI(str(reply.request.url), reply.status_code, "no error")

    def _json(self, reply: "httpx.Response") -> dict[str, Any]:
        try:
            body = reply.json()
        except ValueError:
            body = None
        if not reply.is_success and (isinstance(body, dict) or reply.status_code >= 500):
            raise from_response(reply.status_code, body if isinstance(body, dict) else {}, reply.headers)
        if not isinstance(body, dict) or not reply.is_success:
            seen = reply.headers.get("content-type", "no content type").split(";")[0]
            raise NotTheAPI(str(reply.request.url), reply.status_code, seen)
        return body


class _Counted:
    """A file that tells how much of it has been read. httpx asks `fileno` for the length and rewinds with `seek`."""

    def __init__(self, handle: BinaryIO, on_bytes: OnBytes | None) -> None:
        self._handle = handle
        self._on_bytes = on_bytes
        self._total = os.fstat(handle.fileno()).st_size

    def read(self, size: int = -1) -> bytes:
        chunk = self._handle.read(size)
        if self._on_bytes:
            self._on_bytes(self._handle.tell(), self._total)
        return chunk

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._handle.seek(offset, whence)

    def tell(self) -> int:
        return self._handle.tell()

    def fileno(self) -> int:
        return self._handle.fileno()


def _verify(name: str, received: int, digest: str, size: int | None, sha256: str | None) -> None:
    if sha256 is not None and digest != sha256.lower():
        raise CorruptDownload(name, f"sha256 {sha256}", f"sha256 {digest}")
    if size is not None and received != size:
        raise CorruptDownload(name, f"{size:,} bytes", f"{received:,} bytes")


def _wait_s(error: APIError | Unreachable, attempt: int) -> float:
    if isinstance(error, APIError) and error.retry_after_s is not None:
        return error.retry_after_s
    # Jitter, so that many clients cut off together do not come back together.
    return min(LONGEST_WAIT_S, FIRST_WAIT_S * 2**attempt) * random.uniform(0.75, 1.0)  # noqa: S311


def _reason(error: Exception) -> str:
    text = str(error)
    if "timed out" in text or "Timeout" in type(error).__name__:
        return "timed out"
    return text or type(error).__name__


def _is_loopback(url: str) -> bool:
    host = urllib.parse.urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
