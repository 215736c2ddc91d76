"""What can go wrong between a client and the API, each with what a person needs to act on it."""

from collections.abc import Mapping
from typing import Any

MAX_RETRY_AFTER_S = 120.0
"""A server that asks for more patience than this is not waited for; its answer is shown instead."""


class TuneryError(Exception):
    """The base of everything that the client raises on purpose."""


class Unreachable(TuneryError):
    """No answer at all: refused, reset, timed out, or a name that does not resolve."""

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(f"{url} did not answer: {reason}")
        self.url = url
        self.reason = reason


class NotTheAPI(TuneryError):
    """Something answered, but not Tunery: a proxy's page, a redirect, a wrong port."""

    def __init__(self, url: str, status: int, seen: str) -> None:
        super().__init__(f"{url} answered HTTP {status} with {seen}, not with JSON")
        self.url = url
        self.status = status


class CorruptDownload(TuneryError):
    """The bytes that arrived are not the bytes that the server has on record. Nothing was kept."""

    def __init__(self, name: str, expected: str, actual: str) -> None:
        super().__init__(f"{name}: expected {expected}, received {actual}")
        self.name = name
        self.expected = expected
        self.actual = actual


class APIError(TuneryError):
    """The API refused or failed. OpenAI's envelope, plus the optional keys that explain it."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str | None = None,
        param: str | None = None,
        code: str | None = None,
        request_id: str | None = None,
        fix: str | None = None,
        docs: str | None = None,
        errors: list[Any] | None = None,
        retry_after_s: float | None = None,
        should_retry: bool | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type
        self.param = param
        self.code = code
        self.request_id = request_id
        self.fix = fix
        self.docs = docs
        self.errors = errors or []
        self.retry_after_s = retry_after_s
        self.should_retry = should_retry

    @property
    def retryable(self) -> bool:
        if self.retry_after_s is not None and self.retry_after_s > MAX_RETRY_AFTER_S:
            return False
        if self.should_retry is not None:
            return self.should_retry
        return self.status in (408, 429) or self.status >= 500


class BadRequest(APIError):
    """400, 413, 422: the request itself has to change."""


class Unauthorized(APIError):
    """401: no key, a wrong key, or one that has expired or been revoked."""


class Forbidden(APIError):
    """403: a good key that may not do this."""


class NotFound(APIError):
    """404: no such thing, or another project's."""


class Conflict(APIError):
    """409: the state that the thing is in does not allow it."""


class RateLimited(APIError):
    """429: too many requests, or a quota is used up."""


class ServerError(APIError):
    """5xx: the fault is the server's."""


_BY_STATUS: dict[int, type[APIError]] = {
    400: BadRequest,
    401: Unauthorized,
    403: Forbidden,
    404: NotFound,
    409: Conflict,
    413: BadRequest,
    422: BadRequest,
    429: RateLimited,
}


def from_response(status: int, body: Mapping[str, Any], headers: Mapping[str, str]) -> APIError:
    """The typed error of an answer whose body is OpenAI's envelope; tolerant of absent keys."""
    found = body.get("error")
    envelope: Mapping[str, Any] = found if isinstance(found, Mapping) else {"message": found}
    kind = _BY_STATUS.get(status, ServerError if status >= 500 else APIError)
    return kind(
        status,
        _text(envelope.get("message")) or f"HTTP {status}",
        type=_text(envelope.get("type")),
        param=_text(envelope.get("param")),
        code=_text(envelope.get("code")),
        request_id=_text(envelope.get("request_id")) or headers.get("x-request-id"),
        fix=_text(envelope.get("fix")),
        docs=_text(envelope.get("docs")),
        errors=envelope["errors"] if isinstance(envelope.get("errors"), list) else None,
        retry_after_s=_retry_after(headers),
        should_retry={"true": True, "false": False}.get(headers.get("x-should-retry", "").lower()),
    )


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """`retry-after-ms`, then `Retry-After` as seconds or as a date."""
    try:
        if "retry-after-ms" in headers:
            return float(headers["retry-after-ms"]) / 1000
        if "retry-after" in headers:
            return float(headers["retry-after"])
    except ValueError:
        return _seconds_until(headers.get("retry-after", ""))
    return None


def _seconds_until(http_date: str) -> float | None:
    import email.utils
    import time

    try:
        return max(0.0, email.utils.parsedate_to_datetime(http_date).timestamp() - time.time())
    except ValueError:
        return None
