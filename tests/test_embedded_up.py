"""`python -m tunery.embedded` from the outside, with small programs in the place of api, scheduler and worker."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import servers as session_servers
from tunery.embedded import binaries, doctor, ports
from tunery.embedded.console import Tail
from tunery.embedded.home import CHECKOUT, Home
from tunery.embedded.identity import RunAs
from tunery.embedded.process import cap_log
from tunery.embedded.servers import External

API = """
import http.server, json, os, pathlib
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(dict(os.environ)).encode())
http.server.ThreadingHTTPServer(("127.0.0.1", int(os.environ["TUNERY_API_PORT"])), Handler).serve_forever()
"""
OTHER = """
import json, os, pathlib, signal
pathlib.Path(os.environ["TEST_OUT"], "PROGRAM.json").write_text(json.dumps(dict(os.environ)))
print("PROGRAM says hello", flush=True)
signal.pause()
"""


class Deployment:
    """One home and the command line over it."""

    def __init__(self, home: Home, folder: Path) -> None:
        self.home, self.folder = home, folder
        self.port = ports.choose(set())
        self.first_output = ""
        for program, source in (("api", API), ("scheduler", OTHER), ("worker", OTHER)):
            (folder / program).mkdir()
            (folder / program / "__init__.py").touch()
            (folder / program / "__main__.py").write_text(source.replace("PROGRAM", program))

    def run(self, *arguments: str, **extra: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-P", "-m", "tunery.embedded", *arguments],
            env=self.environment() | extra,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def up(self) -> "subprocess.CompletedProcess[str]":
        return self.run("up", "-d", "--port", str(self.port), "--programs", str(self.folder))

    def environment(self) -> dict[str, str]:
        ours = {"TUNERY_HOME": str(self.home.root), "TEST_OUT": str(self.folder), "PYTHONPATH": str(CHECKOUT)}
        return {name: value for name, value in os.environ.items() if not name.startswith("TUNERY_")} | ours

    def status(self) -> dict[str, Any]:
        return json.loads(self.run("status", "--json").stdout)

    def program_environment(self, name: str) -> dict[str, str]:
        if name == "api":
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/") as answer:
                return json.load(answer)
        return json.loads((self.folder / f"{name}.json").read_text())


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """Started once: the tests below look at it, and each leaves it running."""
    made = Deployment(session_servers.temporary_home(), tmp_path_factory.mktemp("programs"))
    first = made.up()
    assert first.returncode == 0, first.stderr
    made.first_output = first.stderr
    yield made
    made.run("down", "--purge", "-y")
    assert not made.home.root.exists()


def eventually(check: Callable[[], bool], timeout_s: float = 15) -> None:
    deadline = time.monotonic() + timeout_s
    while not check():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_everything_runs_and_the_key_is_shown_once(deployment: Deployment) -> None:
    found = deployment.status()
    assert found["running"] and found["ready"]
    assert {name: one["state"] for name, one in found["services"].items()} == dict.fromkeys(
        ("postgres", "valkey", "s3", "api", "scheduler", "node"), "ready"
    )
    profile = json.loads(deployment.home.profile.read_text())
    assert profile["api_url"] == f"http://127.0.0.1:{deployment.port}"
    assert deployment.home.profile.stat().st_mode & 0o777 == 0o600
    assert profile["api_key"] in deployment.first_output
    for log in deployment.home.logs.iterdir():
        assert profile["api_key"] not in log.read_text(), log
    assert f"export OPENAI_API_KEY={profile['api_key']}" in deployment.run("status", "--env").stdout


def test_each_program_has_its_own_role_and_nothing_of_the_others(deployment: Deployment) -> None:
    roles = {"api": "tunery_api", "scheduler": "tunery_scheduler", "worker": "tunery_worker"}
    environments = {name: deployment.program_environment(name) for name in roles}
    for name, role in roles.items():
        assert environments[name]["TUNERY_DATABASE_URL"].startswith(f"postgresql://{role}:")
    assert "TUNERY_KEY_PEPPER" in environments["api"]
    assert "TUNERY_KEY_PEPPER" not in environments["scheduler"].keys() | environments["worker"].keys()
    secrets = deployment.home.secrets()
    assert environments["api"]["TUNERY_S3_ACCESS_KEY_ID"] == secrets.get("s3_root_id")
    assert environments["scheduler"]["TUNERY_S3_ACCESS_KEY_ID"] == secrets.get("s3_tidy_id")
    assert environments["worker"]["TUNERY_S3_ACCESS_KEY_ID"] == secrets.get("s3_node_id")
    assert environments["worker"]["TUNERY_HOME"] == str(deployment.home.node)
    superuser = secrets.get("postgres_superuser")
    assert superuser and not any(superuser in json.dumps(each) for each in environments.values())


def test_second_up_says_that_it_runs(deployment: Deployment) -> None:
    again = deployment.up()
    assert again.returncode == 0
    assert "already running" in again.stderr and "scheduler" in again.stderr


def test_program_that_dies_is_started_again(deployment: Deployment) -> None:
    before = deployment.status()["services"]["scheduler"]
    os.kill(before["pid"], signal.SIGKILL)

    def is_back() -> bool:
        now = deployment.home.state()["services"]["scheduler"]
        return now["state"] == "ready" and now["pid"] != before["pid"] and now["restarts"] == before["restarts"] + 1

    eventually(is_back)
    assert "scheduler ended with -9" in deployment.run("logs", "up").stdout


def test_logs_are_shown_by_name(deployment: Deployment) -> None:
    assert "worker says hello" in deployment.run("logs", "node").stdout
    unknown = deployment.run("logs", "nothing")
    assert unknown.returncode == 1
    assert [line.split(":")[0] for line in unknown.stderr.splitlines()] == ["error", "why", "fix", "docs"]


def test_down_stops_all_and_a_second_start_keeps_everything(deployment: Deployment) -> None:
    before, profile = deployment.status(), deployment.home.profile.read_text()
    assert deployment.run("down").returncode == 0
    assert not any(alive(one["pid"]) for one in before["services"].values())
    assert deployment.run("status").returncode == 9

    second = deployment.up()
    assert second.returncode == 0, second.stderr
    assert deployment.home.profile.read_text() == profile
    assert json.loads(profile)["api_key"] not in second.stderr
    where = {name: one["where"] for name, one in before["services"].items()}
    assert {name: one["where"] for name, one in deployment.status()["services"].items()} == where


@pytest.mark.skipif(sys.platform != "linux", reason="parent-death signals are Linux's")
def test_children_die_with_a_killed_supervisor(deployment: Deployment) -> None:
    before = deployment.status()
    os.kill(before["pid"], signal.SIGKILL)
    pids = [one["pid"] for one in before["services"].values()]
    eventually(lambda: not any(map(alive, pids)))
    assert deployment.run("down").returncode == 0  # and signals nobody
    assert deployment.up().returncode == 0


def test_purge_asks_and_leaves_what_is_not_ours(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    home.create()
    home.secrets().made("something")
    (home.root / "thesis.txt").write_text("not ours")
    environment = os.environ | {"TUNERY_HOME": str(home.root)}
    command = [sys.executable, "-m", "tunery.embedded", "down", "--purge"]
    refused = subprocess.run(command, input="no\n", env=environment, capture_output=True, text=True)
    assert refused.returncode == 1 and home.secrets_file.exists()
    subprocess.run([*command, "-y"], env=environment, check=True, capture_output=True)
    assert [path.name for path in home.root.iterdir()] == ["thesis.txt"]


def test_doctor_stops_at_a_taken_port_and_missing_programs(tmp_path: Path) -> None:
    with socket.socket() as holder:
        holder.bind((ports.HOST, 0))
        holder.listen()
        checks = doctor.examine(Home(tmp_path / "home"), External(), holder.getsockname()[1], tmp_path)
    red = {check.name: check for check in checks if check.level is doctor.Level.FAIL}
    assert red.keys() == {"port", "programs"}
    with pytest.raises(doctor.Refused, match="not ready: programs, port"):
        doctor.refuse(checks)


def test_missing_wheel_falls_back_to_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = tmp_path / "redis-server"
    server.write_text("#!/bin/sh\n")
    server.chmod(0o755)
    monkeypatch.setattr(binaries, "_package_folder", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = binaries.find_valkey()
    assert found and found.path == server and found.origin == "PATH"


@pytest.mark.skipif(os.geteuid() != 0, reason="another user's folder is a concern of root's alone")
def test_home_that_the_servers_cannot_reach_keeps_its_data_elsewhere(tmp_path: Path) -> None:
    (closed := tmp_path / "closed").mkdir(mode=0o700)
    home = Home(closed / "home", RunAs(65534, 65534))
    assert home.data.parent == Path("/var/lib/tunery/homes")
    assert Home(closed / "home", RunAs()).data == closed / "home"


def test_log_past_its_cap_is_moved_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tunery.embedded.process.MAX_LOG_BYTES", 10)
    log = tmp_path / "api.log"
    log.write_text("first line\nsecond line\n")
    tail = Tail("api", log, lines=1)
    assert tail.last == ["second line"]
    cap_log(log)
    assert log.read_text() == ""
    assert (tmp_path / "api.log.1").read_text() == "first line\nsecond line\n"
    log.write_text("third\n")
    assert tail.read() == ["third"]
