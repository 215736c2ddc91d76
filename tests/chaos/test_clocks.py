"""A program whose wall clock is wrong, and a trainer that says nothing any more."""

import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
from sqlalchemy import select

from tests.fleet import Fleet, fleet
from tunery.models import Attempt, Event

pytestmark = pytest.mark.chaos


@pytest.fixture(scope="module")
def clock(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A library that shifts the wall clock of whatever loads it."""
    if (compiler := shutil.which("cc")) is None:
        pytest.skip("shifting a program's clock needs a C compiler")
    made = tmp_path_factory.mktemp("clock") / "skew.so"
    source = Path(__file__).with_name("skew.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", made, source], check=True)
    made.parent.chmod(0o755)
    now = subprocess.run(
        [sys.executable, "-c", "import datetime; print(datetime.datetime.now().timestamp())"],
        env={"LD_PRELOAD": str(made), "TUNERY_CLOCK_SKEW_S": "-3600"}, check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert -3700 < float(now.stdout) - time.time() < -3500, "the clock is shifted"
    return str(made)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_clock_that_is_off_changes_no_lease_and_no_order(
    clock: str, sign: int, succeeds: Callable[..., None]
) -> None:
    """F23: the scheduler by an hour; node and supervisors by ten minutes the other way, because S3 bears no hour."""
    with fleet() as running:
        running.scheduler(PRELOAD=clock, CLOCK_SKEW_S=str(sign * 3600))
        running.node("a", PRELOAD=clock, CLOCK_SKEW_S=str(sign * -600))
        job_id = running.submit("slow", steps=60)
        running.until(lambda: running.newest_checkpoint(job_id) >= 10, 60)
        succeeds(running, job_id, attempts=1, steps=60)
        with running.look() as session:
            attempt = session.scalars(select(Attempt).where(Attempt.job_id == job_id)).one()
            told = session.scalars(select(Event).where(Event.job_id == job_id).order_by(Event.seq)).all()
        assert attempt.assigned_at <= attempt.claimed_at <= attempt.started_at <= attempt.ended_at
        now = datetime.now(UTC)
        assert all(abs((now - one.created_at).total_seconds()) < 300 for one in told), "the database's clock alone"


def test_a_node_whose_clock_the_object_store_refuses_says_so_and_works_when_it_is_set(
    clock: str, running: Fleet, succeeds: Callable[..., None]
) -> None:
    """F23: by an hour it cannot sign a request. Nothing is blamed on the user."""
    node = running.node("a", PRELOAD=clock, CLOCK_SKEW_S="3600")
    job_id = running.submit("ok", steps=5)
    log = running.home / "worker-a.log"
    running.until(lambda: "their clocks differ" in log.read_text())
    assert running.state(job_id) == "validating"
    node.kill()
    node.wait()
    running.node("a")
    succeeds(running, job_id, attempts=1)


def test_a_trainer_that_hangs_is_ended_and_its_job_goes_on_from_the_checkpoint(
    running: Fleet, succeeds: Callable[..., None]
) -> None:
    """F30."""
    running.node(HANG_S="6")
    job_id = running.submit("hang-15", steps=25)
    succeeds(running, job_id, attempts=2, steps=25)
    hung, resumed = running.attempts(job_id)
    assert (hung.state, hung.failure_code, resumed.start_step) == ("failed", "trainer_hung", 10)
    assert not running.trainer_pids(hung.id)
