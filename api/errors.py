"""Errors on the wire: OpenAI's envelope, and the only place that knows HTTP statuses."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from psycopg.errors import UniqueViolation
from sqlalchemy.exc import DataError, IntegrityError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.exceptions import HTTPException
from starlette.types import Scope

from api import retry
from tunery.errors import Conflict, Invalid, NotFound, ServiceError, TooLarge, Unavailable

log = structlog.get_logger(__name__)

STATUS = {
    "invalid_request": 400,
    "invalid_api_key": 401,
    "invalid_join_token": 401,
    "insufficient_scope": 403,
    "not_found": 404,
    "model_not_found": 404,
    "method_not_allowed": 405,
    "conflict": 409,
    "version_mismatch": 409,
    "node_unreachable_servers": 409,
    "join_not_prepared": 409,
    "file_too_large": 413,
    "insufficient_quota": 429,
    "storage_quota_exceeded": 429,
    "budget_exceeded": 429,
    "internal_error": 500,
    "service_unavailable": 503,
}
"""A code that is not here has the status of the error class that carries it."""

FIXES = {
    400: "Correct it and send the request again; /docs describes every field.",
    404: "Check the id and the key: another project's object looks as if it did not exist.",
    405: "/docs lists the methods of every path.",
    500: "Try again; if it happens again, send the request id to your operator.",
}
"""For errors that have no better one of their own: nobody is left with a code alone."""
TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
RETRY_AFTER_S = 2
MAX_PROBLEMS = 50


def answer(error: ServiceError, scope: Scope, headers: Mapping[str, str] | None = None) -> Response:
    """The envelope, and the headers that tell OpenAI's client whether trying again can help."""
    status = status_of(error)
    body: dict[str, Any] = {
        "message": error.message,
        "type": TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error"),
        "param": error.param,
        "code": error.code,
        "docs": f"{scope['app'].state.settings.docs_url}#{error.code}",
        "request_id": scope.get("state", {}).get("request_id"),
    }
    if fix := error.fix or FIXES.get(status):
        body["fix"] = fix
    if error.details:
        body["errors"] = error.details[:MAX_PROBLEMS]
    sent = {"content-type": "application/json", **_hints(status), **(headers or {})}
    # ASCII only: a message may quote a lone surrogate, which UTF-8 cannot carry
    return Response(json.dumps({"error": body}).encode(), status, sent)


def status_of(error: ServiceError) -> int:
    return STATUS.get(error.code) or STATUS[type(error).code]


def install(app: FastAPI) -> None:
    """Every exception that may leave a route, and what it becomes. The rest ends in `middleware.Edge` as a 500."""
    app.add_exception_handler(ServiceError, _service_error)
    app.add_exception_handler(HTTPException, _http_exception)
    app.add_exception_handler(RequestValidationError, _invalid_request)
    for unreachable in (OperationalError, InterfaceError, PoolTimeout):
        app.add_exception_handler(unreachable, _database_away)
    app.add_exception_handler(DataError, _unstorable)
    app.add_exception_handler(IntegrityError, _collision)


def internal(scope: Scope) -> Response:
    """What a caller may know of a bug: that it is ours, and the id under which the log tells the rest."""
    return answer(ServiceError("The server made an error."), scope)


def too_large(limit: int) -> TooLarge:
    fix = "Split it into several files." if limit >= 1 << 20 else "Send less in one request."
    return TooLarge(f"The request is larger than this server accepts ({limit:,} bytes).", param="file", fix=fix)


def _hints(status: int) -> dict[str, str]:
    if status in (409, 429):
        return {"x-should-retry": "false"}  # the client retries both by itself, and neither state clears by waiting
    if status == 503:
        return {"retry-after": str(RETRY_AFTER_S)}
    return {"www-authenticate": "Bearer"} if status == 401 else {}


async def _service_error(request: Request, error: Any) -> Response:
    if status_of(error) >= 500:
        log.warning("request failed", code=error.code, error=error.message, cause=repr(error.__cause__))
    return answer(error, request.scope)


async def _http_exception(request: Request, error: Any) -> Response:
    method, path = request.method, request.url.path[:200]
    known: dict[int, ServiceError] = {
        404: NotFound(f"There is nothing at {path}.", fix="Check the path; everything lies below /v1."),
        405: Invalid(f"{method} is not possible at {path}.", code="method_not_allowed"),
        413: too_large(request.scope.get("max_body_bytes", 0)),
    }
    mapped = known.get(error.status_code) or Invalid(str(error.detail))
    return answer(mapped, request.scope, error.headers)


async def _invalid_request(request: Request, error: Any) -> Response:
    problems = [_problem(problem) for problem in error.errors()]
    first = problems[0]
    details: list[dict[str, object]] = [{"param": param, "message": message} for param, message in problems]
    fix = _fix(error.errors()[0])
    mapped = Invalid(first[1], param=first[0], fix=fix, details=details if len(details) > 1 else [])
    return answer(mapped, request.scope)


async def _database_away(request: Request, error: Any) -> Response:
    retry.note(request.scope, error)
    log.warning("database did not answer", error=str(getattr(error, "orig", error))[:500])
    return answer(Unavailable("The database does not answer.", fix="Try again in a moment."), request.scope)


async def _unstorable(request: Request, _error: Any) -> Response:
    return answer(Invalid("The request holds a character or a number that cannot be stored."), request.scope)


async def _collision(request: Request, error: Any) -> Response:
    if not isinstance(error.orig, UniqueViolation):
        log.error("integrity error", exc_info=error)
        return internal(request.scope)
    taken = Conflict("Something of this name was made at the same moment.", fix="Try again.")
    return answer(taken, request.scope, {"x-should-retry": "true"})


# ---- validation errors in words -----------------------------------------------------------------------------

_FIELD = re.compile(r"[A-Za-z_][\w.:-]*")
_EXPECTED = "Input should be "
_BRANCHES = ("constrained-", "function-", "literal[", "tuple[", "list[", "dict[", "lax-or-strict", "json-or-python")


def _problem(problem: Mapping[str, Any]) -> tuple[str | None, str]:
    """Name of the field as the caller wrote it, and one sentence."""
    param = _param(problem["loc"])
    kind, told = problem["type"], problem["msg"].removeprefix("Value error, ")
    match kind:
        case "missing":
            return param, f"Missing required parameter: '{param}'."
        case "extra_forbidden":
            return param, f"Unknown parameter: '{param}'."
        case "json_invalid":
            return None, f"The body is not valid JSON: {problem['ctx']['error']}."
        case _ if param is None:
            return None, f"The body is not usable: {told}."
        case _:
            return param, f"Invalid '{param}': {told[:1].lower()}{told[1:]}."


def _fix(problem: Mapping[str, Any]) -> str | None:
    """What would have been right. A number that was wrong is quoted, a text is not: nobody knows what is in it."""
    kind, told, given = problem["type"], problem["msg"], problem.get("input")
    match kind:
        case "missing":
            return "Add it, and send the request again."
        case "extra_forbidden":
            return "Correct its name, or leave it out; /docs lists what there is."
        case "json_invalid":
            return "Send one JSON object."
        case _ if not told.startswith(_EXPECTED):
            return None
    right = told.removeprefix(_EXPECTED).partition(", got ")[0]
    number = "a number " if right.startswith(("greater", "less")) else ""
    return f"Send {number}{right}{f'; it was {given:g}' if _is_number(given) else ''}."


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e15


def _param(loc: Sequence[str | int]) -> str | None:
    """`('body', 'tunery', 'training', 'learning_rate')` is `tunery.training.learning_rate`; union branches go."""
    parts = [str(part) for part in loc[1:]]
    named = [part for part in parts if not part.startswith(_BRANCHES) and (_FIELD.fullmatch(part) or part.isdigit())]
    while len(named) > 1 and named[-1] in ("int", "float", "str", "bool", "none"):
        named.pop()
    return ".".join(named) or None
