"""Health that tells the truth: the process lives (always said), and what it needs answers (asked, never remembered).

A part that hangs makes the answer late by its timeout at most; a part that is not required makes it `degraded`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tunery.telemetry.asking import Asked, Late


class NotReady(Exception):
    """A part does not work; the text is shown, so it holds no URL and no secret."""


@dataclass(frozen=True)
class Part:
    """Something a program needs. `ask` raises when it does not work; what it returns is shown."""

    name: str
    ask: Callable[[], str | None]
    required: bool = True


@dataclass(frozen=True)
class Report:
    status: str
    """`ready`, `degraded` (ready, but something that is not required fails) or `not ready`."""
    parts: dict[str, str]
    failing: frozenset[str]
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def ready(self) -> bool:
        return self.status != "not ready"

    def body(self) -> dict[str, Any]:
        return {"status": self.status, "parts": self.parts, **self.more}


class Health:
    """Asks every part at the same time. `more` is what else a program tells about itself."""

    def __init__(self, parts: list[Part], more: Callable[[], Mapping[str, Any]] = dict) -> None:
        self._parts = [(part, Asked(part.ask)) for part in parts]
        self._more = more
        self._draining = False

    def drain(self) -> None:
        """The program is about to stop: send it nothing new."""
        self._draining = True

    def report(self) -> Report:
        for _, asked in self._parts:
            asked.begin()
        said, failing, required = {}, set(), self._draining
        for part, asked in self._parts:
            try:
                said[part.name] = asked.get() or "ok"
            except Exception as error:  # noqa: BLE001 - whatever it is, the part does not work; its text may hold a URL
                said[part.name] = str(error) if isinstance(error, NotReady | Late) else f"failed ({_kind(error)})"
                failing.add(part.name)
                required |= part.required
        if self._draining:
            said["process"] = "stopping"
        status = "not ready" if required else "degraded" if failing else "ready"
        return Report(status, said, frozenset(failing), dict(self._more()))


def _kind(error: Exception) -> str:
    return type(error.__cause__ or error).__name__
