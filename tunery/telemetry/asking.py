"""Asking something that may hang: on a thread of its own, never twice at once, with a limit for whoever waits."""

import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Late(Exception):
    """No answer in time."""


class Asked(Generic[T]):
    """One question. An answer, or the exception that came instead, is kept for `keep_s`."""

    def __init__(self, ask: Callable[[], T], *, timeout_s: float = 1.5, keep_s: float = 1.0) -> None:
        self._ask, self.timeout_s, self._keep_s = ask, timeout_s, keep_s
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._running = False
        self._began = self._ended = float("-inf")
        self._answer: T | None = None
        self._error: Exception | None = None

    def begin(self) -> None:
        """Ask, unless the answer is fresh or still under way. Returns at once."""
        with self._lock:
            if self._running or time.monotonic() - self._ended < self._keep_s:
                return
            self._running, self._began = True, time.monotonic()
            self._done.clear()
        threading.Thread(target=self._run, name="asking", daemon=True).start()

    def get(self) -> T:
        """The answer.

        Raises:
            Late: none within `timeout_s` of the question; whoever asks while it still hangs is told at once.
        """
        self.begin()
        if not self._done.wait(max(0.0, self._began + self.timeout_s - time.monotonic())):
            raise Late(f"no answer in {self.timeout_s:g} s")
        if self._error is not None:
            raise self._error
        return self._answer  # type: ignore[return-value] - set together with _done

    def _run(self) -> None:
        answer, error = None, None
        try:
            answer = self._ask()
        except Exception as problem:  # noqa: BLE001 - handed to whoever asks
            error = problem.with_traceback(None)
        with self._lock:
            self._answer, self._error = answer, error
            self._running, self._ended = False, time.monotonic()
            self._done.set()
