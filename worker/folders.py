"""Folders that a trainer may change while we look at them: walked step by step, through no link, held by descriptor.

The supervisor may be root and the trainer's folders are the trainer's to rename. A path that was harmless when it was
checked may lead anywhere when it is used, so nothing here is checked first and used later.
"""

import errno
import os
import shutil
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePath

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # a pipe that nobody writes to must not hold us


@contextmanager
def opened(root: Path, path: str) -> Iterator[int]:
    """A descriptor of the folder `path` below `root`. Raises OSError, also where a link lies on the way."""
    descriptor = _walk(os.open(root, _FOLDER), _parts(root, path))
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def opened_file(folder: int, name: str) -> Iterator[int]:
    """A descriptor of a file below an open folder. Raises OSError for whatever is no regular file."""
    *way, last = PurePath(name).parts
    parent = _walk(os.dup(folder), way)
    try:
        descriptor = os.open(last, _FILE, dir_fd=parent)
    finally:
        os.close(parent)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "is no file", name)
        yield descriptor
    finally:
        os.close(descriptor)


def remove(root: Path, path: str) -> None:
    """Remove the folder `path` below `root`, as far as it can be; never through a link."""
    with suppress(OSError):
        *way, last = _parts(root, path)
        parent = _walk(os.open(root, _FOLDER), way)
        try:
            shutil.rmtree(last, ignore_errors=True, dir_fd=parent)
        finally:
            os.close(parent)


def _parts(root: Path, path: str) -> Sequence[str]:
    """The steps from `root` to `path`; at least one. Raises OSError if it does not lead down."""
    named = PurePath(path)
    for base in (root, root.resolve()):
        if named.is_relative_to(base) and (parts := named.relative_to(base).parts) and ".." not in parts:
            return parts
    raise OSError(errno.EXDEV, "leads out of the workspace", path)


def _walk(start: int, parts: Sequence[str]) -> int:
    """From an open folder, which is closed, to one below it."""
    for part in parts:
        try:
            below = os.open(part, _FOLDER, dir_fd=start)
        finally:
            os.close(start)
        start = below
    return start
