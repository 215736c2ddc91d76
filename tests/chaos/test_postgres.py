"""Postgres restarts, hangs, fills up, locks, and loses the reply to a commit: no job notices."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

from tests.chaos.faults import drop_reply_to
from tests.fleet import Fleet, Via, fleet
from tests.servers import private_servers, temporary_home
from tunery.embedded.servers import Servers

pytestmark = pytest.mark.chaos


def stop_fast(servers: Servers) -> None:
    servers.children["postgres"].stop()
    servers.children["postgres"].start()


def stop_immediate(servers: Servers) -> None:
    child = servers.children["postgres"]
    assert child.process is not None
    child.process.send_signal(signal.SIGQUIT)
    child.process.wait(20)


def kill(servers: Servers) -> None:
    child = servers.children["postgres"]
    child.process.kill()  # type: ignore[union-attr]
    child.process.wait(20)  # type: ignore[union-attr]


def test_a_job_and_the_api_outlive_three_kinds_of_restart(mine: Servers, succeeds: Callable[..., None]) -> None:
    """F12."""
    with fleet(on=mine) as running:
        running.scheduler(LEASE_S="20")
        node, api = running.node(LEASE_S="20"), running.serve_api()
        job_id = running.submit("slow", steps=60)
        running.until(lambda: running.step(job_id) > 1)
        with running.client() as client:
            for restart in (stop_fast, stop_immediate, kill):
                restart(mine)
                _api_waits_and_serves_again(running, mine, client)
            step = running.step(job_id)
            assert step < 60, "the job was over before the last restart"
            assert client.post("/v1/fine_tuning/jobs", json={"model": "none"}).status_code == 400
        succeeds(running, job_id, attempts=1, steps=60)
        assert node.poll() is None
        assert api.poll() is None


def _api_waits_and_serves_again(running: Fleet, servers: Servers, client) -> None:  # type: ignore[no-untyped-def]
    answers = []

    def served() -> bool:
        servers.tend()
        answer = client.get("/v1/fine_tuning/jobs")
        answers.append((answer.status_code, "retry-after" in answer.headers))
        return answer.status_code == 200

    running.until(served, 30)
    running.until(lambda: _takes_connections(servers), 30)  # a killed server's last backends may answer once more
    assert set(answers) <= {(503, True), (200, False)}, answers


def _takes_connections(servers: Servers) -> bool:
    with contextlib.suppress(psycopg.OperationalError), psycopg.connect(servers.admin_url, connect_timeout=3):
        return True
    servers.tend()
    return False


def test_a_server_that_stops_answering_ends_nothing(mine: Servers, succeeds: Callable[..., None]) -> None:
    """F12, F14: every backend is suspended, so that nothing is refused and nothing is answered."""
    with fleet(on=mine) as running:
        running.scheduler(LEASE_S="20")
        running.node(LEASE_S="20")
        job_id = running.submit("slow", steps=40)
        running.until(lambda: running.step(job_id) > 1)
        postmaster = mine.children["postgres"].pid
        assert postmaster
        pids = [postmaster, *_children(postmaster)]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(4)
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
        succeeds(running, job_id, attempts=1, steps=40)


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_no_write_happens_twice_or_never_when_replies_to_commits_are_lost(
    servers: Servers, via: Via, succeeds: Callable[..., None]
) -> None:
    """F13: every eighth commit of every program succeeds without its author's knowing."""
    assert via.postgres
    with fleet(via=via) as running:
        running.scheduler()
        running.node()
        via.postgres.set(drop_reply_to("COMMIT", times=None, fraction=0.12))
        jobs = [running.submit("ok", steps=40), running.submit("slow", steps=25)]
        for job_id in jobs:
            running.ends(job_id)
        lost = via.postgres.did["replies_dropped"]
        via.postgres.set()
        for job_id, steps in zip(jobs, (40, 25), strict=True):
            succeeds(running, job_id, steps=steps)
        assert lost > 5


def test_renewals_do_not_wait_behind_a_lock_on_the_jobs(running: Fleet, succeeds: Callable[..., None]) -> None:
    """F14: whatever locks the jobs for longer than a lease lives costs no attempt."""
    running.node()
    job_id = running.submit("slow", steps=60)
    running.until(lambda: running.step(job_id) > 1)
    with running.look() as session:
        session.connection().exec_driver_sql("LOCK TABLE jobs IN ACCESS EXCLUSIVE MODE")
        time.sleep(6)  # a lease lives 3 s, and is lost 1 s later
    succeeds(running, job_id, attempts=1, steps=60)


def test_a_running_job_needs_no_further_connection(mine: Servers, succeeds: Callable[..., None]) -> None:
    """F14: every connection that Postgres has left is taken by somebody else."""
    with fleet(on=mine) as running:
        running.scheduler()
        running.node()
        job_id = running.submit("slow", steps=60)
        running.until(lambda: running.step(job_id) > 3)
        taken = []
        with pytest.raises(psycopg.OperationalError, match="slots"):
            while True:
                taken.append(psycopg.connect(running.url("tunery_api")))
        time.sleep(5)
        assert len(running.attempts(job_id)) == 1
        for connection in taken:
            connection.close()
        succeeds(running, job_id, attempts=1, steps=60)


def test_a_deadlock_is_tried_again_by_whoever_lost(running: Fleet, succeeds: Callable[..., None]) -> None:
    """F15: somebody locks an attempt before its job, the wrong way round."""
    running.node()
    job_id = running.submit("slow", steps=60)
    running.until(lambda: running.step(job_id) > 1)
    (attempt,) = running.attempts(job_id)
    lost_here = 0
    for _ in range(3):
        try:
            with running.look() as session:
                session.execute(text("SELECT 1 FROM attempts WHERE id = :id FOR UPDATE"), {"id": attempt.id})
                time.sleep(0.7)  # the recorder has locked the job by now, and waits for the attempt
                session.execute(text("SELECT 1 FROM jobs WHERE id = :id FOR UPDATE"), {"id": job_id})
        except OperationalError:
            lost_here += 1
    with running.look() as session:
        query = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
        running.until(lambda: (session.scalar(text(query)) or 0) > lost_here, 5)
    succeeds(running, job_id, attempts=1, steps=60)


def test_a_full_disk_is_a_503_and_everything_goes_on_when_there_is_space_again(
    succeeds: Callable[..., None],
) -> None:
    """F19: Postgres and all it has lie on a small file system that fills up while a job runs."""
    home = temporary_home()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=900m,mode=711", "tmpfs", home.root]).returncode:
        pytest.skip("mounting a file system needs root")
    try:
        home.create()
        with private_servers(home=home) as mine, fleet(on=mine) as running:
            running.scheduler(LEASE_S="20")
            running.node(LEASE_S="20")
            running.serve_api()
            job_id = running.submit("slow", steps=80)
            running.until(lambda: running.step(job_id) > 1)
            ballast = home.root / "ballast"
            with running.client() as client:
                with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as out:
                    while True:
                        out.write(bytes(1 << 20))
                rows = b'{"messages": [{"role": "user", "content": "%s"}]}\n' % (b"x" * 2000)

                def refused() -> bool:
                    mine.tend()
                    answer = client.get("/v1/fine_tuning/jobs")
                    assert answer.status_code in (200, 503), answer.text
                    upload = client.post(
                        "/v1/files", files={"file": ("a.jsonl", rows * 200)}, data={"purpose": "fine-tune"}
                    )
                    assert upload.status_code in (200, 503), upload.text
                    return upload.status_code == 503

                running.until(refused, 30)
                ballast.unlink()
                _api_waits_and_serves_again(running, mine, client)
            assert mine.children["s3"].restarts == 1  # what failed to write its index might fail ever after
            succeeds(running, job_id, attempts=1, steps=80)
    finally:
        subprocess.run(["umount", "--lazy", home.root], check=True)
