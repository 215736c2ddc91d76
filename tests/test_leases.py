"""Claims, fences, leases and what follows from faults: races on real connections, each as its program's role."""

import threading
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import func, select, text, update
from sqlalchemy.exc import IntegrityError, ProgrammingError

from tests import factories
from tests.factories import Database, FleetNode, Tenant, Work
from tunery import adapters, leases, nodes, progress, queue
from tunery.contracts.events import Checkpoint as CheckpointSaid
from tunery.contracts.events import FileEntry
from tunery.db import transaction
from tunery.leases import Fenced
from tunery.models import AdapterVersion, Allocation, Attempt, Checkpoint, Event, Job, Slot, Usage
from tunery.states import FailureCode, JobState, StopReason


@pytest.fixture(autouse=True)
def _catalogue(base_model: str) -> None:
    """Every job here is for the module's one base model."""


def expire(work: Work, seconds: float = 1000) -> None:
    """Let so much time pass for the lease."""
    with factories.owner(work.node.database) as session, session.begin():
        past = func.now() - timedelta(seconds=seconds)
        session.execute(update(Attempt).where(Attempt.id == work.attempt_id).values(lease_expires_at=past))


def lose(work: Work) -> bool:
    """What the scheduler does when it looks at a lease that ran out."""
    with transaction(work.node.database.sessions("tunery_scheduler")) as session:
        return leases.declare_lost(session, work.attempt_id, grace_s=30)


def again(work: Work) -> Work:
    """The node comes back, its GPUs are freed, the job is assigned, claimed and runs."""
    with work.node.transaction() as session:
        leases.release(session, work.attempt_id)
    return factories.tell(factories.claim(factories.assign(work)), factories.started())


def messages(work: Work) -> list[str]:
    with factories.owner(work.node.database) as session:
        query = select(Event.message).where(Event.job_id == work.job_id).order_by(Event.seq)
        return list(session.scalars(query))


# ---- claiming -----------------------------------------------------------------------------------------------------


def test_one_of_eight_claims(project: Tenant, node: FleetNode) -> None:
    work = factories.assigned(project, node)
    together = threading.Barrier(8)

    def claim(number: int) -> bool:
        with node.transaction() as session:
            session.execute(select(1))  # connected, so that all start at once
            together.wait(10)
            return leases.claim(session, work.attempt_id, f"supervisor-{number}", 45) is not None

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(claim, range(8)))
    assert sum(won) == 1
    assert factories.attempt(work).claimed_by == f"supervisor-{won.index(True)}"
    assert factories.look(work).state == JobState.STARTING


def test_a_claim_and_a_cancel_at_once_agree(project: Tenant, database: Database) -> None:
    """Whoever comes first: the job is either cancelled and unclaimed, or claimed and asked to stop."""
    for _ in range(6):
        node = factories.node(database)
        work = factories.assigned(project, node)
        together = threading.Barrier(2)

        def claim(work: Work = work, node: FleetNode = node, together: threading.Barrier = together) -> bool:
            with node.transaction() as session:
                together.wait(10)
                return leases.claim(session, work.attempt_id, "s", 45) is not None

        def cancel(work: Work = work, together: threading.Barrier = together) -> None:
            together.wait(10)
            factories.cancel(work)

        with ThreadPoolExecutor(2) as pool:
            claimed, _ = pool.submit(claim), pool.submit(cancel).result()
        state = factories.look(work).state
        assert state == (JobState.CANCELLING if claimed.result() else JobState.CANCELLED)
        assert factories.free_bytes(node) == (0 if claimed.result() else node.usable_bytes)


def test_another_node_cannot_claim(project: Tenant, node: FleetNode, database: Database) -> None:
    work = factories.assigned(project, node)
    stranger = factories.node(database)
    with stranger.transaction() as session:
        assert leases.claim(session, work.attempt_id, "thief", 45) is None
        assert nodes.assigned(session, stranger.id) == []
    assert factories.attempt(work).state == "assigned"


# ---- fences -------------------------------------------------------------------------------------------------------

OUTPUT = [FileEntry(name=adapters.WEIGHTS, bytes=1, sha256=factories.SHA)]


def publish(session: Any, work: Work) -> None:
    held = leases.hold(session, work.attempt_id, work.fence)
    adapters.publish(session, held, adapters.Published("a/x", OUTPUT, {}))


WRITES: dict[str, Callable[[Any, Work], Any]] = {
    "renew": lambda session, work: leases.renew(session, work.attempt_id, work.fence, 45),
    "ingest": lambda session, work: progress.ingest(
        session, work.attempt_id, work.fence, [factories.metrics(9, step=9)]
    ),
    "checkpoint": lambda session, work: progress.store_checkpoint(
        session, work.attempt_id, work.fence, CheckpointSaid(step=9, path="/x", files=[]), "a/x", OUTPUT
    ),
    "publish": publish,
    "fail": lambda session, work: leases.fail(
        session, leases.hold(session, work.attempt_id, work.fence), FailureCode.INTERNAL, "x"
    ),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("how", ["lost", "lower fence", "ended", "another node's"])
def test_whoever_was_replaced_is_fenced(
    project: Tenant, node: FleetNode, database: Database, write: str, how: str
) -> None:
    work = factories.running(project, node)
    writer = work
    match how:
        case "lost":
            expire(work)
            assert lose(work)
            again(work)
        case "lower fence":
            writer = Work(work.tenant, node, work.job_id, work.attempt_id, work.fence - 1)
        case "ended":
            factories.publish(work)
        case _:
            writer = Work(work.tenant, factories.node(database), work.job_id, work.attempt_id, work.fence)
    before = factories.look(work), messages(work)
    with pytest.raises(Fenced), writer.node.transaction() as session:
        WRITES[write](session, writer)
    after = factories.look(work), messages(work)
    assert (before[0].state, before[0].progress, before[1]) == (after[0].state, after[0].progress, after[1])


def test_a_batch_sent_twice_is_stored_once(project: Tenant, node: FleetNode) -> None:
    work = factories.running(project, node)
    batch = [factories.metrics(2, step=1), factories.metrics(3, step=2)]
    factories.tell(work, *batch)
    once = messages(work)
    factories.tell(work, *batch)
    factories.checkpoint(work, 10)
    twice = messages(work)
    factories.checkpoint(work, 10)
    assert twice == [*once, "Checkpoint created at step 10"] == messages(work)


# ---- publishing ---------------------------------------------------------------------------------------------------


def test_a_job_publishes_once(project: Tenant, node: FleetNode, database: Database) -> None:
    work = factories.succeeded(project, node)
    with pytest.raises(Fenced):
        factories.publish(work)
    with factories.owner(database) as session:
        version = session.scalars(select(AdapterVersion).where(AdapterVersion.job_id == work.job_id)).one()
        copy = {column.name: getattr(version, column.name) for column in AdapterVersion.__table__.columns}
        session.add(AdapterVersion(**copy | {"id": uuid.uuid4(), "version": 2, "model_name": "ft:other"}))
        with pytest.raises(IntegrityError, match="uq_adapter_versions_job_id"):
            session.flush()


def test_a_publication_that_fails_leaves_nothing(project: Tenant, node: FleetNode, database: Database) -> None:
    """The version, the attempt's end and the job's success are one transaction."""
    work = factories.running(project, node)
    with pytest.raises(ZeroDivisionError), node.transaction() as session:
        held = leases.hold(session, work.attempt_id, work.fence)
        leases.begin_publishing(session, held)
        adapters.publish(session, held, adapters.Published("a/x", OUTPUT, {}))
        leases.succeed(session, held, tokens=1)
        session.flush()
        raise ZeroDivisionError
    assert factories.look(work).state == JobState.RUNNING and factories.free_bytes(node) == 0
    with factories.owner(database) as session:
        assert session.scalar(select(AdapterVersion.id).where(AdapterVersion.job_id == work.job_id)) is None


def test_two_jobs_of_one_name_publish_at_once(project: Tenant, database: Database) -> None:
    works = [factories.running(project, factories.node(database), suffix="same") for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(factories.publish, works))
    with factories.owner(database) as session:
        query = select(AdapterVersion.version).where(AdapterVersion.project_id == project.project_id)
        assert sorted(session.scalars(query)) == [1, 2, 3, 4]


def test_nobody_changes_a_version(project: Tenant, node: FleetNode) -> None:
    work = factories.succeeded(project, node)
    for statement in ("UPDATE adapter_versions SET sha256 = ''", "DELETE FROM adapter_versions"):
        for opened in (node.transaction, project.transaction):
            with pytest.raises(ProgrammingError, match="permission denied"), opened() as session:
                session.execute(text(f"{statement} WHERE job_id = :job"), {"job": work.job_id})


# ---- silence ------------------------------------------------------------------------------------------------------


def test_a_lease_that_is_renewed_is_never_lost(project: Tenant, node: FleetNode) -> None:
    work = factories.running(project, node)
    assert not lose(work)
    expire(work, seconds=20)  # run out, but within the grace
    assert not lose(work)
    expire(work)
    with node.transaction() as session:
        assert leases.renew(session, work.attempt_id, work.fence, 45) is None  # late, but before anybody noticed
    assert not lose(work) and factories.look(work).state == JobState.RUNNING


def test_a_lost_attempt_is_tried_again_from_its_checkpoint(project: Tenant, node: FleetNode) -> None:
    work = factories.running(project, node)
    factories.checkpoint(work, 20)
    expire(work)
    assert lose(work) and not lose(work)
    assert factories.look(work).state == JobState.QUEUED and factories.attempt(work).state == "lost"
    assert factories.free_bytes(node) == 0  # nobody has seen its trainer die
    with node.transaction() as session:
        assert nodes.unreleased(session, node.id) == [work.attempt_id]
    second = again(work)
    attempt = factories.attempt(second)
    assert (attempt.no, attempt.start_step) == (2, 20) and second.fence > work.fence
    assert attempt.resume_checkpoint_id is not None
    assert "tried again from its checkpoint at step 20" in " ".join(messages(work))


def test_the_third_fault_without_progress_fails_the_job(project: Tenant, node: FleetNode) -> None:
    work = factories.running(project, node)
    for count in (1, 2):
        assert factories.fault(work, FailureCode.TRAINER_CRASHED) == JobState.QUEUED
        assert factories.look(work).faults_without_progress == count
        work = again(work)
    assert factories.fault(work, FailureCode.TRAINER_CRASHED) == JobState.FAILED
    job = factories.look(work)
    assert job.error_code == "trainer_crashed" and job.finished_at is not None
    assert factories.free_bytes(node) == node.usable_bytes


def test_a_newer_checkpoint_resets_the_count(project: Tenant, node: FleetNode) -> None:
    work = factories.running(project, node)
    for step in range(1, 7):
        if step % 2:
            factories.checkpoint(work, step)
        assert factories.fault(work, FailureCode.WORKER_LOST) == JobState.QUEUED
        assert factories.look(work).faults_without_progress == (1 if step % 2 else 2)
        work = again(work)


def test_a_users_fault_is_not_tried_again(project: Tenant, node: FleetNode) -> None:
    work = factories.running(project, node)
    assert factories.fault(work, FailureCode.NON_FINITE_LOSS) == JobState.FAILED
    assert factories.look(work).faults_without_progress == 0


def test_an_attempt_that_nobody_claims_costs_the_job_nothing(
    project: Tenant, node: FleetNode, database: Database
) -> None:
    work = factories.assigned(project, node)
    for _ in range(4):
        with transaction(database.sessions("tunery_scheduler")) as session:
            assert work.attempt_id in queue.unclaimed_attempts(session, after_s=-1)
            assert leases.unassign(session, work.attempt_id)
            assert not leases.unassign(session, work.attempt_id)
        job = factories.look(work)
        assert (job.state, job.faults_without_progress) == (JobState.QUEUED, 0)
        assert factories.attempt(work).state == "lost" and factories.free_bytes(node) == node.usable_bytes
        work = factories.assign(work)
    with factories.owner(database) as session:
        assert session.scalar(select(Usage.id).where(Usage.job_id == work.job_id)) is None
    factories.tell(factories.claim(work), factories.started())


def test_an_abandoned_attempt_frees_its_gpu_at_once(project: Tenant, node: FleetNode) -> None:
    work = factories.running(project, node)
    with node.transaction() as session:
        assert leases.abandon(session, work.attempt_id, FailureCode.WORKER_LOST, "The supervisor is dead.")
    assert factories.look(work).state == JobState.QUEUED and factories.free_bytes(node) == node.usable_bytes


# ---- what is held -------------------------------------------------------------------------------------------------


def test_release_frees_exactly_once(project: Tenant, node: FleetNode, database: Database) -> None:
    work = factories.running(project, node)
    with ThreadPoolExecutor(8) as pool:

        def release(_: int) -> None:
            with node.transaction() as session:
                leases.release(session, work.attempt_id)

        list(pool.map(release, range(8)))
    assert factories.free_bytes(node) == node.usable_bytes
    with factories.owner(database) as session:
        held = Allocation.owner_attempt == work.attempt_id
        assert session.scalar(select(func.count()).select_from(Allocation).where(held)) == 1
        assert session.scalar(select(func.count()).select_from(Usage).where(Usage.job_id == work.job_id)) == 1
        assert session.scalar(select(Slot.attempt_id).where(Slot.node_id == node.id)) is None


def test_a_release_by_a_stranger_changes_nothing(
    project: Tenant, other_project: Tenant, node: FleetNode, database: Database
) -> None:
    work = factories.running(project, node)
    for opened in (other_project.transaction, factories.node(database).transaction):
        with opened() as session:
            leases.release(session, work.attempt_id)
    assert factories.free_bytes(node) == 0


def test_publishing_holds_no_gpu(project: Tenant, node: FleetNode) -> None:
    work = factories.running(project, node)
    with node.transaction() as session:
        leases.begin_publishing(session, leases.hold(session, work.attempt_id, work.fence))
    assert factories.free_bytes(node) == node.usable_bytes
    with node.transaction() as session:
        assert leases.renew(session, work.attempt_id, work.fence, 45) is None


# ---- stopping -----------------------------------------------------------------------------------------------------


def test_a_renewal_brings_the_wish_to_stop(project: Tenant, node: FleetNode) -> None:
    work = factories.cancelling(project, node)
    with node.transaction() as session:
        asked = leases.renew(session, work.attempt_id, work.fence, 45)
    assert asked is not None and asked.reason is StopReason.CANCEL
    assert asked.within_s is not None and 0 < asked.within_s <= leases.CANCEL_GRACE_S
    factories.stop(work)
    assert factories.look(work).state == JobState.CANCELLED and factories.attempt(work).state == "cancelled"


def test_a_job_that_finished_before_it_could_be_stopped_has_succeeded(project: Tenant, node: FleetNode) -> None:
    work = factories.publish(factories.cancelling(project, node))
    assert factories.look(work).state == JobState.SUCCEEDED


def test_a_drained_attempt_goes_back_to_the_queue_uncharged(project: Tenant, node: FleetNode) -> None:
    work = factories.running(project, node)
    factories.stop(work, StopReason.SHUTDOWN)
    job = factories.look(work)
    assert (job.state, job.faults_without_progress) == (JobState.QUEUED, 0)
    assert factories.attempt(work).state == "preempted" and factories.free_bytes(node) == node.usable_bytes


def test_a_job_keeps_its_place_in_the_queue(project: Tenant, node: FleetNode) -> None:
    work = factories.queued(project, node)
    before = factories.look(work).queued_at
    work = factories.tell(factories.claim(factories.assign(work)), factories.started())
    factories.fault(work, FailureCode.TRAINER_CRASHED)
    assert factories.look(work).queued_at == before


def test_a_checkpoint_of_a_step_is_one_row(project: Tenant, node: FleetNode, database: Database) -> None:
    work = factories.running(project, node)
    factories.checkpoint(work, 5)
    with factories.owner(database) as session:
        stored = session.scalars(select(Checkpoint).where(Checkpoint.job_id == work.job_id)).one()
        assert stored.attempt_id == work.attempt_id and stored.bytes == 10
        assert session.get_one(Job, work.job_id).event_seq == len(messages(work))


def test_events_are_stored_once_and_in_order_however_they_arrive(
    project: Tenant, node: FleetNode, database: Database
) -> None:
    """F28: shuffled within a batch, doubled, sent again, and late."""
    work = factories.running(project, node)
    after = factories.attempt(work).last_event_seq
    said = [factories.metrics(after + number, step=number) for number in range(1, 7)]
    batches = ([said[2], said[0], said[1], said[2]], said[:3], [said[5], *said[3:5], said[4]], said[1:3], said)
    for batch in batches:
        factories.tell(work, *batch)
    assert factories.attempt(work).last_event_seq == after + 6
    assert [text for text in messages(work) if text.startswith("Step ")] == [
        f"Step {number}/40, training loss=1.0000" for number in range(1, 7)
    ]
    with factories.owner(database) as session:
        query = text(
            "SELECT unnest(steps) FROM metric_chunks c JOIN metric_series m ON m.id = c.series_id "
            "WHERE m.job_id = :job AND m.name = 'train/loss' ORDER BY c.first_step"
        )
        stored = session.execute(query, {"job": work.job_id}).scalars().all()
        assert stored == [1, 2, 3, 4, 5, 6]
