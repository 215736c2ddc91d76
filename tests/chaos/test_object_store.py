"""The object store is slow, refuses, breaks off, lies, or is gone, and programs die between it and the database."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from tests.chaos.faults import (
    SLOW_DOWN,
    Fault,
    corrupt,
    http_error,
    latency,
    refuse,
    reset,
    reset_upload,
    throttle,
    truncate,
)
from tests.chaos.support import failing
from tests.fleet import Via, fleet

pytestmark = pytest.mark.chaos
WORDLESS_200 = http_error(200, b"", on="^PUT .*/output/", times=1)


@pytest.mark.parametrize(
    "fault",
    [
        http_error(503, SLOW_DOWN, fraction=0.5),
        reset(100, fraction=0.3),
        reset_upload(10, on="^PUT", fraction=0.3),
        truncate(200, on="^GET", fraction=0.3),
        latency(0.3, jitter_s=0.2),
        throttle(20_000),
    ],
    ids=["slow_down", "reset", "broken_upload", "truncated", "slow", "narrow"],
)
def test_a_job_gets_through_a_store_that_is_only_trouble(via: Via, fault: Fault, succeeds: Callable[..., None]) -> None:
    """F16: the lease is kept, nothing is charged, one version comes out."""
    assert via.s3
    with fleet(via=Via(s3=via.s3)) as running:
        running.scheduler()
        running.node()
        via.s3.set(fault)
        job_id = running.submit("ok", steps=25)
        succeeds(running, job_id, attempts=1, steps=25)
        assert len(via.s3.did) > 2, "the fault never came"


def test_training_goes_on_while_the_store_is_away_and_the_result_waits_for_it(
    via: Via, succeeds: Callable[..., None]
) -> None:
    """F16, promise 8."""
    assert via.s3
    with fleet(via=Via(s3=via.s3)) as running:
        running.scheduler()
        running.node()
        job_id = running.submit("slow", steps=25)
        running.until(lambda: running.step(job_id) > 1)
        via.s3.set(refuse())
        running.until(lambda: running.step(job_id) >= 20, 60)
        running.until(lambda: running.attempts(job_id)[0].state in ("publishing", "running"))
        via.s3.set()
        succeeds(running, job_id, attempts=1, steps=25)


@pytest.mark.parametrize("what", ["checkpoints", "output"])
def test_what_the_store_acknowledged_and_did_not_keep_is_stored_again(
    via: Via, what: str, succeeds: Callable[..., None]
) -> None:
    """F16: 200 to a PUT that never reached the disk."""
    assert via.s3
    with fleet(via=Via(s3=via.s3)) as running:
        running.scheduler()
        running.node()
        via.s3.set(http_error(200, b"", on=f"^PUT [^ ]*/{what}/", times=1))
        job_id = running.submit("slow", steps=25)
        succeeds(running, job_id, attempts=1, steps=25)
        assert via.s3.did["answered"] == 1
        assert running.newest_checkpoint(job_id) == 20


def test_an_artifact_that_does_not_come_back_as_it_went_is_never_published(via: Via) -> None:
    """F17."""
    assert via.s3
    with fleet(via=Via(s3=via.s3)) as running:
        running.scheduler()
        running.node()
        via.s3.set(corrupt(on="^GET [^ ]*/output/"))
        job_id = running.submit("ok", steps=3)
        assert running.ends(job_id) == "failed"
        assert {one.failure_code for one in running.attempts(job_id)} == {"corrupt_artifact"}
        assert not running.versions(job_id)


def test_one_flipped_byte_is_fetched_again(via: Via, succeeds: Callable[..., None]) -> None:
    """F17: whatever it hits first: the rows as they were uploaded, the checked rows, the result read back."""
    assert via.s3
    with fleet(via=Via(s3=via.s3)) as running:
        running.scheduler()
        running.node()
        for what in ("u/", "[^ ]*/datasets/", "[^ ]*/output/"):
            before = via.s3.did["corrupted"]
            via.s3.set(corrupt(on=f"^GET /[^/]+/{what}", times=1))
            job_id = running.submit("ok", steps=3, rows=_rows(what))
            succeeds(running, job_id, attempts=1)
            assert via.s3.did["corrupted"] == before + 1, what


def _rows(salt: str) -> bytes:
    """Rows of their own: what was checked once is not read again."""
    row = '{"messages": [{"role": "user", "content": "%s %d"}, {"role": "assistant", "content": "a"}]}\n'
    return "".join(row % (salt, number) for number in range(12)).encode()


def test_uploaded_rows_that_stay_damaged_are_no_fault_of_the_user(via: Via) -> None:
    """F17: not `invalid_training_file`, whatever the flipped byte did to the JSON."""
    assert via.s3
    with fleet(via=Via(s3=via.s3)) as running:
        running.scheduler()
        running.node()
        via.s3.set(corrupt(on="^GET /[^/]+/u/"))
        job_id = running.submit("ok", steps=3)
        running.until(lambda: "task will be tried again" in (running.home / "worker.log").read_text())
        assert running.state(job_id) == "validating"


@pytest.mark.parametrize("point", ["checkpoint.uploaded", "result.uploaded", "result.published", "attempt.claimed"])
def test_a_supervisor_killed_between_store_and_database(
    tmp_path: Path, point: str, succeeds: Callable[..., None]
) -> None:
    """F7, F8: what is not recorded does not count, what is published is published once."""
    with fleet() as running:
        running.scheduler()
        running.node(**failing(f"{point}:kill:once", tmp_path))
        job_id = running.submit("slow", steps=25)
        published = point == "result.published"
        succeeds(running, job_id, attempts=1 if published else 2, steps=25)
        first, *_ = running.attempts(job_id)
        assert (first.state, first.failure_code) == (("succeeded", None) if published else ("lost", "worker_lost"))
        running.until(running.nothing_left, 20)


def test_a_data_check_waits_for_the_store_and_uses_up_no_try(via: Via, succeeds: Callable[..., None]) -> None:
    """F16: however long it is away, no job fails for it."""
    assert via.s3
    with fleet(via=Via(s3=via.s3)) as running:
        running.scheduler()
        running.node()
        via.s3.set(refuse())
        job_id = running.submit("ok", steps=3, rows=_rows("waits"))

        def put_back() -> Any:
            with running.look() as session:
                query = "SELECT tries FROM tasks WHERE state = 'queued' AND error IS NOT NULL"
                return session.execute(text(query)).first()

        assert running.until(put_back).tries == 0
        via.s3.set()
        succeeds(running, job_id, attempts=1)


def test_a_data_check_killed_before_it_could_say_so_is_done_again(
    tmp_path: Path, succeeds: Callable[..., None]
) -> None:
    with fleet() as running:
        running.scheduler()
        node = running.node(**failing("task.checked:kill:once", tmp_path))
        job_id = running.submit("ok", steps=3, rows=_rows("killed"))
        running.until(lambda: node.poll() is not None)
        running.node()
        succeeds(running, job_id, attempts=1)
