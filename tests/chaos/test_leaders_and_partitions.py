"""A leader that freezes, a network that splits: nobody waits for the dead, and nobody works twice."""

import signal
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import func, select, update

from tests.chaos.faults import blackhole, hold
from tests.chaos.proxy import Proxy
from tests.chaos.support import failing
from tests.fleet import Fleet, Via, fleet
from tunery.embedded.servers import Servers
from tunery.models import Allocation, Attempt, Leader, Node

pytestmark = pytest.mark.chaos


def test_a_leader_killed_while_it_assigns_leaves_all_or_nothing(succeeds: Callable[..., None]) -> None:
    """F3: what it had written and not committed is as if it had never been."""
    with fleet() as running:
        first = running.scheduler("first", **failing("assign.made:kill"))
        running.node()
        job_id = running.submit("ok", steps=5)
        running.until(lambda: first.poll() is not None, 60)
        assert first.returncode == -signal.SIGKILL
        assert (running.state(job_id), running.attempts(job_id), running.nothing_held()) == ("queued", [], True)
        running.scheduler("second")
        succeeds(running, job_id, attempts=1)
        assert _epoch(running) == 2


def test_a_leader_frozen_while_it_assigns_is_replaced_and_its_late_writes_count_for_nothing(
    succeeds: Callable[..., None],
) -> None:
    """F3: it holds the leader's row, a job and a GPU, locked in an open transaction."""
    with fleet() as running:
        frozen = running.scheduler("first", **failing("assign.made:stop"))
        running.until(lambda: _epoch(running) == 1)
        running.scheduler("second")
        running.node()
        job_id = running.submit("ok", steps=5)
        running.until(lambda: _is_stopped(frozen.pid), 60)
        running.until(lambda: _epoch(running) == 2, 60)
        assert _is_stopped(frozen.pid), "the new leader did not wait for the old one"
        succeeds(running, job_id, attempts=1)
        frozen.send_signal(signal.SIGCONT)
        later = running.submit("ok", steps=5)
        succeeds(running, later, attempts=1)
        assert frozen.poll() is None, "the old leader follows"
        assert _epoch(running) == 2


def test_a_frozen_leader_is_replaced_in_under_ten_seconds_with_the_times_of_production(
    succeeds: Callable[..., None],
) -> None:
    """F3: by the database's clock, from the freeze to the start of a job that has waited since before it."""
    production = {"LEADER_TTL_S": "6", "LEADER_RENEW_S": "2", "DECIDE_S": "2", "SWEEP_S": "5"}
    with fleet() as running:
        frozen = running.scheduler("first", **production)
        running.until(lambda: _epoch(running) == 1)
        second = running.scheduler("second", **production)
        running.node()
        running.until(lambda: "started" in (running.home / "scheduler-second.log").read_text())
        succeeds(running, running.submit("ok", steps=5), attempts=1)
        with running.look() as session:  # nothing may start before the freeze: there is no room
            session.execute(update(Node).values(state="cordoned"))
        job_id = running.submit("ok", steps=5)
        running.until(lambda: running.state(job_id) == "queued")
        with running.look() as session:
            at = session.scalar(select(func.now()))
            frozen.send_signal(signal.SIGSTOP)
        running.until(lambda: _is_stopped(frozen.pid))
        with running.look() as session:
            session.execute(update(Node).values(state="up"))
        succeeds(running, job_id, attempts=1)
        (attempt,) = running.attempts(job_id)
        assert (attempt.assigned_at - at).total_seconds() < 10
        assert _epoch(running) == 2 and _is_stopped(frozen.pid)
        before = _all_of(running, job_id)
        frozen.send_signal(signal.SIGCONT)
        log = running.home / "scheduler-first.log"
        running.until(lambda: '"following"' in log.read_text() or '"deposed"' in log.read_text())
        later = running.submit("ok", steps=5)
        succeeds(running, later, attempts=1)
        assert (_epoch(running), frozen.poll(), second.poll()) == (2, None, None)
        assert _all_of(running, job_id) == before, "the old leader changed nothing of what was done without it"


def _all_of(running: Fleet, job_id: uuid.UUID) -> list[tuple[object, ...]]:
    """Every attempt of a job, and what was published."""
    attempts = [(one.id, one.no, one.fence, one.state, one.ended_at) for one in running.attempts(job_id)]
    return [*attempts, *((one.id, one.version) for one in running.versions(job_id))]


def test_a_message_rung_twice_is_claimed_once(tmp_path: Path, succeeds: Callable[..., None]) -> None:
    """F4: the relay dies after it has rung, before it has noted so."""
    with fleet() as running:
        running.node()
        first = running.scheduler("first", **failing("relay.rung:kill:nth=2", tmp_path))
        job_id = running.submit("ok", steps=5)
        running.until(lambda: first.poll() is not None)
        running.scheduler("second")
        succeeds(running, job_id, attempts=1)


@pytest.mark.parametrize("ways", ["both", "replies"])
def test_a_node_cut_off_from_postgres_loses_its_job_and_not_its_gpu(servers: Servers, ways: str) -> None:
    """F26: the job goes on elsewhere; the trainer that nobody can reach stops by itself; all heals unaided."""
    with Proxy.of(servers.admin_url) as proxy, fleet() as running:
        running.scheduler()
        running.node("a", via=Via(postgres=proxy), OUTAGE_GRACE_S="6")
        job_id = running.submit("slow", steps=150)
        running.until(lambda: running.newest_checkpoint(job_id) >= 10)
        (cut_off,) = running.attempts(job_id)
        proxy.set(blackhole(ways))  # type: ignore[arg-type]
        running.node("b")
        running.until(lambda: running.attempts(job_id)[0].state == "lost", 60)
        running.until(lambda: len(running.attempts(job_id)) == 2 and running.step(job_id) > 15, 60)
        assert _holds(running, cut_off), "a trainer may still be on it"
        running.until(lambda: not running.trainer_pids(cut_off.id), 60)
        proxy.set()
        running.until(lambda: not _holds(running, cut_off), 60)
        again = running.attempts(job_id)
        assert [one.node_id == cut_off.node_id for one in again] == [True, False]
        assert again[1].start_step >= 10
        with running.look() as session:
            session.get_one(Attempt, again[1].id).stop_reason = "drain"  # seen enough


def test_a_partition_shorter_than_the_lease_costs_nothing(servers: Servers, succeeds: Callable[..., None]) -> None:
    """F26."""
    with Proxy.of(servers.admin_url) as proxy, fleet() as running:
        running.scheduler()
        running.node("a", via=Via(postgres=proxy), LEASE_S="8")
        job_id = running.submit("slow", steps=50)
        running.until(lambda: running.step(job_id) > 1)
        proxy.set(hold())
        time.sleep(3)
        proxy.set()
        succeeds(running, job_id, attempts=1, steps=50)


def test_a_partition_in_the_middle_of_a_write_locks_nobody_out(servers: Servers) -> None:
    """F26: the cut-off node's transaction holds its job and its attempt; the reconciler must not wait for it."""
    with Proxy.of(servers.admin_url) as proxy, fleet() as running:
        running.scheduler()
        # Postgres ends the transaction after LEASE_S of silence: so long do we have to see it, and to cut the line
        running.node("a", via=Via(postgres=proxy), LEASE_S="8", **failing("events.written:sleep=30:nth=2"))
        job_id = running.submit("slow", steps=150)
        running.until(lambda: _in_a_transaction(running), 60)
        proxy.set(blackhole())
        (cut_off,) = running.attempts(job_id)
        other = running.submit("ok", steps=5)
        running.node("b")
        running.until(lambda: running.attempts(job_id)[0].state == "lost", 60)
        assert running.ends(other) == "succeeded"
        proxy.set()
        running.until(lambda: not running.trainer_pids(cut_off.id), 60)


def _in_a_transaction(running: Fleet) -> bool:
    """A node's program has been in one, without a word, for more than a moment."""
    query = (
        "SELECT count(*) FROM pg_stat_activity WHERE datname = %s AND usename = 'tunery_worker' "
        "AND state = 'idle in transaction' AND state_change < now() - interval '0.3 s'"
    )
    with psycopg.connect(running.servers.admin_url) as connection:
        return connection.execute(query, [running.database]).fetchone() != (0,)


def _epoch(running: Fleet) -> int:
    with running.look() as session:
        return session.scalar(select(Leader.epoch)) or 0


def _holds(running: Fleet, attempt: Attempt) -> bool:
    held = (Allocation.owner_attempt == attempt.id, Allocation.released_at.is_(None))
    with running.look() as session:
        return session.scalar(select(Allocation.id).where(*held)) is not None


def _is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
