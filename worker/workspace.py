"""One attempt's folder: its rows, its spec, its checkpoint to continue from. Gone when the attempt is."""

import os
import shutil
import stat
import tempfile
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunery import __version__, ids
from tunery.contracts.spec import BaseModelRef, DataRef, Lineage, Recipe, TrainingSpec
from tunery.storage import Storage
from worker import model_store

_MAX_SOCKET_PATH = 100
"""sockaddr_un holds 108 bytes on Linux."""
_GIVEN = 0o1770
"""Mode of a workspace whose group is its trainer's uid."""


@dataclass(frozen=True)
class StoredFiles:
    """Objects below a prefix, with the hashes that the database recorded."""

    prefix: str
    files: list[dict[str, Any]]


@dataclass(frozen=True)
class Work:
    """Everything a supervisor read about its attempt when it claimed it."""

    attempt_id: uuid.UUID
    attempt_no: int
    fence: int
    job_id: uuid.UUID
    project_id: uuid.UUID
    recipe: Recipe
    model_name: str
    base_id: uuid.UUID
    base: dict[str, Any]
    """The catalogue's card, with `name`."""
    base_prefix: str
    """Where its files lie in the object store."""
    train: tuple[str, str]
    """Object key and sha256 of the checked rows."""
    validation: tuple[str, str] | None
    training_file: uuid.UUID
    validation_file: uuid.UUID | None
    resume: StoredFiles | None
    start_step: int
    platform: dict[str, Any]
    devices: tuple[tuple[str, str], ...]
    """Kind and driver UUID of each device."""
    engine_socket: str | None
    traceparent: str | None
    """Of the span that assigned it."""


class Workspace:
    """Paths of one attempt's folder, and making and removing it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.spec = root / "spec.json"
        self.log = root / "trainer.log"
        self.checkpoints = root / "checkpoints"
        self.output = root / "output"
        self.socket, self._socket_folder = _socket_path(root)

    def build(self, work: Work, storage: Storage, store: Path) -> None:
        """Fetch what the attempt needs and write its spec.

        Raises:
            storage.CorruptObject, errors.Unavailable, OSError (a full disk).
        """
        for folder in ("data", "checkpoints", "tmp"):
            (self.root / folder).mkdir(parents=True, exist_ok=True)
        if self._socket_folder is not None:
            self._socket_folder.mkdir(mode=0o700, exist_ok=True)
            self.socket.unlink(missing_ok=True)
        train = self._rows(storage, "train", work.train)
        validation = self._rows(storage, "valid", work.validation) if work.validation else None
        base = model_store.ensure(store, storage, work.base_id, work.base_prefix, work.base)
        resume = self._checkpoint(storage, work) if work.resume else None
        spec = TrainingSpec(
            socket=str(self.socket),
            base=BaseModelRef(path=str(base), **{name: work.base[name] for name in _BASE_FIELDS}),
            data=DataRef(
                train=str(train),
                validation=str(validation) if validation else None,
                train_sha256=work.train[1],
                validation_sha256=work.validation[1] if work.validation else None,
            ),
            recipe=work.recipe,
            lineage=_lineage(work),
            resume=str(resume) if resume else None,
            checkpoints=str(self.checkpoints),
            output=str(self.output),
        )
        self.spec.write_text(spec.model_dump_json(indent=2))

    def given(self) -> list[Path]:
        """What the trainer reads and must not change; the log is the supervisor's to write and to upload."""
        return [self.root / "data", self.root / "resume", self.spec, self.log]

    def writable(self) -> list[Path]:
        return [self.root, *([self._socket_folder] if self._socket_folder else [])]

    def give(self, uid: int) -> None:
        """To a trainer with a uid of its own. It makes files here, but cannot rename or remove ours: sticky."""
        os.chown(self.root, -1, uid)
        self.root.chmod(_GIVEN)
        for folder in (self.checkpoints, self.root / "tmp", self.socket, self._socket_folder):
            if folder is not None:
                os.chown(folder, uid, uid)
        for path in (self.root / "data", self.root / "resume", self.spec):
            for each in (path, *path.rglob("*")) if path.exists() else ():
                os.chown(each, -1, uid)
                each.chmod(0o750 if each.is_dir() else 0o640)

    def holds(self, path: str) -> bool:
        """Whether a folder that the trainer named is in its own workspace, wherever its links lead."""
        found, root = Path(path).resolve(), self.root.resolve()
        return found != root and found.is_relative_to(root)

    def owner(self) -> int | None:
        """The uid that it was given to; None if it is still ours, or gone.

        Told by the folder's own group, which a trainer cannot change: what lies in it is the trainer's to replace.
        """
        try:
            found = self.root.lstat()
        except OSError:
            return None
        return found.st_gid if stat.S_IMODE(found.st_mode) == _GIVEN else None

    def remove(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)
        if self._socket_folder is not None:
            shutil.rmtree(self._socket_folder, ignore_errors=True)

    def _rows(self, storage: Storage, name: str, stored: tuple[str, str]) -> Path:
        path = self.root / "data" / f"{name}.jsonl"
        storage.fetch(stored[0], path, stored[1])
        return path

    def _checkpoint(self, storage: Storage, work: Work) -> Path:
        folder = self.root / "resume"
        assert work.resume is not None
        for file in work.resume.files:
            path = folder / file["name"]
            path.parent.mkdir(parents=True, exist_ok=True)
            storage.fetch(f"{work.resume.prefix}/{file['name']}", path, file["sha256"])
        return folder


_BASE_FIELDS = ("name", "hub_id", "revision", "source", "license", "parameters")


def _lineage(work: Work) -> Lineage:
    return Lineage(
        project_id=ids.encode(ids.PROJECT, work.project_id),
        job_id=ids.encode(ids.JOB, work.job_id),
        attempt_id=ids.encode(ids.ATTEMPT, work.attempt_id),
        attempt_no=work.attempt_no,
        model_name=work.model_name,
        training_file=ids.encode(ids.FILE, work.training_file),
        validation_file=ids.encode(ids.FILE, work.validation_file) if work.validation_file else None,
        tunery_version=work.platform.get("tunery") or __version__,
        lock_sha256=work.platform.get("lock_sha256"),
        image=work.platform.get("image"),
    )


def _socket_path(root: Path) -> tuple[Path, Path | None]:
    """Inside the workspace where its path is short enough, else in a folder of its own under the temporary one."""
    path = root / "trainer.sock"
    if len(str(path).encode()) <= _MAX_SOCKET_PATH:
        return path, None
    folder = Path(tempfile.gettempdir()) / f"tunery-{root.name}"
    return folder / "s", folder
