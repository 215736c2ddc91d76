"""Which unprivileged user the servers run as. Postgres refuses root, and the other two need none of its rights."""

import ctypes
import os
import pwd
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunery.embedded.problems import Refused

DEFAULT_USER = "nobody"
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(
    None, use_errno=True
)  # loaded before any fork: a child of a threaded parent must not load libraries


@dataclass(frozen=True)
class RunAs:
    """A uid to drop to, or nothing at all when we are not root."""

    uid: int | None = None
    gid: int | None = None

    def popen(self) -> dict[str, Any]:
        """Arguments for `subprocess` that make the drop, supplementary groups included."""
        return {} if self.uid is None else {"user": self.uid, "group": self.gid, "extra_groups": []}

    def own(self, path: Path) -> None:
        if self.uid is not None and self.gid is not None:
            os.chown(path, self.uid, self.gid)

    def can_reach(self, folder: Path) -> bool:
        """Whether that user may walk down to `folder`; a clone under root's own 0700 home cannot be reached."""
        if self.uid is None:
            return True
        folder = folder.resolve()
        existing = [each for each in (folder, *folder.parents) if each.exists()]
        return all(_may_enter(each, self.uid, self.gid) for each in existing)


def run_as(name: str | None) -> RunAs:
    """The user named by `TUNERY_RUN_AS`, else `nobody`; only root can and has to choose."""
    if os.geteuid() != 0:
        return RunAs()
    wanted = name or DEFAULT_USER
    try:
        entry = pwd.getpwuid(int(wanted)) if wanted.isdigit() else pwd.getpwnam(wanted)
    except KeyError:
        raise Refused(
            f"there is no user {wanted!r} to run the servers as",
            why="Postgres refuses to run as root, and initdb wants a uid with a name in the password file.",
            fix="TUNERY_RUN_AS=<an existing unprivileged user>",
        ) from None
    if entry.pw_uid == 0:
        raise Refused(
            "the servers cannot run as root",
            why="Postgres refuses it, and the others should not.",
            fix="TUNERY_RUN_AS=<an existing unprivileged user>, or leave it unset for nobody",
        )
    return RunAs(entry.pw_uid, entry.pw_gid)


def die_with_parent(signal_number: int) -> Callable[[], None]:
    """For `preexec_fn`: Linux sends the signal when the thread that started the child ends.

    It runs after the uid change, which would clear it. Elsewhere there is no such thing, and an orderly stop is
    all there is.
    """
    parent = os.getpid()

    def arm() -> None:
        if sys.platform == "linux":
            _LIBC.prctl(_PR_SET_PDEATHSIG, signal_number, 0, 0, 0)
            if os.getppid() != parent:  # the parent died between the fork and the line above
                os._exit(1)

    return arm


def _may_enter(folder: Path, uid: int, gid: int | None) -> bool:
    found = folder.stat()
    if found.st_uid == uid:
        return bool(found.st_mode & 0o100)
    return bool(found.st_mode & (0o010 if found.st_gid == gid else 0o001))
