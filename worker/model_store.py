"""Base models on this node's disk: brought from the object store once, hashed, then only read."""

import shutil
import stat
from pathlib import Path
from typing import Any

from tunery.storage import Storage
from worker import locks

_DONE = "COMPLETE"


def ensure(store: Path, storage: Storage, base_model_id: object, prefix: str, card: dict[str, Any]) -> Path:
    """The model's folder, complete. Attempts that need the same model wait for one download.

    Raises:
        storage.CorruptObject: a file does not have the hash that the catalogue recorded.
        errors.Unavailable: the object store does not answer.
    """
    folder = store / str(base_model_id)
    if (folder / _DONE).exists():
        _open_to_trainers(folder)
        return folder
    with locks.take(store / f"{base_model_id}.lock", wait=True):
        if (folder / _DONE).exists():
            return folder
        part = store / f"{base_model_id}.part"
        part.mkdir(parents=True, exist_ok=True)
        for file in card["files"]:
            path = part / file["name"]
            if not path.exists():  # what an earlier try finished is kept: a file appears only once its hash is right
                path.parent.mkdir(parents=True, exist_ok=True)
                storage.fetch(f"{prefix}/{file['name']}", path, file["sha256"])
        (part / _DONE).touch()
        _open_to_trainers(part)
        part.rename(folder)
    return folder


def adopt(store: Path, base_model_id: object, source: Path) -> None:
    """Keep an import that was just made here: nothing needs to be downloaded on this node."""
    with locks.take(store / f"{base_model_id}.lock", wait=True):
        folder = store / str(base_model_id)
        if folder.exists():
            shutil.rmtree(source)
            return
        (source / _DONE).touch()
        _open_to_trainers(source)
        source.rename(folder)


def _open_to_trainers(folder: Path) -> None:
    """Whatever umask made these files: a trainer with a uid of its own reads them too."""
    for path in (folder.parent, folder, *folder.rglob("*")):
        least = 0o755 if path.is_dir() else 0o644
        if (mode := stat.S_IMODE(path.stat().st_mode)) | least != mode:
            path.chmod(mode | least)
