"""`tunery up` on servers that are somebody's own: prepared by `tunery db init`, given by URL, used by a real job."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.servers import FAST_POSTGRES, temporary_home
from tests.tiny_model import write_tiny_base
from tunery.db_commands import read_env
from tunery.embedded import ports
from tunery.embedded.servers import Servers

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture
def theirs() -> Iterator[Servers]:
    """Not the session's: roles belong to a whole server."""
    home = temporary_home()
    started = Servers(home, postgres_options=FAST_POSTGRES)
    started.start()
    yield started
    started.stop()
    shutil.rmtree(home.root)


class Shell:
    """The command line in an environment that says nothing of any other deployment."""

    def __init__(self) -> None:
        self.variables: dict[str, str] = {}

    def __call__(self, *arguments: str) -> str:
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("TUNERY_", "PG"))}
        done = subprocess.run(
            [sys.executable, "-m", "tunery.cli", *arguments],
            env=clean | self.variables,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


def test_a_job_succeeds_on_servers_given_by_url(theirs: Servers, tmp_path: Path) -> None:
    tunery, home, file = Shell(), temporary_home(), tmp_path / "tunery.env"
    tunery.variables = {"TUNERY_ADMIN_DATABASE_URL": theirs.admin_url}
    tunery("db", "init", "--env-file", str(file))

    key = theirs.s3_root
    servers = {
        "TUNERY_REDIS_URL": theirs.redis_url,
        "TUNERY_S3_ENDPOINT_URL": key.endpoint_url,
        "TUNERY_S3_ACCESS_KEY_ID": key.access_key_id,
        "TUNERY_S3_SECRET_ACCESS_KEY": key.secret_access_key,
    }
    made = read_env(file)
    assert theirs.admin_url.split("@")[0] not in file.read_text(), "no admin's login stays behind"
    tunery.variables = {"TUNERY_HOME": str(home.root)} | made | servers
    tunery("up", "-d", "--port", str(ports.choose(set())))
    try:
        services = json.loads(tunery("status", "--json"))["services"]
        assert services.keys() == {"api", "scheduler", "node"}
        _train(tunery, tmp_path)
        tunery("down")
        # the second time the home knows the passwords, and the URL alone will do
        tunery.variables = {"TUNERY_HOME": str(home.root), "TUNERY_DATABASE_URL": made["TUNERY_DATABASE_URL"]} | servers
        tunery("up", "-d")
        assert json.loads(tunery("adapters", "show", "by-url", "--json"))["versions"][0]["version"] == 1
        _nobody_else_has_a_secret(home.logs, made)
    finally:
        tunery("down", "--purge", "-y")


def _train(tunery: Shell, folder: Path) -> None:
    write_tiny_base(folder / "tiny")
    turns = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    (folder / "rows.jsonl").write_text("".join(json.dumps({"messages": turns}) + "\n" for _ in range(12)))
    tunery("models", "import", f"path:{folder / 'tiny'}", "--name", "tiny")
    job = tunery(
        "jobs", "create", "-m", "tiny", "-t", str(folder / "rows.jsonl"),
        "--suffix", "by-url", "--max-steps", "3", "-q",
    ).strip()  # fmt: skip
    tunery("jobs", "wait", job)


def _nobody_else_has_a_secret(logs: Path, made: dict[str, str]) -> None:
    secrets = [value for name, value in made.items() if name.endswith("_PASSWORD") or name == "TUNERY_KEY_PEPPER"]
    for log in logs.iterdir():
        assert not any(secret in log.read_text() for secret in secrets), log
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            words, environment = (entry / "cmdline").read_bytes(), (entry / "environ").read_bytes()
        except OSError:
            continue
        if b"-m\0scheduler" in words and made["TUNERY_SCHEDULER_PASSWORD"].encode() in environment:
            assert made["TUNERY_API_PASSWORD"].encode() not in environment
            return
    raise AssertionError("the scheduler was not found")
