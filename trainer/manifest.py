"""Folders with hashes: what checkpoints, outputs and base models have in common. No torch here."""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from tunery import failpoints
from tunery.contracts.events import FileEntry


def entry_of(root: Path, file: Path) -> FileEntry:
    """Hash one file of `root`."""
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return FileEntry(name=file.relative_to(root).as_posix(), bytes=file.stat().st_size, sha256=digest)


def entries_of(root: Path, *, without: Iterable[str] = ()) -> list[FileEntry]:
    """Hash every file under `root`, sorted by name, except the names in `without`."""
    skipped = frozenset(without)
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return [entry_of(root, path) for path in files if path.relative_to(root).as_posix() not in skipped]


def publish(temporary: Path, final: Path) -> None:
    """Make `temporary` appear as `final` in one step that survives a power cut: fsync each file, rename, fsync.

    Others may read it afterwards: worker and trainer can be two users, and safetensors writes with mode 0600.

    Raises:
        OSError: `final` exists and is not an empty folder.
    """
    for path in [*temporary.rglob("*"), temporary]:
        path.chmod(0o755 if path.is_dir() else 0o644)
        _fsync(path)
    failpoints.reach("folder.synced")
    temporary.rename(final)
    _fsync(final.parent)
    failpoints.reach("folder.renamed")


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
