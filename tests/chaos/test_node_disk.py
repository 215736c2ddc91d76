"""F18: the file system of a node fills up while a job trains on it."""

import contextlib
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.fleet import Fleet

pytestmark = pytest.mark.chaos
MIB = 1 << 20


@pytest.fixture
def disk(running: Fleet) -> Iterator[Path]:
    """A node's home of 64 MiB."""
    home = running.home / "node"
    home.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m,mode=755", "tmpfs", home]).returncode:
        pytest.skip("mounting a file system needs root")
    yield home
    running.close()
    subprocess.run(["umount", "--lazy", home], check=True)


def test_a_checkpoint_that_finds_no_room_ends_the_attempt_and_the_job_waits_for_room(
    running: Fleet, disk: Path, succeeds: Callable[..., None]
) -> None:
    """The older checkpoint is kept, nobody tries again and again, and what is free again is used unaided."""
    running.node(MIN_FREE_DISK_BYTES=str(16 * MIB))
    job_id = running.submit("slow", steps=45)
    running.until(lambda: running.newest_checkpoint(job_id) >= 10)
    ballast = disk / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as out:
        while True:
            out.write(bytes(64 * 1024))
    running.until(lambda: running.attempts(job_id)[0].failure_code)
    log = running.home / "worker.log"
    running.until(lambda: "this node takes no new work" in log.read_text())
    running.until(lambda: all(one.ended_at for one in running.attempts(job_id)))
    kept = running.newest_checkpoint(job_id)
    assert kept in (10, 20) and running.state(job_id) == "queued"
    ballast.unlink()
    succeeds(running, job_id, steps=45)
    first, *between, last = running.attempts(job_id)
    assert (first.failure_code, last.start_step) == ("disk_full", kept)
    assert {one.failure_code for one in between} <= {"not_claimed"}
