"""Locks that a crash releases: flock on a file, held by the process that opened it."""

import fcntl
from pathlib import Path
from typing import IO


class Taken(Exception):
    """Another process holds the lock."""


def take(path: Path, *, wait: bool = False) -> IO[str]:
    """Hold the lock until the returned file is closed or this process ends. Raises Taken unless `wait`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        file.close()
        raise Taken(str(path)) from None
    return file


def is_taken(path: Path) -> bool:
    """Does a living process hold it?"""
    if not path.exists():
        return False
    try:
        take(path).close()
    except Taken:
        return True
    return False
