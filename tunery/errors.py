"""Errors a caller can act on. They carry a code and never an HTTP status: `api/errors.py` alone knows those."""

from dataclasses import dataclass, field


@dataclass
class ServiceError(Exception):
    """What happened (`message`), which input it was about (`param`) and what to do about it (`fix`)."""

    message: str
    param: str | None = None
    fix: str | None = None
    code: str = "internal_error"
    details: list[dict[str, object]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(self.message)


@dataclass
class NotFound(ServiceError):
    """The object does not exist, or belongs to another project: the two look the same."""

    code: str = "not_found"


@dataclass
class Invalid(ServiceError):
    """The request cannot be carried out as it stands."""

    code: str = "invalid_request"


@dataclass
class TooLarge(ServiceError):
    code: str = "file_too_large"


@dataclass
class Conflict(ServiceError):
    """The object's state forbids it. Repeating the request will not help."""

    code: str = "conflict"


@dataclass
class Unauthenticated(ServiceError):
    code: str = "invalid_api_key"


@dataclass
class Forbidden(ServiceError):
    code: str = "insufficient_scope"


@dataclass
class QuotaExceeded(ServiceError):
    code: str = "insufficient_quota"


@dataclass
class Unavailable(ServiceError):
    """A server we stand on does not answer. Repeating the request later will help."""

    code: str = "service_unavailable"
