"""How long jobs are expected to take: in closed form, learned from runs, and the limits that follow."""

import uuid
from typing import Any

import pytest
from sqlalchemy import event, text, update

from tests import factories
from tests.factories import Database, FleetNode, Tenant, Work
from tunery import durations
from tunery.contracts.spec import Recipe, TrainingArgs
from tunery.db import transaction
from tunery.models import Job, Node, RunObservation
from tunery.recipes import Extension


@pytest.fixture(autouse=True)
def alone(database: Database) -> None:
    with factories.owner(database) as session, session.begin():
        session.execute(update(Node).values(removed_at=text("now()")))


@pytest.fixture
def model(database: Database) -> str:
    """A base model that no run has taught anything about."""
    return factories.base_model(database, f"tiny-{uuid.uuid4().hex[:8]}")


def ran(project: Tenant, node: FleetNode, model: str, *, tokens_per_s: float, load_s: float = 4.0) -> Work:
    """A finished run, at such a speed over the tokens that it really had."""
    work = factories.succeeded(project, node, model=model)
    with factories.owner(node.database) as session, session.begin():
        seen = session.get_one(RunObservation, work.attempt_id)
        seen.tokens, seen.train_s, seen.load_s = 2000, 2000 / tokens_per_s, load_s
    return work


def expected(database: Database, work: Work, role: str = "tunery_scheduler") -> tuple[float, float]:
    with transaction(database.sessions(role)) as session:
        return durations.expected(session, session.get_one(Job, work.job_id))


def change(work: Work, **values: Any) -> None:
    with factories.owner(work.node.database) as session, session.begin():
        session.execute(update(Job).where(Job.id == work.job_id).values(**values))


# ---- learned ------------------------------------------------------------------------------------------------------


def test_without_runs_it_is_a_guess_with_a_wide_spread(
    project: Tenant, node: FleetNode, model: str, database: Database
) -> None:
    p50, p90 = expected(database, factories.queued(project, node, model=model))
    assert 0 < p50 < p90 and p90 > 2 * p50


def test_runs_teach_the_time_by_the_tokens_that_were_estimated(
    project: Tenant, node: FleetNode, model: str, database: Database
) -> None:
    for _ in range(3):
        done = ran(project, node, model, tokens_per_s=100)
    waiting = factories.queued(project, node, model=model)
    p50, p90 = expected(database, waiting)
    # its tokens are estimated the same way, so what the estimate gets wrong cancels out
    assert p50 == pytest.approx(2000 / 100 + 4) and p90 == pytest.approx(p50 * (1 + 3**-0.5))
    change(waiting, estimated_tokens=2 * (factories.look(done).estimated_tokens or 0))
    assert expected(database, waiting)[0] == pytest.approx(2 * 2000 / 100 + 4)


def test_a_class_with_runs_of_its_own_is_not_judged_by_others(
    project: Tenant, node: FleetNode, model: str, database: Database
) -> None:
    slow, fast = ran(project, node, model, tokens_per_s=10), ran(project, node, model, tokens_per_s=1000)
    with factories.owner(database) as session, session.begin():
        for work, name in ((slow, "l4-24gb"), (fast, "h100-80gb")):
            session.get_one(RunObservation, work.attempt_id).gpu_class = name
    times = {}
    for name in ("l4-24gb", "h100-80gb", None):
        waiting = factories.queued(project, node, model=model)
        change(waiting, gpu_class=name)
        times[name] = expected(database, waiting)[0]
    assert times["h100-80gb"] == pytest.approx(6) and times["l4-24gb"] == pytest.approx(204)
    assert times["h100-80gb"] < times[None] < times["l4-24gb"]


def test_what_is_done_need_not_be_done_again_and_gpus_share_it(
    project: Tenant, node: FleetNode, model: str, database: Database
) -> None:
    ran(project, node, model, tokens_per_s=100)
    waiting = factories.queued(project, node, model=model)
    change(waiting, progress={"step": 30, "total_steps": 40})
    assert expected(database, waiting)[0] == pytest.approx(20 / 4 + 4)
    change(waiting, gpus=4, progress=None)
    assert expected(database, waiting)[0] == pytest.approx(20 / 4 + 4)


def test_a_job_whose_rows_are_not_checked_has_its_limit(
    project: Tenant, node: FleetNode, database: Database, model: str
) -> None:
    assert expected(database, factories.submitted(project, node, model=model)) == (1800, 1800)


@pytest.mark.parametrize("role", ["tunery_scheduler", "tunery_api", "tunery_worker"])
def test_every_program_learns_the_same(
    project: Tenant, node: FleetNode, model: str, database: Database, role: str
) -> None:
    ran(project, node, model, tokens_per_s=100)
    waiting = factories.queued(project, node, model=model)
    sessions = {"tunery_api": project.transaction, "tunery_worker": node.transaction}
    with sessions.get(role, lambda: transaction(database.sessions(role)))() as session:
        found = durations.expected(session, session.get_one(Job, waiting.job_id))
    assert found == expected(database, waiting)


def test_many_jobs_cost_as_many_queries_as_one(
    project: Tenant, node: FleetNode, model: str, database: Database
) -> None:
    ran(project, node, model, tokens_per_s=100)
    works = [factories.queued(project, node, model=model) for _ in range(5)]
    counts = []
    with transaction(database.sessions("tunery_scheduler")) as session:
        engine = session.get_bind()
        asked: list[str] = []

        def note(_c: Any, _u: Any, statement: str, *_: Any) -> None:
            asked.append(statement)

        event.listen(engine, "before_cursor_execute", note)
        for some in (works[:1], works):
            asked.clear()
            found = durations.of_ids(session, [work.job_id for work in some])
            counts.append(len(asked))
            assert found == {work.job_id: expected(database, work) for work in some}
        event.remove(engine, "before_cursor_execute", note)
    assert counts == [4, 4]


# ---- limits -------------------------------------------------------------------------------------------------------


def test_a_limit_is_what_was_asked_or_three_times_the_p90_or_half_an_hour(
    project: Tenant, node: FleetNode, model: str
) -> None:
    asked = Extension.model_validate({"scheduling": {"time_limit": "45m"}})
    assert factories.look(factories.queued(project, node, model=model, extension=asked)).limit_s == 2700
    assert factories.look(factories.queued(project, node, model=model)).limit_s == 1800
    ran(project, node, model, tokens_per_s=1)
    job = factories.look(factories.queued(project, node, model=model))
    assert job.limit_s == pytest.approx(3 * 2 * (2000 + 4)) and job.time_limit_s is None


# ---- tokens -------------------------------------------------------------------------------------------------------


def test_tokens_of_a_training() -> None:
    def tokens(**training: Any) -> int:
        asked = TrainingArgs(per_device_train_batch_size=4, gradient_accumulation_steps=2, **training)
        return durations.tokens(Recipe(training=asked), rows=100, size=40_000)

    assert tokens(num_train_epochs=1) == 10_000 and tokens(num_train_epochs=3) == 30_000
    assert tokens(max_steps=5) == 5 * 8 * 100
    assert tokens(num_train_epochs=1, max_length=50) == 5_000, "rows are cut"


# ---- engines ------------------------------------------------------------------------------------------------------


def test_jobs_that_could_share_a_base_have_one_key(
    project: Tenant, node: FleetNode, model: str, database: Database
) -> None:
    first, second = (factories.look(factories.queued(project, node, model=model)) for _ in range(2))
    other = factories.look(factories.queued(project, node, model=factories.base_model(database, f"{model}-2")))
    asked = Extension.model_validate({"training": {"precision": "fp32"}})
    precise = factories.look(factories.queued(project, node, model=model, extension=asked))
    assert first.engine_key == second.engine_key and "/bf16/cuda/lora" in (first.engine_key or "")
    assert len({first.engine_key, other.engine_key, precise.engine_key}) == 3
    assert 0 < (first.engine_bytes or 0) < (first.estimated_bytes or 0)
