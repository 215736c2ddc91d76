"""A way to put walls around a trainer, and the command that starts a program behind them."""

import json
import marshal
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self

from worker.isolation import sight, syscalls

LAUNCHER = Path(__file__).with_name("launcher.py")


@dataclass(frozen=True)
class Way:
    """Which walls go up, and by whom. All false: only what any process may do to itself."""

    own_uid: bool = False
    user_namespace: bool = False
    """An ordinary user's way to the namespaces below."""
    network: bool = False
    processes: bool = False
    view: Literal["closed", "open"] | None = None
    """`closed`: only named paths exist. `open`: all is read-only, and named paths are hidden."""
    bubblewrap: str | None = None
    """Path of the program that makes the namespaces, where it can and we cannot."""
    keep_network: bool = False
    """For the one program that fetches models: neither a namespace nor a filter takes its sockets."""

    def as_text(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_text(cls, text: str) -> Self:
        return cls(**json.loads(text))


@dataclass(frozen=True)
class Program:
    """What to start, and what it needs."""

    argv: Sequence[str]
    cwd: Path
    scratch: Path
    """An empty folder; with the closed view the new root is mounted on it, and it becomes the program's `/tmp`."""
    marks: Mapping[str, str] = field(default_factory=dict)
    """Set in the program's environment and in no launcher's."""
    readable: Sequence[str] = ()
    writable: Sequence[str] = ()
    hidden: Sequence[str] = ()
    devices: Sequence[str] = ()
    limits: Mapping[str, int] = field(default_factory=dict)
    uid: int | None = None


def command(way: Way, program: Program) -> list[str]:
    """The command line that starts `program` this way. No secret is in it: it names paths and limits."""
    plan: dict[str, Any] = {
        "argv": list(program.argv),
        "cwd": str(program.cwd),
        "set": dict(program.marks),
        "limits": dict(program.limits),
        "filter": _filter(way),
    }
    if way.bubblewrap:
        return [*_bubblewrap(way.bubblewrap, program), *_launch(plan)]
    plan |= {
        "parent": os.getpid(),
        "user_namespace": way.user_namespace,
        "network": way.network,
        "processes": way.processes,
        "view": way.view,
        "uid": program.uid,
        "gid": program.uid,
        "scratch": str(program.scratch),
        "steps": _steps(program, way.view),
        "devices": list(program.devices),
        "links": sight.links(),
    }
    return _launch(plan)


def _steps(program: Program, view: str | None) -> list[tuple[str, str]]:
    """What to mount, a folder before what lies in it. Something is hidden only where it would be seen."""
    if view is None:
        return []
    seen = ["/"] if view == "open" else list(program.readable)
    hidden = [one for one in sight.outermost(map(Path, program.hidden)) if Path(one).exists() and _below(one, seen)]
    covered = [*hidden, *program.writable]
    read = [one for one in program.readable if view == "closed" or _below(one, covered)]
    kinds = dict.fromkeys(read, "read") | dict.fromkeys(hidden, "hide") | dict.fromkeys(program.writable, "write")
    return [(kinds[path], path) for path in sorted(kinds, key=lambda path: Path(path).parts)]


def _below(path: str, folders: Sequence[str]) -> bool:
    return any(Path(path).is_relative_to(folder) for folder in folders)


def _launch(plan: dict[str, Any]) -> list[str]:
    # marshal needs no import in the launcher, whose imports cost more than its work; the interpreter is the same
    return [sys.executable, "-I", "-S", str(LAUNCHER), marshal.dumps(plan).hex()]


def _filter(way: Way) -> str | None:
    machine = platform.machine()
    if not syscalls.supported(machine):
        return None
    no_internet = not (way.network or way.bubblewrap or way.keep_network)
    return syscalls.build(machine, no_internet=no_internet).hex()


def _bubblewrap(path: str, program: Program) -> list[str]:
    words = [path, "--unshare-user", "--unshare-pid", "--unshare-net", "--unshare-ipc", "--die-with-parent"]
    words += ["--cap-drop", "ALL", "--proc", "/proc", "--dev", "/dev", "--bind", str(program.scratch), "/tmp"]  # noqa: S108
    for link, target in sight.links().items():
        words += ["--symlink", target, link]
    steps = _steps(replace(program, readable=[*program.readable, str(LAUNCHER)]), "closed")
    for kind, path in steps:
        match kind:
            case "hide":
                words += ["--tmpfs", path] if Path(path).is_dir() else ["--ro-bind", "/dev/null", path]
            case _:
                words += ["--ro-bind" if kind == "read" else "--bind", path, path]
    for device in program.devices:
        words += ["--dev-bind", device, device]
    emptied = [path for kind, path in steps if kind == "hide" and Path(path).is_dir()]
    for path in ("/", *emptied):
        words += ["--remount-ro", path]
    return [*words, "--"]
