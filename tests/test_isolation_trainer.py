"""From inside: a hostile trainer behind the walls of this host, as root, as an ordinary user, and by bubblewrap.

What a host cannot give is skipped with its reason; the probe of `worker.isolation` decides, as it does for a node.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.servers import servers
from tunery.contracts.channel import send_line
from tunery.contracts.events import Checkpoint, Failed
from worker.isolation import fetching, limits, syscalls, walls
from worker.isolation.walls import Program, Way
from worker.line import Line
from worker.workspace import Workspace

ROOT = Path(__file__).parent.parent
USER = 54_321
MIB = 1 << 20


@dataclass
class Host:
    """One way to be a node on this machine: who it runs as and what is on its PATH."""

    name: str
    home: Path
    uid: int | None
    bubblewrap: bool

    def start(self, wanted: dict[str, Any], *more: str) -> "subprocess.Popen[str]":
        spec = {"mode": "look", "pids": [], "secrets": [], "folders": [], "addresses": [], "forks": 4, "memory": 1}
        command = [
            sys.executable,
            "-P",
            "-B",
            "-m",
            "tests.isolated_node",
            str(self.home),
            json.dumps(spec | wanted),
            *more,
        ]
        path = os.environ["PATH"]
        if self.bubblewrap:
            path = f"{Path(_bubblewrap() or '').parent}:{path}"
        else:
            path = ":".join(one for one in path.split(":") if not (Path(one) / "bwrap").exists())
        return subprocess.Popen(
            self._as_user(command),
            cwd="/",
            env={"PATH": path, "PYTHONPATH": str(ROOT), "NODE_SECRET": "of the node"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, wanted: dict[str, Any], *more: str) -> dict[str, Any]:
        """What the node said, with what the trainer got under `got`. Skips where the host has no walls to offer."""
        node = self.start(wanted, *more)
        out, problem = node.communicate(timeout=120)
        assert node.returncode == 0, problem
        first, last = (json.loads(line) for line in out.splitlines()[-2:])
        if not first["shown"]["trainer_isolated"]:
            pytest.skip(f"this host isolates no trainer of {self.name}: {first['shown']}")
        last["shown"] = first["shown"]
        last["got"] = json.loads(last["log"].strip().splitlines()[-1])
        return last

    def _as_user(self, command: list[str]) -> list[str]:
        if self.uid is None:
            return command
        drop = ["setpriv", f"--reuid={self.uid}", f"--regid={self.uid}", "--clear-groups", *command]
        closed = _closed_home()
        if closed is None:
            return drop
        # the interpreter lies below a home that only root may enter: let this one process tree walk through it
        script = (
            'hold=$(mktemp -d); mount --bind "$0" "$hold"; mount -t tmpfs -o mode=755 tmpfs "$1"; mkdir -p "$0"; '
            'mount --bind "$hold" "$0"; umount "$hold"; rmdir "$hold"; shift; exec "$@"'
        )
        return ["unshare", "--mount", "sh", "-c", script, sys.base_prefix, str(closed), *drop]


def _closed_home() -> Path | None:
    """The outermost folder above the interpreter that others may not enter."""
    above = [*reversed(Path(sys.base_prefix).parents), Path(sys.base_prefix)]
    return next((folder for folder in above if not folder.stat().st_mode & 0o001), None)


def _bubblewrap() -> str | None:
    return os.environ.get("TUNERY_TEST_BWRAP") or shutil.which("bwrap")


@pytest.fixture(params=["root", "user", "bubblewrap"])
def host(request: pytest.FixtureRequest) -> Iterator[Host]:
    root = os.geteuid() == 0
    if request.param == "root" and not root:
        pytest.skip("needs root")
    if request.param == "bubblewrap" and not _bubblewrap():
        pytest.skip("bubblewrap is not installed, and TUNERY_TEST_BWRAP names none")
    uid = USER if root and request.param != "root" else None
    home = Path(tempfile.mkdtemp(prefix="tunery-iso-"))
    if uid is not None:
        os.chown(home, uid, uid)
    yield Host(request.param, home, uid, request.param == "bubblewrap")
    shutil.rmtree(home, ignore_errors=True)


def test_a_hostile_trainer_gets_nothing(host: Host) -> None:
    other = host.home / "attempts" / "other"
    other.mkdir(parents=True)
    (other / "rows").write_text("somebody else's rows")
    (host.home / "secrets.json").write_text("{}")
    for path in (host.home / "attempts", other, other / "rows", host.home / "secrets.json"):
        if host.uid is not None:
            os.chown(path, host.uid, host.uid)
    running = servers()
    secrets = [other / "rows", host.home / "secrets.json", running.home.secrets_file, Path("/etc/shadow")]
    endpoints = [running.admin_url, running.redis_url, running.s3_root.endpoint_url]
    addresses = [[urlsplit(url).hostname, urlsplit(url).port] for url in endpoints] + [["169.254.169.254", 80]]
    done = host.run(
        {
            "pids": [1, os.getpid()],
            "secrets": [str(path) for path in secrets],
            "folders": [str(host.home), str(other), str(ROOT), str(ROOT / "tests"), "/usr", "/etc", "/root"],
            "addresses": addresses,
        }
    )  # fmt: skip
    got = done["got"]
    assert got["environments"] in ([], [1]), "1 is the first process of its own namespace"
    assert (got["read"], got["reached"], got["tampered"]) == ([], [], [])
    assert not {str(other), str(ROOT)} & set(got["listed"]) - {str(ROOT)}
    assert not [folder for folder in got["wrote"] if (Path(folder) / "mine").exists()]
    assert not got["rights"]
    assert [pid for pid in got["signalled"] if pid != 1] == []
    assert (got["loopback"], got["home"], got["data"]) == (True, True, 4)
    assert (done["code"], done["gone"], done["removed"]) == (64, True, True)
    assert (got["uid"] == done["owner"]) if host.uid is None else (got["uid"] == host.uid)
    assert "hunter2" not in done["log"] and "ftk_live_0" not in done["log"]


def test_it_is_killed_by_a_signal_and_that_is_what_is_said(host: Host) -> None:
    assert host.run({"mode": "killed"})["code"] == -signal.SIGKILL


def test_a_fork_bomb_stays_in_its_limits(host: Host) -> None:
    if host.uid is not None:
        pytest.skip("without a uid of its own the limit would count all that the user runs")
    assert host.run({"forks": 400}, "trainer_processes=64")["got"]["forks"] < 64


def test_memory_beyond_its_own_is_refused(host: Host) -> None:
    done = host.run({"memory": 600 * MIB}, f"trainer_memory_bytes={256 * MIB}")
    assert (done["got"]["memory"], done["code"]) == (False, 64)


def test_nothing_survives_its_supervisor(host: Host) -> None:
    token = f"left-behind-{time.monotonic_ns()}"
    node = host.start({"mode": "stay", "token": token})
    assert node.stdout is not None
    shown = json.loads(node.stdout.readline())["shown"]
    try:
        if not shown["trainer_isolated"]:
            pytest.skip("this host isolates no trainer")
        _until(lambda: _named(token))
    finally:
        for pid in [node.pid, *_named("tests.isolated_node")]:
            if _is_below(pid, node.pid):
                os.kill(pid, signal.SIGKILL)
        node.communicate()
    _until(lambda: not _named(token))


def test_a_node_that_must_isolate_does_not_start_without(tmp_path: Path) -> None:
    program = (
        "from tests.isolated_node import main; import pathlib, sys; main(pathlib.Path(sys.argv[1]), {}, sys.argv[2:])"
    )
    # as on a host that lets nobody have a namespace
    script = f"import worker.isolation.probe as probe; probe.ways = lambda: [probe.Way()]; {program}"
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path), "trainer_isolation=require"],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1
    assert "NotIsolated: secrets:" in done.stderr or "NotIsolated: files:" in done.stderr
    assert "fix: " in done.stderr


def test_the_program_that_fetches_models_has_a_network_and_no_secret(tmp_path: Path) -> None:
    home, store = tmp_path / "home", tmp_path / "home" / "models"
    (store / "scratch").mkdir(parents=True)
    (home / "secrets.json").write_text("{}")
    asks = (
        "import json, os, socket; from pathlib import Path; (Path.cwd() / 'model').touch(); socket.socket().close()\n"
        f"print(json.dumps([os.listdir({str(home)!r}), len(socket.if_nameindex()), os.access('/etc', os.W_OK)]))"
    )
    way = Way(keep_network=True, processes=True, view="open", user_namespace=os.geteuid() != 0)
    settings: Any = SimpleNamespace(home=home, trainer_hidden="", trainer_readable="")
    command = fetching.command(way, [sys.executable, "-c", asks], store, store / "scratch", settings)
    environment = fetching.environment(store / "scratch")
    done = subprocess.run(command, cwd=store, env=environment, capture_output=True, text=True)
    if "tunery isolation: " in done.stderr:
        pytest.skip(f"this host gives no namespaces: {done.stderr}")
    assert json.loads(done.stdout) == [["models"], len(socket.if_nameindex()), False]
    assert (store / "model").exists()
    assert not [name for name in environment if name.startswith(("TUNERY_S3", "TUNERY_DATABASE", "AWS_"))]


def test_a_trainer_may_only_name_folders_of_its_own(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "mine")
    (tmp_path / "mine" / "checkpoints").mkdir(parents=True)
    (tmp_path / "others").mkdir()
    (tmp_path / "mine" / "link").symlink_to(tmp_path / "others")
    line = Line(workspace)
    line.open()
    line.start()
    with contextlib.closing(line), socket.socket(socket.AF_UNIX) as trainer:
        trainer.connect(str(workspace.socket))
        named = {"mine/checkpoints": True, "mine": False, "others": False, "mine/../others": False, "mine/link": False}
        for path, kept in named.items():
            send_line(trainer, Checkpoint(path=str(tmp_path / path), files=[], step=1, metrics={}))
            heard = line.hear(10)
            assert isinstance(heard, Checkpoint if kept else Failed), path
            assert kept or "outside its workspace" in heard.message


def test_without_a_namespace_a_filter_takes_its_sockets(tmp_path: Path) -> None:
    if not syscalls.supported(os.uname().machine):
        pytest.skip("no filter for this architecture")
    asks = "import socket; socket.socket(socket.AF_UNIX); print('unix'); socket.socket(socket.AF_INET)"
    program = Program(argv=[sys.executable, "-c", asks], cwd=tmp_path, scratch=tmp_path)
    done = subprocess.run(walls.command(Way(), program), capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("unix\n", 1)
    assert "Address family not supported" in done.stderr


def test_a_cgroup_holds_a_trainer_and_goes_with_it(tmp_path: Path) -> None:
    """Needs a folder of cgroups that is ours: `TUNERY_TEST_CGROUP`."""
    named = os.environ.get("TUNERY_TEST_CGROUP")
    if not named:
        pytest.skip("TUNERY_TEST_CGROUP names no delegated cgroup")
    groups = limits.make([Path(named)], "test", 256 * MIB, 20)
    forks = "import os, time\nn = 0\ntry:\n while n < 100: os.fork() or time.sleep(9); n += 1\nexcept OSError: print(n)"
    done = subprocess.Popen(
        [sys.executable, "-c", forks], preexec_fn=lambda: limits.enter(groups), stdout=subprocess.PIPE
    )
    assert done.stdout is not None
    assert int(done.stdout.readline()) < 20
    for pid in (groups[0] / "cgroup.procs").read_text().split():
        os.kill(int(pid), signal.SIGKILL)
    done.communicate()
    limits.end(groups)
    assert not groups[0].exists()


def _named(token: str) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and token.encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def _is_below(pid: int, ancestor: int) -> bool:
    while pid > 1:
        if pid == ancestor:
            return True
        try:
            pid = int((Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            return False
    return False


def _until(what: Any, timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.05)
