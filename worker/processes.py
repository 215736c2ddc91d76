"""Finding and ending processes. Every process of an attempt carries `TUNERY_ATTEMPT=<id>` in its environment."""

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

ATTEMPT = "TUNERY_ATTEMPT"
_LIBC = ctypes.CDLL(None, use_errno=True)
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def die_with_parent() -> Callable[[], None]:
    """For `preexec_fn`: SIGKILL when the parent thread goes, even if it went before we could ask."""
    parent = os.getpid()

    def arrange() -> None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)

    return arrange


def follow(parent: int) -> None:
    """From inside a child: SIGKILL when `parent` goes, or at once if it already has."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def become_subreaper() -> None:
    """Orphaned grandchildren become our children, so that they can be found and waited for."""
    _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1)


def marked(attempt_id: str) -> list[int]:
    """Living processes of an attempt. torchrun gives each rank a group of its own, so groups are not enough."""
    mark = f"{ATTEMPT}={attempt_id}".encode()
    return [pid for pid, environment in _environments() if mark in environment.split(b"\0")]


def of_uid(uid: int) -> list[int]:
    """Living processes of a uid that one trainer has for itself: it may have cleared its environment."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and entry.stat().st_uid == uid and not _is_zombie(entry):
                found.append(int(entry.name))
    return found


def end_all(attempt_id: str, timeout_s: float = 10, uid: int | None = None) -> bool:
    """SIGKILL everything of an attempt and wait until it is gone. False if something would not die in time.

    `uid` is the trainer's own, where it had one. A process in uninterruptible sleep (a dead disk, a GPU driver call)
    can outlive the signal for a while.
    """
    deadline = time.monotonic() + timeout_s
    while pids := {*marked(attempt_id), *(of_uid(uid) if uid is not None else ())}:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        reap()
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def reap() -> None:
    """Collect children that have ended; as a subreaper we are the only one who can."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _environments() -> list[tuple[int, bytes]]:
    mine, found = os.getpid(), []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == mine:
            continue
        with contextlib.suppress(OSError):
            environment = (entry / "environ").read_bytes()
            if environment and not _is_zombie(entry):
                found.append((int(entry.name), environment))
    return found


def _is_zombie(entry: Path) -> bool:
    return (entry / "stat").read_text().rpartition(")")[2].split()[0] in ("Z", "X")
