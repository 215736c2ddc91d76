"""The edge of the program, in plain ASGI: request ids, the access log, metrics, body limits, and the last resort."""

import re
import secrets
import time

import anyio
import structlog
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api import errors
from api.metrics import HTTP_DURATION
from tunery import ids
from tunery.telemetry import tracing
from tunery.telemetry.tracing import Span

log = structlog.get_logger(__name__)

_SANE_ID = re.compile(r"[A-Za-z0-9._:-]{8,128}")
_METHODS = ("GET", "POST", "DELETE", "PUT", "PATCH", "HEAD", "OPTIONS")
_QUIET = ("/healthz", "/livez", "/readyz")
FRAMING_BYTES = 64 * 1024
"""What multipart adds to a file: boundaries, headers and the other fields. The route itself measures the file."""
_LINGER_S = 15.0
"""So long we keep reading what a refused client still sends: closing at once would reset the connection, and the
client's kernel would throw our answer away unread."""


class Edge:
    """Outermost: gives each request an id, times it, and turns whatever nobody expected into a 500."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)
        scope.setdefault("state", {})["request_id"] = request_id
        began, status = time.perf_counter(), 0

        async def send_stamped(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
            await send(message)

        parent = tracing.sane(_header(scope, b"traceparent"))
        with (
            structlog.contextvars.bound_contextvars(request_id=request_id, **_their_trace(parent)),
            tracing.span(_method(scope), parent=parent, kind="server") as span,
        ):
            # what a job's row keeps: our span, or without an exporter of ours the caller's
            scope["state"]["traceparent"] = span.traceparent or parent
            try:
                await self._app(scope, receive, send_stamped)
            except ClientDisconnect:
                status = status or 499  # nobody is left to answer; the number is nginx's, for the metrics alone
            except Exception:  # the process edge: nothing of it may reach the caller, all of it must reach the log
                log.exception("unexpected error", method=scope["method"], path=scope["path"])
                if status:
                    raise  # the answer has begun; only a broken connection can say that it is not whole
                await errors.internal(scope)(scope, receive, send_stamped)
            finally:
                _observe(scope, status, time.perf_counter() - began, span)


class BodyLimit:
    """Refuses a body over its route's limit: by its announced length before a byte of it, else by counting."""

    def __init__(self, app: ASGIApp, *, default: int, files: dict[tuple[str, str], int]) -> None:
        self._app = app
        self._default = default
        self._files = files

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        file_limit = self._files.get((scope["method"], scope["path"]))
        scope["max_body_bytes"] = limit = self._default if file_limit is None else file_limit
        whole = limit if file_limit is None else limit + FRAMING_BYTES
        body = _Body(scope, receive, send, whole)
        if body.announced > whole:
            refused = errors.answer(errors.too_large(limit), scope)
            await refused(scope, body.receive, body.send)
            return
        await self._app(scope, body.receive, body.send)


class _Body:
    """One request's body on its way in, counted; and its answer, held open until the client has stopped sending."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, limit: int) -> None:
        self._receive, self._send, self._limit = receive, send, limit
        headers: dict[bytes, bytes] = dict(scope["headers"])
        length = headers.get(b"content-length", b"")
        self.announced = int(length) if length.isdigit() else 0
        self._seen = 0
        self._ended = not self.announced and b"transfer-encoding" not in headers
        # such a client sends nothing before it is told to, so there is nothing to wait for
        self._polite = headers.get(b"expect", b"").lower() == b"100-continue"

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.disconnect":
            self._ended = True
            return message
        self._polite = False
        self._ended = not message.get("more_body", False)
        self._seen += len(message.get("body", b""))
        if self._seen > self._limit:
            raise HTTPException(413)
        return message

    async def send(self, message: Message) -> None:
        unread = not self._ended
        if message["type"] == "http.response.start" and unread:
            message["headers"] = [*message.get("headers", ()), (b"connection", b"close")]
        last = message["type"] == "http.response.body" and not message.get("more_body", False)
        if last and unread and not self._polite:
            await self._send({**message, "more_body": True})
            await self._linger()
            message = {"type": "http.response.body", "body": b"", "more_body": False}
        await self._send(message)

    async def _linger(self) -> None:
        with anyio.move_on_after(_LINGER_S):
            while not self._ended:
                message = await self._receive()
                self._ended = message["type"] == "http.disconnect" or not message.get("more_body", False)


def _request_id(scope: Scope) -> str:
    """The caller's own id if it is one, so that a request can be followed through proxies; else a new one."""
    given = _header(scope, b"x-request-id")
    return given if _SANE_ID.fullmatch(given) else f"req_{secrets.token_hex(12)}"


def _header(scope: Scope, wanted: bytes) -> str:
    return next((value.decode("latin-1") for name, value in scope["headers"] if name == wanted), "")


def _their_trace(traceparent: str | None) -> dict[str, str]:
    """Without an exporter of ours the log lines of a request still say which trace of the caller's they belong to."""
    trace_id = None if tracing.on() else tracing.trace_id(traceparent)
    return {"trace_id": trace_id} if trace_id else {}


def _method(scope: Scope) -> str:
    return scope["method"] if scope["method"] in _METHODS else "other"


def _observe(scope: Scope, status: int, seconds: float, span: Span) -> None:
    # a path or a method that a caller made up must not become a label: each value is a series for ever
    template, method = getattr(scope.get("route"), "path", "unmatched"), _method(scope)
    HTTP_DURATION.labels(template, method, str(status)).observe(seconds)
    who = scope.get("state", {}).get("identity")
    span.name(f"{method} {template}")
    span.note(
        {
            "http.request.method": method,
            "http.route": template,
            "http.response.status_code": status,
            "url.path": scope["path"],
            "url.scheme": scope.get("scheme"),
            "tunery.request_id": scope["state"]["request_id"],
            "tunery.project_id": ids.encode(ids.PROJECT, who.project_id) if who else None,
        }
    )
    if status >= 500:
        span.fail(f"answered {status}")
    if template in _QUIET:
        return
    log.info("request", method=scope["method"], route=template, status=status, ms=round(seconds * 1000, 1))
