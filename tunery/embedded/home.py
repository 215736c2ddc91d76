"""The state folder: one flock, `state.json`, `secrets.json`, logs, and the servers' data."""

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tunery.embedded.identity import RunAs
from tunery.embedded.problems import Refused

CHECKOUT = Path(__file__).resolve().parents[2]
UNREACHABLE_DATA = Path("/var/lib/tunery/homes")
"""Where a root user's data lie when the home itself is below a folder that only root may enter."""
_DATA_ENTRIES = ("pg", "valkey", "s3", "runtime", "node")
_HOME_ENTRIES = ("state.json", "secrets.json", "client.json", "node.env", "lock", "logs", *_DATA_ENTRIES)


def default_home(environ: Mapping[str, str]) -> Path:
    """`TUNERY_HOME`, else `.tunery` of a checkout, else the user's data folder."""
    if named := environ.get("TUNERY_HOME"):
        return Path(named).expanduser().absolute()
    if is_checkout(CHECKOUT):
        return CHECKOUT / ".tunery"
    if os.geteuid() == 0:
        return Path("/var/lib/tunery")
    base = environ.get("XDG_DATA_HOME") or Path.home() / ".local/share"
    return Path(base) / "tunery"


def is_checkout(folder: Path) -> bool:
    try:
        return 'name = "tunery"' in (folder / "pyproject.toml").read_text()
    except OSError:
        return False


class Home:
    """One deployment on this machine. Nothing is made on disk until `create`."""

    def __init__(self, root: Path, run_as: RunAs | None = None) -> None:
        self.root = root
        self.run_as = run_as or RunAs()
        self.state_file, self.secrets_file = root / "state.json", root / "secrets.json"
        self.logs, self.profile, self.lock_file = root / "logs", root / "client.json", root / "lock"

    @property
    def data(self) -> Path:
        """The servers' and the node's folder: the home, unless the servers' user cannot walk down to it."""
        if remembered := self.state().get("data"):
            return Path(remembered)
        if (self.root / "pg").exists() or self.run_as.can_reach(self.root.parent):
            return self.root
        return UNREACHABLE_DATA / hashlib.sha256(os.fsencode(self.root)).hexdigest()[:12]

    @property
    def node(self) -> Path:
        return self.data / "node"

    def create(self) -> None:
        """0711: the servers' user walks through the home to its own folders, and reads nothing in it."""
        data = self.data
        for folder in (data, self.root):
            folder.mkdir(parents=True, exist_ok=True)
            folder.chmod(0o711)
        for folder in (self.logs, self.node):
            folder.mkdir(exist_ok=True)
        self.logs.chmod(0o700)
        self.node.chmod(0o711)  # a trainer's own uid walks through it too
        if data != self.root:
            self.update_state(data=str(data))

    def owned_folder(self, name: str) -> Path:
        """A 0700 folder that belongs to the servers' user."""
        folder = self.data / name
        folder.mkdir(exist_ok=True)
        folder.chmod(0o700)
        self.run_as.own(folder)
        return folder

    def owned_file(self, path: Path, text: str) -> None:
        """A 0600 file of the servers' user."""
        write_private(path, text, self.run_as)

    def state(self) -> dict[str, Any]:
        return _read_json(self.state_file)

    def update_state(self, **changes: object) -> None:
        write_private(self.state_file, json.dumps(self.state() | changes, indent=1))

    def secrets(self) -> "Secrets":
        return Secrets(self.secrets_file)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Held by the one supervisor of this home; the file holds its pid, which is worth reading only while held."""
        descriptor = os.open(self.lock_file, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            if not _lock_soon(descriptor):
                raise AlreadyRunning(self.holder())
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, str(os.getpid()).encode(), 0)
            yield
        finally:
            os.close(descriptor)

    def holder(self) -> int | None:
        """The pid of the supervisor that runs now. A free lock means none, whatever number a dead one left."""
        try:
            descriptor = os.open(self.lock_file, os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return int(os.pread(descriptor, 32, 0) or b"0") or None
        else:
            return None
        finally:
            os.close(descriptor)

    def purge(self) -> None:
        """Delete what we made and nothing else: `TUNERY_HOME` may by mistake name a folder with other things in it."""
        data = self.data
        for folder, names in ((data, _DATA_ENTRIES), (self.root, _HOME_ENTRIES)):
            for name in names:
                _delete(folder / name)
            with contextlib.suppress(OSError):  # other people's files stay, and so does the folder then
                folder.rmdir()


class AlreadyRunning(Refused):
    def __init__(self, pid: int | None) -> None:
        super().__init__(
            f"tunery is already running here (pid {pid})",
            why="One supervisor at a time may own a home: two would start two Postgres over the same files.",
            fix="tunery status, or tunery down to stop it; TUNERY_HOME=<another folder> for a second deployment",
        )
        self.pid = pid


class Secrets:
    """Generated once, kept in one 0600 file, handed to children through their environment or their own 0600 files."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def get(self, name: str) -> str | None:
        return _read_json(self.path).get(name)

    def all(self) -> dict[str, str]:
        return _read_json(self.path)

    def made(self, name: str, size: int = 32) -> str:
        """The secret of that name, made at first use. URL-safe, so that it stands in a URL as it is."""
        if (found := self.get(name)) is not None:
            return found
        value = secrets.token_urlsafe(size)
        self.put(name, value)
        return value

    def put(self, name: str, value: str) -> None:
        write_private(self.path, json.dumps(_read_json(self.path) | {name: value}, indent=1))


def write_private(path: Path, text: str, run_as: RunAs | None = None) -> None:
    """Written whole or not at all, and never readable by others, not even for a moment."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    if run_as is not None:
        run_as.own(draft)
    draft.replace(path)


def _lock_soon(descriptor: int) -> bool:
    """A `status` at the same moment holds a shared lock for an instant: that is not a supervisor."""
    for _ in range(5):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.05)
        else:
            return True
    return False


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise Refused(
            f"{path} is not valid JSON",
            why=str(error),
            fix=f"repair the file, or move it away; without secrets.json the data beside it cannot be opened: {path}",
        ) from error


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
