"""A request that lost a deadlock, or a race between transactions, is run again: nothing of it was written.

In plain ASGI, around the whole app: whatever a route has read, locked or changed is given up with its transaction, and
a second run begins where the first did. What has sent a large body or a file is not run again, nor is a machine that
joins: those do more than one transaction.
"""

import random
from collections.abc import Mapping
from typing import Any

import anyio
import structlog
from sqlalchemy.exc import DBAPIError
from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = structlog.get_logger(__name__)

MOST = 3
_PAUSE_S = 0.05
_LOST = ("40001", "40P01")
"""SQLSTATEs: serialization failure, deadlock."""
_FOUND = ("route", "path_params", "state")
"""What the router and the route leave in the scope, for the log, the metrics and the trace around us."""
_MARK = "tunery.lost_a_race"


def note(scope: Mapping[str, Any], error: object) -> None:
    """Remember that this answer stands for a transaction which may succeed if it is run again."""
    if isinstance(error, DBAPIError) and getattr(error.orig, "sqlstate", None) in _LOST and _MARK in scope:
        scope[_MARK].append(True)


class Retry:
    """Runs a request up to `MOST` times again, with growing pauses, each a little different from any other's."""

    def __init__(self, app: ASGIApp, *, once: frozenset[tuple[str, str]]) -> None:
        self._app, self._once = app, once

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or (scope["method"], scope["path"]) in self._once:
            await self._app(scope, receive, send)
            return
        heard: list[Message] = []
        for number in range(MOST + 1):
            run = _Run(heard, receive, send, last=number == MOST)
            fresh = {**scope, "state": dict(scope.get("state", {})), _MARK: run.lost}
            await self._app(fresh, run.receive, run.send)
            if not run.withheld:
                scope.update({name: fresh[name] for name in _FOUND if name in fresh})
                return
            log.warning("a transaction lost a race; the request is run again", again=number + 1)
            await anyio.sleep(_PAUSE_S * 2**number * random.uniform(0.5, 1.5))  # noqa: S311 - no secret


class _Run:
    """One run: hears what was heard before, then what comes; keeps back an answer that says only `try again`."""

    def __init__(self, heard: list[Message], receive: Receive, send: Send, *, last: bool) -> None:
        self._heard, self._receive, self._send, self._last = heard, receive, send, last
        self._at = 0
        self.lost: list[bool] = []
        self.withheld = False

    async def receive(self) -> Message:
        if self._at == len(self._heard):
            self._heard.append(await self._receive())
        self._at += 1
        return self._heard[self._at - 1]

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start" and self.lost and not self._last:
            self.withheld = True
        if not self.withheld:
            await self._send(message)
