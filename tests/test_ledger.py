"""How GPU time is split, refunded and priced: the SQL that writes it against a few lines of Python, on real rows."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import text
from sqlalchemy.orm import Session

from tests import factories
from tests.factories import GIB, Database, FleetNode, Tenant, Work
from tunery import budgets, leases, ledger
from tunery.db import transaction

HOUR = 3600.0


@dataclass(frozen=True)
class Life:
    """Of one attempt, in seconds since its assignment; it gave its GPUs back `held` seconds after it."""

    held: float
    first_step: float | None
    checkpoints: tuple[float, ...]
    state: str
    fault: str | None
    gpus: int
    shared: float | None
    price: Decimal | None

    @property
    def refunded(self) -> bool:
        return self.state in ("preempted", "lost") or self.fault == "platform"

    def split(self) -> tuple[float, float, float, float]:
        """Loading, productive, the user's fault, ours."""
        loading = self.held if self.first_step is None else min(self.first_step, self.held)
        productive = self.held - loading
        if self.refunded:
            if not self.checkpoints:
                return 0, 0, 0, self.held
            kept = min(productive, max(max(self.checkpoints) - loading, 0))
            return loading, kept, 0, self.held - loading - kept
        if self.fault == "user":
            return loading, 0, productive, 0
        return loading, productive, 0, 0


@st.composite
def lives(draw: st.DrawFn) -> Life:
    held = draw(st.floats(1, 40_000))
    inside = st.floats(0, held)
    state, fault = draw(
        st.sampled_from(
            [
                ("succeeded", None), ("failed", "user"), ("failed", "platform"), ("preempted", None),
                ("lost", "platform"), ("lost", None), ("cancelled", None), ("running", None), ("stopping", None),
                ("publishing", None),
            ]
        )
    )  # fmt: skip
    first = draw(st.none() | inside)
    stored = () if first is None else tuple(draw(st.lists(st.floats(first, held), max_size=3)))
    gpus = draw(st.integers(1, 3))
    shared = draw(st.none() | st.floats(0.05, 1)) if gpus == 1 else None
    price = draw(st.none() | st.decimals(0, 20, places=4))
    return Life(held, first, stored, state, fault, gpus, shared, price)


@pytest.fixture
def nodes(database: Database) -> Iterator[list[FleetNode]]:
    """With one, two and three GPUs."""
    yield [factories.node(database, gpus=number) for number in (1, 2, 3)]


@contextmanager
def one_moment(tenant: Tenant) -> Iterator[Session]:
    """A transaction in which `now()` stands still, so that times laid back from it are exact."""
    with factories.owner(tenant.database) as session, session.begin():
        session.execute(text("SELECT set_config('app.project_id', :id, true)"), {"id": str(tenant.project_id)})
        yield session


def claimed(tenant: Tenant, nodes: list[FleetNode], life: Life) -> Work:
    node = nodes[life.gpus - 1]
    part = GIB if life.shared is None else int(life.shared * 8 * GIB)
    work = factories.queued(tenant, node)
    return factories.claim(factories.assign(work, node, gpu_bytes=part, exclusive=life.shared is None))


def lay(session: Session, work: Work, life: Life) -> None:
    """Rows as if the attempt had lived so, up to now; its GPUs are still held."""
    ended = life.state not in ("running", "stopping", "publishing")
    session.execute(
        text(
            "UPDATE attempts SET assigned_at = now() - make_interval(secs => :held), state = :state, fault = :fault, "
            "first_step_at = now() - make_interval(secs => :rest), ended_at = CASE WHEN :ended THEN now() END, "
            "lease_expires_at = CASE WHEN NOT :ended THEN now() + interval '1 day' END WHERE id = :id"
        ),
        {
            "held": life.held, "state": life.state, "fault": life.fault, "ended": ended, "id": work.attempt_id,
            "rest": None if life.first_step is None else life.held - life.first_step,
        },
    )  # fmt: skip
    for step, at in enumerate(life.checkpoints, 1):
        stored = {"project": work.tenant.project_id, "job": work.job_id, "attempt": work.attempt_id, "step": step}
        session.execute(
            text(
                "INSERT INTO checkpoints (id, project_id, job_id, attempt_id, step, object_prefix, files, bytes, "
                "metrics, created_at) VALUES "
                "(gen_random_uuid(), :project, :job, :attempt, :step, 'a/x', '[]', 0, '{}', "
                "now() - make_interval(secs => :ago))"
            ),
            stored | {"ago": life.held - at},
        )
    price(session, life.price)


def price(session: Session, per_hour: Decimal | None) -> None:
    """Of every class that there is."""
    session.execute(
        text(
            "INSERT INTO gpu_classes (name, price_per_hour) "
            "SELECT DISTINCT gpu_class, CAST(:price AS numeric) FROM gpus "
            "ON CONFLICT (name) DO UPDATE SET price_per_hour = excluded.price_per_hour"
        ),
        {"price": per_hour},
    )


def lived(tenant: Tenant, nodes: list[FleetNode], life: Life) -> Work:
    """An attempt that has given its GPUs back."""
    work = claimed(tenant, nodes, life)
    with one_moment(tenant) as session:
        lay(session, work, life)
        leases.release(session, work.attempt_id)
    return work


def service(session: Session, tenant: Tenant) -> float:
    query = text("SELECT service FROM projects WHERE id = :id")
    return session.execute(query, {"id": tenant.project_id}).scalar_one()


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(life=lives())
def test_time_is_split_and_refunded_by_how_an_attempt_ended(
    project: Tenant, nodes: list[FleetNode], base_model: str, life: Life
) -> None:
    work, id = claimed(project, nodes, life), project.project_id
    with one_moment(project) as session:
        lay(session, work, life)
        before = service(session, project)
        (so_far,) = ledger.of_jobs(session, id, [work.job_id]).values()
        leases.release(session, work.attempt_id)
        leases.release(session, work.attempt_id)  # twice is once
        every = ledger.lines(session, id, ledger.this_month(session))
        lines = [line for line in every if line.job_id == work.job_id]
        (cost,) = ledger.of_jobs(session, id, [work.job_id]).values()
        served = service(session, project) - before
    share = life.shared or 1.0
    assert len(lines) == life.gpus
    for line in lines:
        kinds = (line.loading_s, line.productive_s, line.user_fault_s, line.platform_fault_s)
        assert all(value >= 0 for value in kinds)
        assert sum(kinds) == pytest.approx(line.gpu_seconds, abs=1e-6)
        assert kinds == pytest.approx([part * share for part in life.split()], abs=0.01)
        assert line.gpu_seconds == pytest.approx(life.held * share, abs=0.01)
        assert line.charged_s == pytest.approx(line.gpu_seconds - line.platform_fault_s)
        assert line.share == pytest.approx(share, abs=1e-6) and not line.running
        assert line.price_per_hour == life.price
    charged = sum(line.charged_s for line in lines)
    assert cost.charged_s == pytest.approx(charged) and cost.running_s == 0
    assert served == pytest.approx(factories.attempt(work).rate * lines[0].charged_s / lines[0].share, abs=1e-3)
    # while it held them, the estimate was the same
    assert so_far.running_s == so_far.gpu_seconds == pytest.approx(cost.gpu_seconds)
    assert (so_far.charged_s, so_far.amount is None) == (pytest.approx(charged), life.price is None)
    if life.price is not None:
        assert float(cost.amount or 0) == pytest.approx(charged / HOUR * float(life.price), abs=1e-6)


def test_a_price_list_that_changes_later_changes_nothing(
    database: Database, project: Tenant, node: FleetNode, base_model: str
) -> None:
    work = lived(project, [node], Life(2 * HOUR, 60, (), "succeeded", None, 1, None, Decimal("2.5")))
    with factories.owner(database) as session, session.begin():
        price(session, Decimal(9))
    with project.transaction() as session:
        used = ledger.of_jobs(session, project.project_id, [work.job_id])[work.job_id]
    assert float(used.amount or 0) == pytest.approx(5)


def test_a_row_belongs_to_the_month_in_which_its_attempt_ended(
    database: Database, project: Tenant, node: FleetNode, base_model: str
) -> None:
    work = lived(project, [node], Life(HOUR, 60, (), "succeeded", None, 1, None, None))
    with factories.owner(database) as session, session.begin():
        moment = datetime(2025, 12, 31, 23, 59, 59, tzinfo=UTC)
        session.execute(
            text("UPDATE usage SET created_at = :at WHERE job_id = :job"), {"at": moment, "job": work.job_id}
        )
    with project.transaction() as session:
        december, january = (
            ledger.by_class(session, project.project_id, date(year, month, 1))
            for year, month in ((2025, 12), (2026, 1))
        )
        assert ledger.total(list(december.values())).gpu_seconds == pytest.approx(HOUR)
        assert january == {} and ledger.by_class(session, project.project_id, ledger.this_month(session)) == {}
    assert ledger.after(date(2025, 12, 1)) == date(2026, 1, 1) and ledger.after(date(2026, 1, 1)) == date(2026, 2, 1)


def test_what_was_never_claimed_costs_nothing(
    database: Database, project: Tenant, node: FleetNode, base_model: str
) -> None:
    work = factories.assigned(project, node)
    with project.transaction() as session:
        assert ledger.of_jobs(session, project.project_id, [work.job_id]) == {}
    with transaction(database.sessions("tunery_scheduler")) as session:
        assert leases.unassign(session, work.attempt_id)
    with project.transaction() as session:
        assert ledger.of_jobs(session, project.project_id, [work.job_id]) == {}


def test_a_months_total_is_the_sum_of_its_rows_whatever_becomes_of_them(
    database: Database, project: Tenant, nodes: list[FleetNode], base_model: str
) -> None:
    def totals() -> dict[date, tuple[float, float]]:
        with factories.owner(database) as session:
            query = "SELECT month, charged_s, amount FROM usage_totals WHERE project_id = :id AND abs(charged_s) > 1e-6"
            found = session.execute(text(query), {"id": project.project_id}).all()
        return {row.month: (pytest.approx(row.charged_s), pytest.approx(float(row.amount))) for row in found}

    def charged(month: date) -> tuple[float, float]:
        with project.transaction() as session:
            rows = ledger.total(list(ledger.by_class(session, project.project_id, month).values()))
            quick = ledger.charged(session, project.project_id, month)
        assert (quick.seconds, float(quick.amount)) == pytest.approx((rows.charged_s, float(rows.amount or 0)))
        return rows.charged_s, float(rows.amount or 0)

    with project.transaction() as session:
        now = ledger.this_month(session)
    lived(project, nodes, Life(HOUR, 60, (), "succeeded", None, 3, None, Decimal("2.5")))
    work = lived(project, nodes, Life(HOUR, 60, (1800,), "preempted", None, 1, 0.5, Decimal("2.5")))
    assert totals() == {now: charged(now)} and charged(now)[0] > 3 * HOUR
    with factories.owner(database) as session, session.begin():
        moved = "UPDATE usage SET created_at = '2025-12-31 23:59:59+00', platform_fault_s = 0 WHERE job_id = :job"
        session.execute(text(moved), {"job": work.job_id})
    december = date(2025, 12, 1)
    assert totals() == {now: charged(now), december: charged(december)}
    assert charged(december)[0] == pytest.approx(HOUR / 2, abs=1)
    running = claimed(project, nodes, life := Life(HOUR, 60, (), "running", None, 1, None, Decimal(1)))
    with one_moment(project) as session:
        lay(session, running, life)
    charged(now)  # what runs is in it
    with factories.owner(database) as session, session.begin():
        session.execute(text("DELETE FROM usage WHERE job_id = :job"), {"job": work.job_id})
    assert december not in totals()


def test_what_is_lost_after_its_gpus_went_back_is_refunded(
    database: Database, project: Tenant, node: FleetNode, base_model: str
) -> None:
    """A supervisor frees the device before it stores the last checkpoint; it, or its whole node, may die in between."""
    work = claimed(project, [node], life := Life(HOUR, 60, (), "stopping", None, 1, None, None))
    with one_moment(project) as session:
        lay(session, work, life)
        leases.release(session, work.attempt_id)
        (before,) = ledger.of_jobs(session, project.project_id, [work.job_id]).values()
        silent = text("UPDATE attempts SET lease_expires_at = now() - interval '1 day' WHERE id = :id")
        session.execute(silent, {"id": work.attempt_id})
    with transaction(database.sessions("tunery_scheduler")) as session:
        assert leases.declare_lost(session, work.attempt_id, grace_s=30)
    with project.transaction() as session:
        (after,) = ledger.of_jobs(session, project.project_id, [work.job_id]).values()
    assert before.charged_s == pytest.approx(HOUR, abs=1)
    assert (after.charged_s, after.platform_fault_s) == (0, pytest.approx(HOUR, abs=1))


def test_another_projects_running_attempts_are_not_seen(
    project: Tenant, other_project: Tenant, node: FleetNode, base_model: str
) -> None:
    work = factories.running(other_project, node)
    with project.transaction() as session:
        assert session.execute(text("SELECT * FROM live_usage(NULL)")).all() == []
        query = text("SELECT * FROM live_usage(:other)")
        assert session.execute(query, {"other": other_project.project_id}).all() == []
        assert ledger.of_jobs(session, other_project.project_id, [work.job_id]) == {}
    with other_project.transaction() as session:
        assert ledger.of_jobs(session, other_project.project_id, [work.job_id]).keys() == {work.job_id}


def test_the_month_is_the_databases_in_utc(project: Tenant) -> None:
    with project.transaction() as session:
        shown = session.execute(text("SELECT now()")).scalar_one().astimezone(UTC).date()
        assert ledger.this_month(session) == shown.replace(day=1)
        assert budgets.standing(session, project.project_id).month == shown.replace(day=1)
        assert timedelta(27) < ledger.after(shown.replace(day=1)) - shown.replace(day=1) < timedelta(32)
