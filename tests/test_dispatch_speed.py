"""Nothing on the way from acceptance to a trainer waits for a poll or for imports; and both are only shortcuts."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from tests.fleet import Fleet, fleet
from tests.servers import servers

NEVER = "300"
CUT = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s AND query LIKE 'LISTEN%%'"


@pytest.fixture(scope="module")
def running() -> Iterator[Fleet]:
    """A scheduler that looks around by itself only every five minutes."""
    with fleet() as started:
        started.scheduler(DECIDE_S=NEVER)
        started.node()
        yield started


def standing_by(running: Fleet) -> list[int]:
    """Supervisors of this fleet that have no attempt yet."""
    mark, found = f"TUNERY_FLEET={running.database}".encode(), []
    for entry in Path("/proc").iterdir():
        try:
            ours = entry.name.isdigit() and mark in (entry / "environ").read_bytes().split(b"\0")
            if ours and b"worker.standby" in (entry / "cmdline").read_bytes() and not has_attempt(entry):
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def has_attempt(entry: Path) -> bool:
    """Its log is the attempt's own."""
    return "/attempts/" in str((entry / "fd/1").readlink())


def test_commits_wake_the_scheduler(running: Fleet) -> None:
    assert running.ends(running.submit("ok")) == "succeeded"
    waiting = [running.submit("ok") for _ in range(2)]  # the second starts when the first one's room is free
    assert [running.ends(job_id) for job_id in waiting] == ["succeeded"] * 2


def test_a_scheduler_whose_ear_was_cut_off_listens_again_and_has_missed_nothing(running: Fleet) -> None:
    with psycopg.connect(servers().admin_url, autocommit=True) as connection:
        ears = connection.execute(CUT, [running.database]).fetchall()  # the forecaster has one of its own
        assert ears and set(ears) == {(True,)}
    assert running.ends(running.submit("ok")) == "succeeded"


def test_the_supervisor_that_stood_by_takes_the_next_attempt(running: Fleet) -> None:
    (spare,) = running.until(lambda: standing_by(running))
    job_id = running.submit("slow", steps=20)
    running.until(lambda: running.step(job_id) > 0)
    assert running.supervisor_pid(running.attempts(job_id)[0].id) == spare
    assert running.ends(job_id) == "succeeded"
    running.until(lambda: len(standing_by(running)) == 1)


def test_without_one_that_stands_by_another_is_started(running: Fleet) -> None:
    (spare,) = running.until(lambda: standing_by(running))
    os.kill(spare, signal.SIGKILL)
    assert running.ends(running.submit("ok")) == "succeeded"
    running.until(lambda: standing_by(running))


def test_it_goes_when_its_node_goes_however_that_ends(running: Fleet) -> None:
    for end in (signal.SIGTERM, signal.SIGKILL):
        node = running.node(f"gone-{end.name.lower()}")
        before = set(standing_by(running))
        running.until(lambda before=before: set(standing_by(running)) - before)
        mine = set(standing_by(running)) - before
        node.send_signal(end)
        node.wait(20)
        running.until(lambda mine=mine: not mine & set(standing_by(running)), 10)
