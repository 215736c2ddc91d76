"""Cursor pages as OpenAI's client turns them: the next page begins after the id of this one's last element."""

import uuid
from collections.abc import Callable, Sequence
from typing import Annotated, Any, TypeVar

from fastapi import Query

from api.schemas.common import Page
from tunery import ids
from tunery.errors import NotFound

T = TypeVar("T")
O = TypeVar("O")  # noqa: E741

After = Annotated[str | None, Query(description="Id of the last element of the page before.")]
_FIRST, _LAST = uuid.UUID(int=0), uuid.UUID(int=2**128 - 1)


def limit_query(maximum: int) -> Any:
    """0 means the default, as OpenAI's own tests expect."""
    return Query(ge=0, le=maximum, description=f"How many at most, 1 to {maximum}; 0 or absent: the default.")


def cursor(prefix: str, after: str | None, *, ascending: bool = False) -> uuid.UUID | None:
    """Where to go on. After what is no id of this kind comes nothing: an empty page, no error, and no first page
    again, which would turn a client's loop into an endless one."""
    if not after:
        return None
    try:
        return ids.decode(prefix, after)
    except NotFound:
        return _LAST if ascending else _FIRST


def page(rows: Sequence[T], more: bool, show: Callable[[T], Any]) -> Page[Any]:
    return of([show(row) for row in rows], more)


def of(data: list[O], more: bool) -> Page[O]:
    shown: list[Any] = data
    first, last = (shown[0].id, shown[-1].id) if shown else (None, None)
    return Page[Any](data=shown, has_more=more, first_id=first, last_id=last)
