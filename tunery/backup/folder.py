"""What a backup looks like on disk.

manifest.json          what the backup is; written last, so that a folder without one is no backup
database-<id>.dump     pg_dump's custom format
objects/<key>          one file an object
secrets.json           only when asked for
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tunery.embedded.home import write_private
from tunery.embedded.problems import Refused

FORMAT = 1


@dataclass(frozen=True)
class Entry:
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """`objects` by key. `lost`: what rows refer to and the store no longer had."""

    id: str
    created_at: str
    tunery: str
    schema: str
    postgres: int
    """Major version of the server."""
    dump: str
    dump_sha256: str
    counts: dict[str, int]
    objects: dict[str, Entry]
    lost: list[str] = field(default_factory=list)
    pepper_check: str | None = None
    """Tells whether a pepper is the one that this backup's API keys need, without telling the pepper."""
    format: int = FORMAT


class Folder:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.manifest_file, self.secrets_file = root / "manifest.json", root / "secrets.json"
        self.objects = root / "objects"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """One at a time. Raises Refused."""
        self.root.mkdir(parents=True, exist_ok=True)
        self.root.chmod(0o700)  # every tenant's data
        self.objects.mkdir(exist_ok=True)
        with (self.root / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Refused(
                    f"{self.root} is in use", why="Another backup writes to it.", fix="wait, or name another folder"
                ) from None
            yield

    def refuse_strangers(self) -> None:
        """Raises Refused where something else lies: pruning would delete it."""
        if self.root.exists() and not self.manifest_file.exists():
            known = {".lock", "objects", "secrets.json"}
            for path in self.root.iterdir():
                if path.name not in known and not path.name.startswith("database-"):
                    raise Refused(
                        f"{self.root} holds other things",
                        why=f"{path.name} is not part of a backup.",
                        fix="name a new folder, or one that holds a backup already",
                    )

    def place(self, key: str) -> Path:
        """Where an object lies. Raises Refused for a key that would leave the folder."""
        path = (self.objects / key).resolve()
        if not path.is_relative_to(self.objects.resolve()) or path == self.objects.resolve():
            raise Refused(f"the key {key!r} leaves the folder", why="No object of ours has one.", fix="look at it")
        return path

    def read(self) -> Manifest:
        """Raises Refused: there is none, or it is not readable by this release."""
        try:
            found: dict[str, Any] = json.loads(self.manifest_file.read_text())
        except FileNotFoundError:
            raise Refused(
                f"{self.root} holds no backup",
                why="There is no manifest.json: it is written when a backup is complete.",
                fix=f"tunery backup {self.root}",
            ) from None
        except ValueError as error:
            raise Refused(f"{self.manifest_file} is damaged", why=str(error), fix="take another backup") from error
        if found.get("format") != FORMAT:
            raise Refused(
                f"{self.root} was made by another release",
                why=f"Its format is {found.get('format')}; this release reads {FORMAT}.",
                fix=f"restore it with Tunery {found.get('tunery')}, then upgrade",
            )
        objects = {key: Entry(**entry) for key, entry in found.pop("objects").items()}
        return Manifest(objects=objects, **found)

    def previous(self) -> dict[str, Entry]:
        """Objects of the backup that lies here already."""
        return self.read().objects if self.manifest_file.exists() else {}

    def write(self, manifest: Manifest) -> None:
        write_private(self.manifest_file, json.dumps(asdict(manifest), indent=1))
        descriptor = os.open(self.root, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)

    def prune(self, manifest: Manifest) -> None:
        """Delete what only an older backup in this folder needed."""
        wanted = {self.place(key) for key in manifest.objects}
        for path in sorted(self.objects.resolve().rglob("*"), reverse=True):
            if path.is_file() and path not in wanted:
                path.unlink()
            elif path.is_dir() and not any(path.iterdir()):
                path.rmdir()
        for dump in self.root.glob("database-*"):
            if dump.name != manifest.dump:
                dump.unlink()

    def secrets(self) -> dict[str, str]:
        return json.loads(self.secrets_file.read_text()) if self.secrets_file.exists() else {}


def sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def is_whole(path: Path, entry: Entry) -> bool:
    """Whether the file is there, with the right bytes."""
    return path.is_file() and path.stat().st_size == entry.bytes and sha256(path) == entry.sha256
