"""Which walls this host lets us put up: each way is tried with a real child, and the child says what it could do."""

import json
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from worker.isolation import limits, sight, uids, walls
from worker.isolation.walls import Program, Way

INSIDE = Path(__file__).with_name("inside.py")
REQUIRED = ("privileges", "secrets", "files", "network")
"""Without these `TUNERY_TRAINER_ISOLATION=require` refuses to start."""
_TIMEOUT_S = 60
"""A first CUDA context on a large host takes seconds."""
_DOCS = "docs/isolation.md"


@dataclass(frozen=True)
class Layer:
    """One wall: whether it stands, what a trainer meets, and what would put it up."""

    name: str
    on: bool
    detail: str
    fix: str | None = None


@dataclass(frozen=True)
class Wanted:
    """What the probe has to know of the node."""

    home: Path
    trainer_module: str
    uids: str
    cgroups: str
    readable: str
    hidden: str
    cuda_minors: Sequence[int] = ()


@dataclass(frozen=True)
class Found:
    """The strongest way that works here, what it gives, and why the stronger ones do not."""

    way: Way
    layers: tuple[Layer, ...]
    refused: tuple[str, ...] = ()

    @property
    def isolated(self) -> bool:
        return not self.missing(("privileges", "secrets", "files"))

    def missing(self, names: Sequence[str] = REQUIRED) -> list[Layer]:
        return [layer for layer in self.layers if layer.name in names and not layer.on]

    def as_json(self) -> dict[str, Any]:
        network = not self.missing(("network",))
        layers = [asdict(layer) for layer in self.layers]
        return {
            "trainer_isolated": self.isolated,
            "network_isolated": network,
            "layers": layers,
            "refused": list(self.refused),
        }


def ways() -> list[Way]:
    """From strongest to weakest. Root gives a uid of its own away; others need a user namespace to get anything."""
    if os.geteuid() == 0:
        closed = Way(own_uid=True, network=True, processes=True, view="closed")
        return [
            closed,
            replace(closed, view="open"),
            replace(closed, own_uid=False),
            replace(closed, own_uid=False, view="open"),
            Way(own_uid=True, network=True),
            Way(own_uid=True),
            Way(network=True),
            Way(),
        ]
    inside = Way(user_namespace=True, network=True, processes=True, view="closed")
    program = shutil.which("bwrap")
    first = [Way(network=True, processes=True, view="closed", bubblewrap=program)] if program else []
    return [*first, inside, replace(inside, view="open"), Way(user_namespace=True, network=True), Way()]


def find(wanted: Wanted) -> Found:
    """The first way whose child starts, finds its modules and, on a host with GPUs, its CUDA devices."""
    refused = []
    for way in ways():
        answer = ask(way, wanted)
        if isinstance(answer, str):
            refused.append(f"{describe(way)}: {answer}")
            continue
        return Found(way, tuple(_layers(way, wanted, answer)), tuple(refused))
    # nothing starts behind any wall: a broken installation, which the trainer's own start will explain better
    layer = Layer("privileges", False, "no child could be started", f"see {_DOCS}")
    return Found(Way(), (layer, *(replace(layer, name=name) for name in REQUIRED[1:])), tuple(refused))


def describe(way: Way) -> str:
    """In a few words, for the log and for `tunery doctor`."""
    words = [
        "bubblewrap" if way.bubblewrap else "",
        "a user namespace" if way.user_namespace else "",
        "a uid of its own" if way.own_uid else "",
        "no network" if way.network else "",
        f"a {way.view} view of the disk" if way.view else "",
    ]
    return ", ".join(word for word in words if word) or "no namespace"


def ask(way: Way, wanted: Wanted) -> dict[str, Any] | str:
    """What a child found behind these walls, or why it could not get there or not work there."""
    folder = wanted.home / "attempts" / f".probe-{secrets.token_hex(4)}"
    held = None
    try:
        (folder / "mine" / "tmp").mkdir(parents=True)
        (folder / "other").mkdir(mode=0o700)
        (folder / "other" / "rows").write_text("somebody else's")
        secret = wanted.home / f"{folder.name}.secret"
        secret.write_text("a secret")
        secret.chmod(0o600)
        if way.own_uid:
            held = uids.take(wanted.uids, wanted.home)
            os.chown(folder / "mine", held.uid, held.uid)
            os.chown(folder / "mine" / "tmp", held.uid, held.uid)
            (folder / "mine").chmod(0o700)
            for each in (folder, wanted.home / "attempts", wanted.home):
                each.chmod(0o711)
        return _run(way, wanted, folder, held.uid if held else None)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        return str(error)[:300]
    finally:
        if held:
            held.release()
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):
            (wanted.home / f"{folder.name}.secret").unlink()


def _run(way: Way, wanted: Wanted, folder: Path, uid: int | None) -> dict[str, Any] | str:
    mine = folder / "mine"
    hidden = [str(wanted.home), *filter(None, wanted.hidden.split(os.pathsep))]
    places = (wanted.home, folder, sight.ROOT, sys.prefix, "/usr", "/etc", "/var/tmp", "/tmp", "/dev/shm")  # noqa: S108
    asked = {
        "node": os.getpid(),
        "modules": [wanted.trainer_module.partition(".")[0], "tunery", "pydantic"],
        "secret": [str(wanted.home / f"{folder.name}.secret"), str(folder / "other" / "rows"), *_secrets(hidden)],
        "outside": list(dict.fromkeys(map(str, places))),
        "cuda": bool(wanted.cuda_minors),
    }
    readable = [*sight.readable(wanted.trainer_module, wanted.readable.split(os.pathsep)), str(INSIDE)]
    program = Program(
        argv=[sys.executable, "-P", str(INSIDE), json.dumps(asked)],
        cwd=mine,
        scratch=mine / "tmp",
        readable=readable,
        writable=[str(mine)],
        hidden=hidden,
        devices=sight.nvidia(wanted.cuda_minors),
        limits=limits.rlimits(processes=None, data_bytes=None),
        uid=uid,
    )
    environment = {"PATH": os.defpath, "PYTHONPATH": str(sight.ROOT), "HOME": str(mine)}
    if library := os.environ.get("LD_LIBRARY_PATH"):
        environment["LD_LIBRARY_PATH"] = library
    done = subprocess.run(
        walls.command(way, program), env=environment, cwd=mine, capture_output=True, text=True, timeout=_TIMEOUT_S
    )
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:300]
    answer = json.loads(done.stdout)
    if answer["missing"]:
        return f"Python does not find {', '.join(answer['missing'])} there; name its folder in TUNERY_TRAINER_READABLE"
    if not answer["written_inside"]:
        return "the workspace cannot be written there"
    if answer["cuda"]:
        return f"CUDA does not start: {answer['cuda']}"
    answer["written_outside"] = [one for one, identity in answer["writable"].items() if identity == _identity(one)]
    return answer


def _secrets(hidden: Sequence[str]) -> list[str]:
    """Of folders that hold secrets: the files in them, as far as we see them ourselves."""
    found = []
    for folder in hidden[1:]:
        with suppress(OSError):
            inside = Path(folder).iterdir() if Path(folder).is_dir() else [Path(folder)]
            found += [str(one) for one in inside if one.is_file() and os.access(one, os.R_OK)]
    return found


def _layers(way: Way, wanted: Wanted, facts: dict[str, Any]) -> list[Layer]:
    root = os.geteuid() == 0
    namespaces = (
        f"the node needs CAP_SYS_ADMIN for it: {_DOCS}"
        if root
        else f"install bubblewrap, or allow user namespaces: {_DOCS}"
    )
    own = facts["uid"] != os.geteuid()
    bare = facts["no_new_privileges"] and not facts["capabilities"]
    leaks = [*facts["secrets_read"], *(["the node's environment"] if facts["node_environment"] else [])]
    outside = facts["written_outside"]
    alone = way.processes or way.bubblewrap is not None
    cut = set(facts["interfaces"]) <= {"lo"}
    own_fix = "run the node as root, or with CAP_SETUID, CAP_SETGID, CAP_CHOWN and CAP_KILL"
    uid_said = f"one of {wanted.uids} for each trainer" if own else f"the node's own, {facts['uid']}"
    network = "an empty namespace" if cut else "sockets refused by a filter" if not facts["sockets"] else "the node's"
    groups = limits.parents(wanted.cgroups)
    return [
        Layer("own uid", own, uid_said, None if own else own_fix),
        Layer("privileges", bare, "none, and none to be had" if bare else "some are left", None if bare else _DOCS),
        Layer("secrets", not leaks, f"readable: {', '.join(leaks)}" if leaks else "none can be read",
              namespaces if leaks else None),
        Layer("files", not outside, f"can write in {', '.join(outside)}" if outside else _files(way),
              namespaces if outside else None),
        Layer("network", cut or not facts["sockets"], network, None if cut else namespaces),
        Layer("processes", alone, "sees only its own" if alone else "sees that others run",
              None if alone else namespaces),
        Layer("system calls", facts["filter"], "filtered" if facts["filter"] else "not filtered",
              None if facts["filter"] else "a kernel with seccomp on x86-64 or arm64"),
        Layer("memory", bool(groups), f"cgroups in {', '.join(map(str, groups))}" if groups else
              "no cgroup; it is the first to go when the host runs out",
              None if groups else f"TUNERY_TRAINER_CGROUPS=<a delegated cgroup>: {_DOCS}"),
    ]  # fmt: skip


def _identity(path: str) -> list[int]:
    found = Path(path).stat()
    return [found.st_dev, found.st_ino]


def _files(way: Way) -> str:
    if way.view == "closed":
        return "sees libraries, base models and its workspace; writes its workspace"
    return "writes only its workspace" if way.view else "its uid may write nothing else that was tried"
