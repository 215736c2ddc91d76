"""What every shape shares: strictness, times, pages, the error envelope."""

import math
from datetime import datetime
from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, model_validator

T = TypeVar("T")


class In(BaseModel):
    """A body. An unknown key is refused by name: a setting that is silently ignored costs a training run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _storable(cls, data: Any) -> Any:
        if (problem := _unstorable(data)) is not None:
            raise ValueError(problem)
        return data


class Out(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Page(Out, Generic[T]):
    """A list; ask again with `after` = the last element's id while `has_more`."""

    object: Literal["list"] = "list"
    data: list[T]
    has_more: bool
    first_id: str | None = None
    last_id: str | None = None


class Deleted(Out):
    id: str
    object: str
    deleted: bool = True


class Problem(BaseModel):
    message: str
    """What happened, in a sentence."""
    type: str
    param: str | None
    """Which input it is about, such as `tunery.training.learning_rate`."""
    code: str
    """A stable word; `docs` explains it."""
    fix: str | None = None
    """What to do about it."""
    docs: str | None = None
    request_id: str | None = None
    errors: list[dict[str, Any]] = []
    """Where there are several: each of them."""


class ErrorOut(BaseModel):
    """OpenAI's envelope, with `fix`, `docs`, `request_id` and `errors` beside its four keys."""

    error: Problem


def unix(moment: datetime) -> int:
    return int(moment.timestamp())


def unix_or_none(moment: datetime | None) -> int | None:
    return None if moment is None else unix(moment)


def _unstorable(value: Any) -> str | None:
    """JSON allows, and Python's parser lets through, what Postgres cannot keep. Walked without recursion."""
    todo = [value]
    while todo:
        match todo.pop():
            case str() as text if "\0" in text or not _encodable(text):
                return "a text holds a NUL or half a surrogate pair"
            case float() as number if not math.isfinite(number):
                return "NaN and Infinity are not JSON"
            case dict() as pairs:
                todo += [*pairs.keys(), *pairs.values()]
            case list() as items:
                todo += items
    return None


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
