"""Leadership and its epochs, the snapshot, decisions that the schema refuses, and clocks nobody watched."""

import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import delete, func, select, text, update
from sqlalchemy.exc import IntegrityError

from tests import factories
from tests.factories import GIB, Database, FleetNode, Tenant, Work
from tunery import queue
from tunery.contracts.scheduling import Plan, Start
from tunery.db import Sessions, transaction
from tunery.models import Attempt, Job, Leader, Node, Outbox, Project
from tunery.queue import Deposed

TTL_S = 6


@pytest.fixture
def scheduler(database: Database, base_model: str) -> Iterator[Sessions]:
    """The scheduler's sessions; nobody leads yet."""
    with factories.owner(database) as session, session.begin():
        session.execute(delete(Leader))
    return database.sessions("tunery_scheduler")


def lead(scheduler: Sessions, holder: str, ttl_s: float = TTL_S) -> int | None:
    with transaction(scheduler) as session:
        return queue.lead(session, holder, ttl_s)


def expire(database: Database) -> None:
    with factories.owner(database) as session, session.begin():
        session.execute(text("UPDATE leader SET expires_at = now() - interval '1 second'"))


def test_one_of_eight_leads(scheduler: Sessions) -> None:
    together = threading.Barrier(8)

    def stand(number: int) -> int | None:
        together.wait(10)
        return lead(scheduler, f"s{number}")

    with ThreadPoolExecutor(8) as pool:
        epochs = list(pool.map(stand, range(8)))
    assert sorted(epoch for epoch in epochs if epoch is not None) == [1]


def test_an_expired_leader_is_replaced_under_a_new_epoch(scheduler: Sessions, database: Database) -> None:
    assert lead(scheduler, "a") == 1 and lead(scheduler, "b") is None
    assert lead(scheduler, "a") == 1  # renewed
    expire(database)
    assert lead(scheduler, "b") == 2
    assert lead(scheduler, "a") is None
    with transaction(scheduler) as session:
        queue.resign(session, "a")  # not a's to give up
    assert lead(scheduler, "a") is None
    with transaction(scheduler) as session:
        queue.resign(session, "b")
    assert lead(scheduler, "a") == 3


def test_a_leader_that_slept_and_woke_in_time_keeps_its_epoch(scheduler: Sessions, database: Database) -> None:
    assert lead(scheduler, "a") == 1
    expire(database)
    assert lead(scheduler, "a") == 1  # nobody else had come


def test_a_deposed_epoch_applies_nothing(
    scheduler: Sessions, database: Database, project: Tenant, node: FleetNode
) -> None:
    work = factories.queued(project, node)
    start = Start(work.job_id, node.id, node.gpu_ids, GIB)
    assert lead(scheduler, "a") == 1
    expire(database)
    with pytest.raises(Deposed):
        queue.apply(scheduler, 1, Plan((start,)))  # expired, though nobody has taken over yet
    assert lead(scheduler, "b") == 2
    for decide in (
        lambda session: queue.start(session, 1, start),
        lambda session: queue.record(session, 1, Plan(), queue.Mirror()),
        lambda session: queue.forgive_outage(session, 1, 10, 45),
    ):
        with pytest.raises(Deposed), transaction(scheduler) as session:
            decide(session)
    assert factories.look(work).fence == 0 and factories.free_bytes(node) == node.usable_bytes
    assert len(queue.apply(scheduler, 2, Plan((start,)))) == 1


def test_nobody_takes_over_in_the_middle_of_a_decision(scheduler: Sessions, database: Database) -> None:
    """The decision's transaction holds the row: a successor waits for it, or gives up."""
    assert lead(scheduler, "a") == 1
    with transaction(scheduler) as deciding:
        queue.assert_leader(deciding, 1)
        with pytest.raises(Exception, match="lock timeout"), transaction(scheduler) as session:
            session.execute(text("SET LOCAL lock_timeout = '50ms'"))
            queue.lead(session, "b", TTL_S)


def test_a_refused_decision_costs_only_itself(
    scheduler: Sessions, database: Database, project: Tenant, node: FleetNode
) -> None:
    roomy = factories.node(database)
    first, second, third = (factories.queued(project, node) for _ in range(3))
    lead(scheduler, "a")
    starts = (
        Start(first.job_id, node.id, node.gpu_ids, GIB),
        Start(second.job_id, node.id, node.gpu_ids, GIB),  # the GPU is taken by now
        Start(third.job_id, roomy.id, roomy.gpu_ids, GIB),
    )
    assert len(queue.apply(scheduler, 1, Plan(starts))) == 2
    assert factories.look(second).fence == 0 < factories.look(first).fence < factories.look(third).fence
    with factories.owner(database) as session:
        rung = set(session.scalars(select(Outbox.payload["node_id"].astext).where(Outbox.topic == "ring_node")))
        assert {str(node.id), str(roomy.id)} <= rung


def test_a_job_that_no_longer_waits_is_not_started(scheduler: Sessions, project: Tenant, node: FleetNode) -> None:
    work = factories.queued(project, node)
    lead(scheduler, "a")
    factories.cancel(work)
    assert queue.apply(scheduler, 1, Plan((Start(work.job_id, node.id, node.gpu_ids, GIB),))) == []
    assert factories.free_bytes(node) == node.usable_bytes


def test_a_job_whose_project_was_blocked_meanwhile_is_not_started(
    scheduler: Sessions, database: Database, project: Tenant, node: FleetNode
) -> None:
    work = factories.queued(project, node)
    assert lead(scheduler, "a") == 1
    block = update(Project).where(Project.id == project.project_id)
    start = Start(work.job_id, node.id, node.gpu_ids, GIB)
    for blocked, made in (("its budget is used up", 0), (None, 1)):
        with factories.owner(database) as session, session.begin():
            session.execute(block.values(blocked=blocked))
        assert len(queue.apply(scheduler, 1, Plan((start,)))) == made


def test_the_snapshot_holds_what_waits_and_what_is_free(
    scheduler: Sessions, database: Database, project: Tenant, node: FleetNode
) -> None:
    busy, silent = factories.node(database, slots=2), factories.node(database)
    waiting, taken = factories.queued(project, node), factories.queued(project, node)
    factories.assign(taken, busy, gpu_bytes=3 * GIB, exclusive=False)
    with factories.owner(database) as session, session.begin():
        old = func.now() - text("interval '1 hour'")
        session.execute(update(Node).where(Node.id == silent.id).values(last_seen_at=old))
    with transaction(scheduler) as session:
        seen = queue.snapshot(session, silent_after_s=60)
    jobs = [job for job in seen.jobs if job.project_id == project.project_id]
    assert [job.id for job in jobs] == [waiting.job_id] and jobs[0].required_bytes == GIB
    nodes = {view.id: view for view in seen.nodes}
    assert (nodes[silent.id].schedulable, nodes[silent.id].why_not) == (False, "silent")
    assert nodes[node.id].schedulable and nodes[node.id].free_slots == 1
    assert nodes[busy.id].free_slots == 1 and nodes[busy.id].gpus[0].free_bytes == 5 * GIB


def test_time_in_which_nobody_looked_counts_against_no_lease(
    scheduler: Sessions, database: Database, project: Tenant, node: FleetNode
) -> None:
    work = factories.running(project, node)
    lead(scheduler, "a")
    with factories.owner(database) as session, session.begin():
        session.execute(text("UPDATE leader SET swept_at = now() - interval '10 minutes'"))
        session.execute(
            text("UPDATE attempts SET lease_expires_at = now() - interval '9 minutes' WHERE id = :id"),
            {"id": work.attempt_id},
        )
    with transaction(scheduler) as session:
        assert work.attempt_id in queue.expired_attempts(session, 30)
        assert queue.forgive_outage(session, 1, longer_than_s=60, lease_s=45)
        assert work.attempt_id not in queue.expired_attempts(session, 30)
        assert not queue.forgive_outage(session, 1, longer_than_s=60, lease_s=45)


def test_fences_rise_whoever_is_assigned(project: Tenant, database: Database, base_model: str) -> None:
    works = [factories.assigned(project, factories.node(database)) for _ in range(3)]
    assert [work.fence for work in works] == sorted({work.fence for work in works})


def test_two_live_attempts_of_one_job_cannot_be(
    scheduler: Sessions, database: Database, project: Tenant, node: FleetNode
) -> None:
    work, other = factories.assigned(project, node), factories.node(database)
    lead(scheduler, "a")
    assert queue.apply(scheduler, 1, Plan((Start(work.job_id, other.id, other.gpu_ids, GIB),))) == []
    with factories.owner(database) as session:
        query = select(func.count()).select_from(Attempt).where(Attempt.job_id == work.job_id)
        assert session.scalar(query) == 1
        assert session.get_one(Job, work.job_id).fence == work.fence
    assert factories.free_bytes(other) == other.usable_bytes and uuid.UUID(int=0) != work.attempt_id


def test_a_gpu_cannot_be_given_away_twice(project: Tenant, database: Database, base_model: str) -> None:
    """Not by a scheduler that is wrong, nor by two at once: the schema refuses."""
    node = factories.node(database, slots=4, usable_bytes=8 * GIB)
    first = factories.assign(factories.queued(project, node), gpu_bytes=5 * GIB, exclusive=False)
    for exclusive, size in ((False, 4 * GIB), (True, 0)):
        second = factories.queued(project, node)
        with pytest.raises(IntegrityError, match="not_overcommitted"):
            factories.assign(second, gpu_bytes=size, exclusive=exclusive)
        assert factories.look(second).fence == 0
    factories.assign(second, gpu_bytes=3 * GIB, exclusive=False)
    assert factories.free_bytes(node) == 0
    factories.cancel(first)
    assert factories.free_bytes(node) == 5 * GIB


def test_a_race_for_one_gpu_has_one_winner(project: Tenant, database: Database, base_model: str) -> None:
    node = factories.node(database, slots=8)
    works = [factories.queued(project, node) for _ in range(8)]
    together = threading.Barrier(8)

    def take(work: Work) -> bool:
        try:
            with transaction(database.sessions("tunery_scheduler")) as session:
                session.execute(select(1))
                together.wait(10)
                return queue.assign(session, Start(work.job_id, node.id, node.gpu_ids, GIB)) is not None
        except IntegrityError:
            return False

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(take, works)) == 1


def test_a_node_has_as_many_attempts_as_slots(project: Tenant, database: Database, base_model: str) -> None:
    node = factories.node(database, slots=1)
    factories.assign(factories.queued(project, node), gpu_bytes=GIB, exclusive=False)
    with pytest.raises(queue.NodeFull):
        factories.assign(factories.queued(project, node), gpu_bytes=GIB, exclusive=False)
