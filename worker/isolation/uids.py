"""One uid for each trainer that runs. Held by a lock that the kernel lets go of, so no crash leaks one."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from worker import locks

_SHARED = Path("/run/tunery/uids")
"""Two nodes on one host must not give the same uid to two trainers."""


class NoUid(OSError):
    """Every uid of the range is taken."""


@dataclass(frozen=True)
class HeldUid:
    """A uid, which is its own group too, for as long as this is open."""

    uid: int
    _lock: IO[str]

    def release(self) -> None:
        self._lock.close()


def take(span: str, home: Path) -> HeldUid:
    """The first free uid of a span such as `60800-60863`.

    Raises:
        NoUid: every one is in use, by a trainer or by whatever else runs under it.
    """
    first, _, last = span.partition("-")
    folder = _folder(home)
    for uid in range(int(first), int(last or first) + 1):
        try:
            lock = locks.take(folder / f"{uid}.lock")
        except locks.Taken:
            continue
        if _is_used(uid):
            lock.close()
            continue
        return HeldUid(uid, lock)
    raise NoUid(f"every uid of TUNERY_TRAINER_UIDS={span} is in use")


@contextmanager
def of_the_dead(uid: int | None, home: Path) -> Iterator[int | None]:
    """The uid of a trainer whose supervisor is gone, for as long as nobody else may take it; None if one has.

    Whoever took it found no process of it, so nothing of the dead one is left; what runs under it now is another's.
    """
    if uid is None:
        yield None
        return
    try:
        lock = locks.take(_folder(home) / f"{uid}.lock")
    except locks.Taken:
        yield None
        return
    with lock:
        yield uid


def _folder(home: Path) -> Path:
    for folder in (_SHARED, home / "uids"):
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK):
            return folder
    raise NoUid(f"neither {_SHARED} nor {home} can be written")


def _is_used(uid: int) -> bool:
    for entry in os.scandir("/proc"):
        try:
            if entry.name.isdigit() and entry.stat().st_uid == uid:
                return True
        except FileNotFoundError:
            continue
    return False
