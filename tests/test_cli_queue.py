"""`tunery queue`, `queue simulate` and `jobs why`, as real processes against the real api and a real forecaster."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pydantic import SecretStr
from sqlalchemy import text

from scheduler.forecast.service import Forecaster
from scheduler.policy import schedule
from tests import factories
from tests.factories import Database, Tenant
from tunery import queue
from tunery.db import transaction
from tunery.settings import SchedulerSettings

ROOT = Path(__file__).parent.parent
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def tunery(api_url: str, project: Tenant, tmp_path: Path) -> Run:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TUNERY_")}
    home = {"HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path)}
    environment = kept | home | {"TUNERY_API_URL": api_url, "TUNERY_API_KEY": project.key}

    def call(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "tunery.cli", *words]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, cwd=ROOT)

    return call


@pytest.fixture
def forecaster(waiting: list[factories.Work], database: Database) -> Iterator[Forecaster]:
    """Leads, decides once, forecasts once, and answers questions until the test is over."""
    sessions = database.sessions("tunery_scheduler")
    with transaction(sessions) as session:
        epoch = queue.lead(session, "the tests", 600)
    assert epoch is not None
    with transaction(sessions) as session:
        seen = queue.snapshot(session, 60)
    queue.apply(sessions, epoch, schedule(seen))
    url = SecretStr(database.url("tunery_scheduler"))
    made = Forecaster(sessions, SchedulerSettings(database_url=url, redis_url=SecretStr("redis://unused")), "the tests")
    made.tell()
    stop = threading.Event()

    def answer() -> None:
        while not stop.wait(0.02):
            made.answer()

    thread = threading.Thread(target=answer)
    thread.start()
    yield made
    stop.set()
    thread.join()


@pytest.fixture
def waiting(project: Tenant, other_project: Tenant, database: Database, base_model: str) -> list[factories.Work]:
    factories.end_everything(database)
    node = factories.node(database, gpus=1)
    factories.running(project, node)
    factories.queued(other_project, node)
    return [factories.queued(project, node) for _ in range(2)]


def test_the_queue_in_a_table_as_json_and_as_ids(
    waiting: list[factories.Work], forecaster: Forecaster, tunery: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = tunery("queue")
    assert shown.returncode == 0, shown.stderr
    head, *rows = shown.stdout.splitlines()
    assert head.split() == ["JOB", "POS", "STARTS", "IN", "ASKS", "WHY"]
    assert [row.split()[0] for row in rows] == [work.id for work in waiting]
    assert "1 of 1 suitable devices are busy" in rows[0]
    assert "2 of your jobs wait, 1 of other projects; 0 of 1 GPUs are free" in shown.stderr
    assert tunery("queue", "-q").stdout.split() == [work.id for work in waiting]
    told = json.loads(tunery("queue", "--json").stdout)
    assert [job["id"] for job in told["jobs"]] == [work.id for work in waiting]
    with capsys.disabled():
        if os.environ.get("SHOW"):
            print(shown.stdout, shown.stderr)


def test_a_refused_job_leaves_no_uploaded_file_behind(
    waiting: list[factories.Work], tunery: Run, tmp_path: Path, database: Database
) -> None:
    rows = tmp_path / "train.jsonl"
    rows.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n' * 10)
    with factories.owner(database) as session:
        before = session.scalar(text("SELECT count(*) FROM files WHERE deleted_at IS NULL"))
    refused = tunery("jobs", "create", "-m", "tiny", "-t", str(rows), "--node-label", "rack=z")
    assert refused.returncode == 6 and "No node has the labels rack=z." in refused.stderr
    with factories.owner(database) as session:
        assert session.scalar(text("SELECT count(*) FROM files WHERE deleted_at IS NULL")) == before


def test_why_has_the_sentence_the_place_the_start_and_what_would_help(
    waiting: list[factories.Work], forecaster: Forecaster, tunery: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = tunery("jobs", "why", waiting[1].id)
    assert shown.returncode == 0, shown.stderr
    assert "needs 1 GPU with 1.1 GB; 1 of 1 suitable devices are busy; a place is free by" in shown.stdout
    assert "of other projects" in shown.stdout and "--shareable" in shown.stdout
    assert "starts      in " in shown.stdout
    assert json.loads(tunery("jobs", "why", waiting[1].id, "--json").stdout)["reason"]["code"] == "busy"
    with capsys.disabled():
        if os.environ.get("SHOW"):
            print(shown.stdout, tunery("jobs", "show", waiting[1].id).stdout)
    factories.cancel(waiting[1])
    assert "does not wait" in tunery("jobs", "why", waiting[1].id).stderr


def test_simulate_counts_a_local_file_and_sends_only_numbers(
    waiting: list[factories.Work], forecaster: Forecaster, tunery: Run, tmp_path: Path, database: Database,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    rows = tmp_path / "train.jsonl"
    rows.write_text('{"messages": []}\n' * 30)
    with factories.owner(database) as session:
        before = session.scalar(text("SELECT count(*) FROM files"))
    shown = tunery("queue", "simulate", "-m", "tiny", "-t", str(rows), "--time-limit", "1h")
    assert shown.returncode == 0, shown.stderr
    assert "starts" in shown.stdout and "2 of your project's" in shown.stdout and "after 1h 00m" in shown.stdout
    with factories.owner(database) as session:
        assert session.scalar(text("SELECT count(*) FROM files")) == before
    assert json.loads(tunery("queue", "simulate", "-m", "tiny", "--rows", "9", "--json").stdout)["position"] == 4
    assert tunery("queue", "simulate", "-m", "tiny").returncode == 2
    with capsys.disabled():
        if os.environ.get("SHOW"):
            print(shown.stdout)
