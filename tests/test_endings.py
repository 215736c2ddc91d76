"""How attempts end, as far as the scheduler cares: whose time it was, limits that are kept, room made for others."""

from collections.abc import Callable, Iterator

import pytest
from sqlalchemy import delete, func, select, text

from tests import factories
from tests.factories import GIB, Database, FleetNode, Tenant, Work
from tunery import leases, queue
from tunery.contracts.scheduling import Hold, HoldKind, Plan, Preempt, PreemptKind, Standing, Start
from tunery.db import Sessions, transaction
from tunery.models import Event, Leader, Outbox, Usage
from tunery.models import Project as ProjectRow
from tunery.states import FailureCode, JobState, StopReason

HOUR = 3600.0


@pytest.fixture
def scheduler(database: Database, base_model: str) -> Iterator[Sessions]:
    """The leader's sessions; its epoch is 1."""
    with factories.owner(database) as session, session.begin():
        session.execute(delete(Leader))
    sessions = database.sessions("tunery_scheduler")
    with transaction(sessions) as session:
        assert queue.lead(session, "test", ttl_s=600) == 1
    yield sessions


def shift(work: Work, column: str, seconds: float) -> None:
    """That moment of the attempt was so long ago."""
    statement = f"UPDATE attempts SET {column} = now() - make_interval(secs => :s) WHERE id = :id"
    with factories.owner(work.node.database) as session, session.begin():
        session.execute(text(statement), {"s": seconds, "id": work.attempt_id})


def saved(work: Work, step: int, ago: float) -> None:
    factories.checkpoint(work, step)
    with factories.owner(work.node.database) as session, session.begin():
        statement = "UPDATE checkpoints SET created_at = now() - make_interval(secs => :s) WHERE attempt_id = :id"
        session.execute(text(statement + " AND step = :step"), {"s": ago, "id": work.attempt_id, "step": step})


def service(work: Work) -> float:
    with factories.owner(work.node.database) as session:
        return session.get_one(ProjectRow, work.tenant.project_id).service


def usage(work: Work) -> Usage:
    with factories.owner(work.node.database) as session:
        return session.scalars(select(Usage).where(Usage.attempt_id == work.attempt_id)).one()


def messages(work: Work) -> list[str]:
    with factories.owner(work.node.database) as session:
        return list(session.scalars(select(Event.message).where(Event.job_id == work.job_id).order_by(Event.seq)))


# ---- whose time it was ------------------------------------------------------------------------------------------


def an_hour_of_training(project: Tenant, node: FleetNode) -> Work:
    """Assigned an hour ago, trained from ten minutes later on, a checkpoint after 40 minutes."""
    work = factories.tell(factories.running(project, node), factories.metrics(2, step=1))
    assert factories.attempt(work).first_step_at is not None
    shift(work, "assigned_at", HOUR)
    shift(work, "first_step_at", HOUR - 600)
    saved(work, 10, HOUR - 2400)
    return work


def lost(work: Work) -> None:
    """The node finds its supervisor dead."""
    with work.node.transaction() as session:
        assert leases.abandon(session, work.attempt_id, FailureCode.WORKER_LOST, "It is gone.")


ENDS: dict[str, tuple[Callable[[Work], object], tuple[float, float, float, float]]] = {
    "success": (factories.publish, (600, 3000, 0, 0)),
    "pre-emption": (lambda work: factories.stop(work, StopReason.PREEMPT), (600, 1800, 0, 1200)),
    "drain": (lambda work: factories.stop(work, StopReason.SHUTDOWN), (600, 1800, 0, 1200)),
    "the user's fault": (lambda work: factories.fault(work, FailureCode.NON_FINITE_LOSS), (600, 0, 3000, 0)),
    "our fault": (lambda work: factories.fault(work, FailureCode.TRAINER_CRASHED), (600, 1800, 0, 1200)),
    "a lost node": (lost, (600, 1800, 0, 1200)),
}


@pytest.mark.parametrize("how", ENDS)
@pytest.mark.parametrize("freed_first", [False, True])
def test_every_second_is_somebodys(
    project: Tenant, node: FleetNode, base_model: str, how: str, freed_first: bool
) -> None:
    """Also when the supervisor gives the GPUs back before anybody knows how the attempt ends."""
    end, expected = ENDS[how]
    work = an_hour_of_training(project, node)
    if freed_first:
        with node.transaction() as session:
            leases.hold(session, work.attempt_id, work.fence)
            leases.release(session, work.attempt_id)
        assert factories.free_bytes(node) == node.usable_bytes
        assert usage(work).platform_fault_s == 0 and service(work) == pytest.approx(HOUR, abs=60)
    end(work)
    row = usage(work)
    parts = (row.loading_s, row.productive_s, row.user_fault_s, row.platform_fault_s)
    assert parts == pytest.approx(expected, abs=60)
    assert sum(parts) == pytest.approx(row.gpu_seconds)
    assert service(work) == pytest.approx(row.gpu_seconds - row.platform_fault_s, abs=0.01)
    assert factories.look(work).used_s == pytest.approx(row.loading_s + row.productive_s)
    with node.transaction() as session:
        leases.release(session, work.attempt_id)
    again = usage(work)
    assert (again.loading_s, again.productive_s, again.user_fault_s, again.platform_fault_s) == parts
    assert service(work) == pytest.approx(row.gpu_seconds - row.platform_fault_s, abs=0.01)


def test_a_job_has_used_what_all_its_attempts_kept(project: Tenant, node: FleetNode, base_model: str) -> None:
    first = an_hour_of_training(project, node)
    factories.stop(first, StopReason.PREEMPT)
    second = factories.tell(factories.claim(factories.assign(first)), factories.started(), factories.metrics(2, 11))
    shift(second, "assigned_at", 1000)
    shift(second, "first_step_at", 900)
    factories.publish(second)
    assert factories.look(second).used_s == pytest.approx(2400 + 1000, abs=60)


def test_what_was_never_claimed_is_free(project: Tenant, node: FleetNode, database: Database, base_model: str) -> None:
    work = factories.assigned(project, node)
    shift(work, "assigned_at", HOUR)
    with transaction(database.sessions("tunery_scheduler")) as session:
        assert leases.unassign(session, work.attempt_id)
    assert service(work) == 0 == factories.look(work).used_s


# ---- time limits ------------------------------------------------------------------------------------------------


def sweep(scheduler: Sessions, work: Work) -> None:
    """What the reconciler does."""
    with transaction(scheduler) as session:
        assert work.attempt_id in queue.overdue_attempts(session)
        assert leases.time_out(session, work.attempt_id, grace_s=120)
        assert not leases.time_out(session, work.attempt_id, grace_s=120), "once"
    with transaction(scheduler) as session:
        assert work.attempt_id not in queue.overdue_attempts(session)
    with work.node.transaction() as session:
        asked = leases.renew(session, work.attempt_id, work.fence, 45)
    assert asked is not None and asked.reason is StopReason.TIME_LIMIT
    assert asked.within_s is not None and 0 < asked.within_s <= 120
    with factories.owner(work.node.database) as session:
        newest = select(Outbox.payload["attempt_id"].astext).order_by(Outbox.id.desc()).limit(1)
        assert session.scalar(newest) == str(work.attempt_id), "its node is rung"


def limit(work: Work, own: float | None) -> None:
    with factories.owner(work.node.database) as session, session.begin():
        statement = "UPDATE jobs SET limit_s = 1800, time_limit_s = :own WHERE id = :id"
        session.execute(text(statement), {"own": own, "id": work.job_id})


def test_an_attempt_within_its_limit_is_left_alone(scheduler: Sessions, project: Tenant, node: FleetNode) -> None:
    work = factories.running(project, node)
    with transaction(scheduler) as session:
        assert work.attempt_id not in queue.overdue_attempts(session)
        assert not leases.time_out(session, work.attempt_id, grace_s=120)


def test_the_default_limit_doubles_and_the_job_keeps_its_place(
    scheduler: Sessions, project: Tenant, node: FleetNode
) -> None:
    work = an_hour_of_training(project, node)
    limit(work, None)
    before = factories.look(work)
    sweep(scheduler, work)
    factories.stop(work, StopReason.TIME_LIMIT)
    job = factories.look(work)
    assert (job.state, job.limit_s, job.queued_at) == (JobState.QUEUED, 3600, before.queued_at)
    assert "default time limit of 30 min, which is 1 h 0 min from now on" in messages(work)[-1]
    assert "from its checkpoint at step 10" in messages(work)[-1]
    assert factories.attempt(work).fault is None


def test_a_limit_of_the_users_own_ends_the_job_and_keeps_its_checkpoint(
    scheduler: Sessions, project: Tenant, node: FleetNode
) -> None:
    work = an_hour_of_training(project, node)
    limit(work, 1800)
    sweep(scheduler, work)
    factories.stop(work, StopReason.TIME_LIMIT)
    job = factories.look(work)
    assert (job.state, job.error_code) == (JobState.FAILED, FailureCode.TIME_LIMIT)
    assert job.error_message == "The job reached its time limit of 30 min. Its checkpoint at step 10 is kept."
    assert (factories.attempt(work).state, factories.attempt(work).fault) == ("failed", "user")


def test_who_cancels_at_the_limit_has_cancelled(scheduler: Sessions, project: Tenant, node: FleetNode) -> None:
    work = an_hour_of_training(project, node)
    limit(work, 1800)
    sweep(scheduler, work)
    factories.cancel(work)
    factories.stop(work, StopReason.TIME_LIMIT)
    assert factories.look(work).state == JobState.CANCELLED


# ---- what a plan says beside its starts ------------------------------------------------------------------------


def preempt(victim: Work, beneficiary: Work) -> Preempt:
    return Preempt(victim.attempt_id, victim.job_id, beneficiary.job_id, PreemptKind.FAIR_SHARE)


def test_a_preemption_asks_once_and_says_for_whom(
    scheduler: Sessions, project: Tenant, other_project: Tenant, node: FleetNode
) -> None:
    victim, beneficiary = an_hour_of_training(project, node), factories.queued(other_project, node)
    plan = Plan(preempts=(preempt(victim, beneficiary),))
    with transaction(scheduler) as session:
        assert queue.record(session, 1, plan, queue.Mirror(), grace_s=77) == [victim.attempt_id]
        assert queue.record(session, 1, plan, queue.Mirror(), grace_s=77) == []
    with victim.node.transaction() as session:
        asked = leases.renew(session, victim.attempt_id, victim.fence, 45)
    assert asked is not None and asked.reason is StopReason.PREEMPT
    assert asked.within_s is not None and 0 < asked.within_s <= 77
    seen = factories.attempt(victim)
    assert (seen.preempted_for, seen.preempted_for_project) == (beneficiary.job_id, other_project.project_id)
    factories.stop(victim, StopReason.PREEMPT)
    told = messages(victim)[-1]
    assert "by its project's share" in told and "step 10" in told and other_project.identity.project not in told
    with transaction(scheduler) as session:
        world = queue.snapshot(session, 60)
    mine = next(job for job in world.jobs if job.id == victim.job_id)
    assert mine.preemptions == 1
    assert [(one.beneficiary, one.victim) for one in world.preemptions if one.victim == project.project_id] == [
        (other_project.project_id, project.project_id)
    ]


def test_nobody_is_moved_for_a_job_that_waits_no_more(
    scheduler: Sessions, project: Tenant, other_project: Tenant, node: FleetNode
) -> None:
    victim, beneficiary = factories.running(project, node), factories.cancelled(other_project, node)
    with transaction(scheduler) as session:
        assert queue.record(session, 1, Plan(preempts=(preempt(victim, beneficiary),)), queue.Mirror()) == []
    assert factories.attempt(victim).stop_reason is None


def test_who_is_being_cancelled_is_not_preempted(
    scheduler: Sessions, project: Tenant, other_project: Tenant, node: FleetNode
) -> None:
    victim, beneficiary = factories.cancelling(project, node), factories.queued(other_project, node)
    with transaction(scheduler) as session:
        assert queue.record(session, 1, Plan(preempts=(preempt(victim, beneficiary),)), queue.Mirror()) == []
    assert factories.attempt(victim).stop_reason == StopReason.CANCEL


def test_holds_are_replaced_and_what_stays_is_not_written(
    scheduler: Sessions, database: Database, project: Tenant, node: FleetNode
) -> None:
    first, second = factories.queued(project, node), factories.queued(project, node)
    stays = Hold(first.job_id, HoldKind.GANG, "h100", node.id, (), 1_800_000_000.123457)
    goes = Hold(second.job_id, HoldKind.PREEMPTION, "h100", node.id, node.gpu_ids, 1_800_000_000.5)
    versions: list[str | None] = []
    for holds in ((stays, goes), (stays,)):
        with transaction(scheduler) as session:
            queue.record(session, 1, Plan(holds=holds), queue.Mirror())
        with transaction(scheduler) as session:
            assert set(queue.snapshot(session, 60).holds) == set(holds)
        with factories.owner(database) as session:
            query = text("SELECT xmin::text FROM holds WHERE job_id = :id")
            versions.append(session.scalar(query, {"id": first.job_id}))
    assert versions[0] == versions[1] is not None


def test_standings_are_added_up(scheduler: Sessions, project: Tenant, node: FleetNode) -> None:
    work = factories.queued(project, node)
    for _ in range(2):
        with transaction(scheduler) as session:
            queue.record(session, 1, Plan(projects=(Standing(project.project_id, True, 40.0),)), queue.Mirror())
    assert service(work) == 80
    with transaction(scheduler) as session:
        assert next(one for one in queue.snapshot(session, 60).projects if one.id == project.project_id).active


def test_a_crash_in_the_middle_leaves_whole_decisions(
    scheduler: Sessions, database: Database, project: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second start dies behind its last statement, before its commit: the first stands, of the second nothing."""
    nodes = [factories.node(database) for _ in range(3)]
    works = [factories.queued(project, node) for node in nodes]
    starts = tuple(Start(work.job_id, work.node.id, work.node.gpu_ids, GIB) for work in works)
    passed: list[str] = []

    def die(point: str) -> None:
        passed.append(point)
        if len(passed) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr("tunery.failpoints.reach", die)
    with pytest.raises(KeyboardInterrupt):
        queue.apply(scheduler, 1, Plan(starts))
    monkeypatch.undo()
    assert [factories.look(work).fence > 0 for work in works] == [True, False, False]
    assert [factories.free_bytes(node) == 0 for node in nodes] == [True, False, False]
    with transaction(scheduler) as session:
        held = {view.job_id for view in queue.snapshot(session, 60).running}
    assert held & {work.job_id for work in works} == {works[0].job_id}
    with factories.owner(database) as session:
        waiting = {str(work.node.id) for work in works[1:]}
        rung = select(func.count()).select_from(Outbox).where(Outbox.payload["node_id"].astext.in_(waiting))
        assert session.scalar(rung) == 0
    assert len(queue.apply(scheduler, 1, Plan(starts[1:]))) == 2
