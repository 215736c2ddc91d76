"""A second machine, by its own TUNERY_HOME: one command and a token make it a node; a removal takes it away again."""

import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import select

from tests.fleet import CLOCKS, ROOT, Fleet, fleet
from tests.servers import temporary_home
from tunery import ids
from tunery.embedded import joined
from tunery.models import Node
from worker import locks, processes

pytestmark = pytest.mark.timeout(180)


class Machine:
    """The command line on another host: a home of its own, and none of the deployment's settings."""

    def __init__(self, deployment: Fleet) -> None:
        self.fleet, self.home = deployment, temporary_home()
        clean = {name: value for name, value in os.environ.items() if not name.startswith("TUNERY_")}
        ours = {
            "TUNERY_HOME": str(self.home.root),
            "TUNERY_TRAINER_MODULE": deployment.trainer,
            "TUNERY_MODEL_STORE": str(deployment.home / "models"),
            "TUNERY_FLEET": deployment.database,
            "XDG_CONFIG_HOME": str(self.home.root),
        }
        self.environment = clean | {f"TUNERY_{name}": value for name, value in CLOCKS.items()} | ours
        store = deployment.home / "models" / str(deployment.base_id)
        store.mkdir(parents=True, exist_ok=True)
        (store / "COMPLETE").touch()

    def command(self, *words: str, stdin: str = "", fails: int = 0, **more: str) -> str:
        """stdout and stderr together."""
        done = subprocess.run(
            [sys.executable, "-m", "tunery.cli", *words],
            input=stdin,
            env=self.environment | more,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
        )
        assert done.returncode == fails, done.stdout + self.fleet.tails() + self.log()
        return done.stdout

    @property
    def pid(self) -> int | None:
        return joined._holder(self.home)

    def log(self) -> str:
        path = self.home.logs / "node.log"
        return path.read_text() if path.exists() else ""

    def close(self) -> None:
        if (pid := self.pid) is not None:
            os.kill(pid, signal.SIGKILL)
        for lock in (self.home.node / "attempts").glob("*.lock"):
            if locks.is_taken(lock):
                os.kill(int(lock.read_text()), signal.SIGKILL)
            processes.end_all(lock.stem)
        self.home.purge()


class Deployment:
    def __init__(self, running: Fleet) -> None:
        self.fleet = running
        node = running.servers.s3_node
        running.serve_api(NODE_S3_ACCESS_KEY_ID=node.access_key_id, NODE_S3_SECRET_ACCESS_KEY=node.secret_access_key)
        running.scheduler()
        self.key = running.client().headers["authorization"].partition(" ")[2]
        self.machines: list[Machine] = []

    def machine(self) -> Machine:
        self.machines.append(made := Machine(self.fleet))
        return made

    def admin(self, *words: str, fails: int = 0, stdin: str = "") -> str:
        """The command line of somebody with an admin key."""
        environment = {"TUNERY_API_URL": self.fleet.api_url, "TUNERY_API_KEY": self.key}
        return self.machines[0].command(*words, fails=fails, stdin=stdin, **environment)

    def token(self) -> str:
        return json.loads(self.admin("node", "token", "--json"))["token"]


@pytest.fixture(scope="module")
def deployment() -> Iterator[Deployment]:
    with fleet() as running:
        made = Deployment(running)
        made.machine()
        yield made
        for machine in made.machines:
            machine.close()


def test_one_command_joins_and_a_removed_node_is_gone(deployment: Deployment) -> None:
    running, machine = deployment.fleet, deployment.machine()
    told = machine.command("node", "join", running.api_url, "--name", "second", "-d", stdin=deployment.token() + "\n")
    assert "joined" in told and "the node is up" in told
    kept = machine.home.root / "node.env"
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    secrets = [line.partition("=")[2] for line in kept.read_text().splitlines() if "SECRET" in line or "URL" in line]
    assert not any(secret in told + machine.log() for secret in secrets if secret != running.api_url)

    job = running.submit("ok", steps=8)
    assert running.ends(job) == "succeeded"
    [attempt] = running.attempts(job)
    shown = json.loads(deployment.admin("node", "show", "second", "--json"))
    assert ids.decode(ids.NODE, shown["id"]) == attempt.node_id
    assert (shown["state"], shown["joined"], len(shown["devices"])) == ("up", True, 1)
    assert len(running.versions(job)) == 1

    machine.command("node", "stop")
    assert machine.pid is None
    assert json.loads(deployment.admin("nodes", "--json"))[0]["state"] == "down"
    assert "runs already" in (machine.command("node", "start", "-d") and machine.command("node", "start", fails=1))

    # Removed in the middle of a job: nothing of it is told any more, and the job ends elsewhere.
    job = running.submit("slow-start", steps=150, save_steps=10)
    running.until(lambda: running.newest_checkpoint(job) > 0)
    assert "removed" in deployment.admin("node", "remove", "second", "--yes")
    running.until(lambda: running.attempts(job)[0].state == "lost")
    with running.look() as session:
        node = session.scalars(select(Node).where(Node.id == attempt.node_id)).one()
        silent_since = node.last_seen_at
    running.node()
    assert running.ends(job) == "succeeded"
    first, *later = running.attempts(job)
    assert later and all(one.node_id != first.node_id for one in later) and later[0].start_step > 0
    with running.look() as session:
        assert session.scalars(select(Node.last_seen_at).where(Node.id == first.node_id)).one() == silent_since
    assert [one["name"] for one in json.loads(deployment.admin("nodes", "--json"))] != ["second"]


# ---- what is refused ----------------------------------------------------------------------------------------------


def test_a_token_works_once_and_the_home_stays_clean(deployment: Deployment) -> None:
    token, url = deployment.token(), deployment.fleet.api_url
    first, second = deployment.machine(), deployment.machine()
    first.command("node", "join", url, "--name", "once", "-d", TUNERY_NODE_TOKEN=token)
    told = second.command("node", "join", url, "--name", "twice", "-d", fails=1, TUNERY_NODE_TOKEN=token)
    assert "has been used" in told and "tunery node token" in told and "Traceback" not in told
    assert not (second.home.root / "node.env").exists()
    taken = second.command("node", "join", url, "--name", "once", fails=1, TUNERY_NODE_TOKEN=deployment.token())
    assert "named 'once' already" in taken
    again = first.command("node", "join", url, fails=1, TUNERY_NODE_TOKEN=deployment.token())
    assert "is node once already" in again
    environment = Path(f"/proc/{first.pid}/environ").read_bytes()
    assert token.encode() not in environment


@pytest.mark.parametrize(
    ("stdin", "words"),
    [
        ("", "there is no join token"),
        ("two words\n", "no spaces"),
        ("tunery_join_unknown\n", "not a join token of this server"),
        ("ftk_live_something\n", "not a join token of this server"),
    ],
)
def test_what_is_no_token_is_said_so(deployment: Deployment, stdin: str, words: str) -> None:
    told = deployment.machines[0].command("node", "join", deployment.fleet.api_url, stdin=stdin, fails=1)
    assert words in told and "fix:" in told and "Traceback" not in told


def test_a_file_that_is_not_there_and_a_server_that_is_not_there(deployment: Deployment) -> None:
    machine = deployment.machines[0]
    told = machine.command("node", "join", deployment.fleet.api_url, "--token-file", "/nowhere", fails=1)
    assert "No such file" in told
    told = machine.command("node", "join", "http://127.0.0.1:9", stdin="tunery_join_x", fails=1)
    assert "was not reached" in told and "Traceback" not in told
    machine.command("node", "join", "ftp://x", stdin="x", fails=2)
    assert "has not joined" in machine.command("node", "start", fails=1)
    assert "no node runs here" in machine.command("node", "stop")


@pytest.mark.parametrize("time", ["0s", "8d", "1", "1h30m", "-1h"])
def test_a_token_lives_a_sensible_time(deployment: Deployment, time: str) -> None:
    assert "invalid_duration" in deployment.admin("node", "token", f"--expires={time}", fails=2)


def test_removing_asks_and_a_node_that_is_not_there_is_said_so(deployment: Deployment) -> None:
    deployment.machine().command(
        "node", "join", deployment.fleet.api_url, "--name", "asked", "-d", stdin=deployment.token()
    )
    assert "not_confirmed" in deployment.admin("node", "remove", "asked", stdin="no\n", fails=2)
    assert "removed" in deployment.admin("node", "remove", "asked", stdin="asked\n")
    assert "not_found" in deployment.admin("node", "remove", "asked", "-y", fails=5)
