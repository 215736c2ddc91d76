"""`tunery up` as a user starts it, with its production clocks, a real trainer, and a tiny random base model.

One job, in the course of which its trainer, its supervisor, the node process and the scheduler are each killed with
SIGKILL and Redis is emptied. Then the published adapter is used with plain transformers and PEFT.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from redis import Redis

from tests.servers import temporary_home
from tests.tiny_model import write_tiny_base
from tunery import ids
from tunery.embedded import ports
from worker import processes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

STEPS, SAVE = 1500, 50


class Deployment:
    """One home, and the command line and OpenAI's client on it."""

    def __init__(self) -> None:
        self.home = temporary_home()
        ours = {"TUNERY_HOME": str(self.home.root), "TUNERY_TICK_TIMEOUT_S": "20"}
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("TUNERY_")} | ours
        port = ports.choose(set())
        self.command("up", "-d", "--port", str(port))
        known = json.loads((self.home.root / "client.json").read_text())
        self.client = openai.OpenAI(
            base_url=f"http://127.0.0.1:{port}/v1", api_key=known["api_key"], _strict_response_validation=True
        )

    def command(self, *arguments: str, fails: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "tunery.cli", *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == fails, done.stdout + done.stderr
        return done.stdout

    def pid(self, service: str) -> int:
        services = json.loads(self.command("status", "--json"))["services"]
        return services[service]["pid"]

    def redis(self) -> Redis:
        config = next(self.home.root.rglob("valkey*.conf")).read_text()
        port, password = (re.search(rf"^{name} (\S+)", config, re.MULTILINE)[1] for name in ("port", "requirepass"))
        return Redis(port=int(port), password=password.strip('"'))

    def job(self, job_id: str) -> dict[str, Any]:
        return self.client.fine_tuning.jobs.retrieve(job_id).model_dump()

    def extra(self, job_id: str) -> dict[str, Any]:
        return self.job(job_id)["tunery"]

    def until(self, what: Callable[[], Any], timeout_s: float = 90) -> Any:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if found := what():
                return found
            time.sleep(0.1)
        logs = [path for path in self.home.root.rglob("*.log") if path.stat().st_size]
        raise AssertionError("timed out\n" + "\n".join(f"--- {path}\n{path.read_text()[-2000:]}" for path in logs))


@pytest.fixture(scope="module")
def running() -> Iterator[Deployment]:
    started = Deployment()
    yield started
    started.command("down", "--purge", "-y")


def rows(first: int, count: int) -> str:
    turns = [
        [{"role": "user", "content": f"What comes after {n}?"}, {"role": "assistant", "content": f"{n + 1}"}]
        for n in range(first, first + count)
    ]
    return "\n".join(json.dumps({"messages": one}) for one in turns) + "\n"


@pytest.fixture(scope="module")
def base(running: Deployment, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("base") / "tiny-llama"
    write_tiny_base(folder)
    running.command("models", "import", f"path:{folder}", "--name", "tiny")
    return "tiny"


def test_one_job_through_four_kills_and_an_empty_redis(running: Deployment, base: str, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(rows(0, 40))
    (tmp_path / "valid.jsonl").write_text(rows(900, 8))
    job_id = running.command(
        "jobs", "create", "-m", base, "-t", str(tmp_path / "train.jsonl"), "-v", str(tmp_path / "valid.jsonl"),
        "--suffix", "survivor", "--max-steps", str(STEPS), "--save-steps", str(SAVE), "--max-length", "64", "-q",
    ).strip()  # fmt: skip

    def checkpointed() -> int:
        found = running.client.fine_tuning.jobs.checkpoints.list(job_id, limit=1).data
        return found[0].step_number if found else 0

    def beyond(step: int) -> int:
        """A step count some way past a checkpoint newer than `step`, while the job runs."""
        running.until(lambda: checkpointed() > step and running.extra(job_id)["state"] == "running")
        return checkpointed()

    def newest_attempt() -> dict[str, Any]:
        return running.extra(job_id)["attempts"][-1]

    def kill(pid: int) -> None:
        os.kill(pid, signal.SIGKILL)

    def live() -> tuple[str, list[int]]:
        locks = (running.home.root / "node" / "attempts").glob("*.lock")
        return next((path.stem, pids) for path in locks if (pids := processes.marked(path.stem)))

    done = beyond(0)
    _, trainers = running.until(lambda: _or_none(live))
    kill(trainers[0])
    running.until(lambda: newest_attempt()["no"] == 2 and newest_attempt()["state"] == "running")

    done = beyond(done)
    attempt, _ = running.until(lambda: _or_none(live))
    kill(int((running.home.root / "node" / "attempts" / f"{attempt}.lock").read_text()))
    running.until(lambda: newest_attempt()["no"] == 3 and newest_attempt()["state"] == "running")

    running.redis().flushall()
    kill(running.pid("scheduler"))
    kill(running.pid("node"))
    beyond(done)
    running.until(lambda: running.job(job_id)["status"] == "succeeded", 240)

    attempts = running.extra(job_id)["attempts"]
    assert [one["state"] for one in attempts] == ["failed", "lost", "succeeded"]
    assert all(one["start_step"] > 0 for one in attempts[1:])
    begun = -1
    for event in reversed(list(running.client.fine_tuning.jobs.list_events(job_id, limit=1000))):
        data = event.data if isinstance(event.data, dict) else {}
        if data.get("kind") == "started":
            begun = data["start_step"]
        elif event.type == "metrics":
            assert data["step"] > begun, "a step below the checkpoint was trained again"
    adapters = json.loads(running.command("adapters", "show", "survivor", "--json"))
    assert len(adapters["versions"]) == 1
    running.until(lambda: not any(processes.marked(attempt) for attempt in _attempts(running)), 20)
    check_adapter(running, tmp_path)


def check_adapter(running: Deployment, tmp_path: Path) -> None:
    """Downloaded, it is a PEFT folder that plain transformers and PEFT take."""
    folder = tmp_path / "survivor"
    running.command("adapters", "download", "survivor", "-o", str(folder))
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny-llama"
    assert not [path for path in folder.rglob("*") if path.suffix in (".bin", ".pt", ".pkl")]
    lineage = json.loads((folder / "tunery.json").read_text())
    assert lineage["lineage"]["job_id"].startswith(ids.JOB)
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = next((running.home.root / "node" / "models").glob("*/config.json")).parent
    base = AutoModelForCausalLM.from_pretrained(model)
    assert PeftModel.from_pretrained(base, folder).peft_config["default"].r == 16


def _attempts(running: Deployment) -> set[str]:
    return {path.stem for path in (running.home.root / "node" / "attempts").glob("*.log")}


def _or_none(look: Callable[[], Any]) -> Any:
    try:
        return look()
    except StopIteration:
        return None
