"""Budgets: what jobs hold, what is refused, who is told, what is stopped, and when it goes on."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from decimal import Decimal
from typing import Any

import httpx
import pytest
from sqlalchemy import select, text

from scheduler.budgets import Budgets
from tests import factories
from tests.factories import Database, FleetNode, Tenant, Work
from tests.test_ledger import HOUR, Life, claimed, lay, lived, one_moment, price
from tunery import budgets, ids, leases, ledger, outbox, queue
from tunery.audit import Actor
from tunery.budgets import Standing
from tunery.db import transaction
from tunery.models import BudgetAlert, Outbox, Project
from tunery.queue import Deposed
from tunery.shares import Known
from tunery.states import StopReason

HOLD_H = 0.5
"""Of a job that says nothing of its time, on one GPU."""


def give(tenant: Tenant, hours: float | None = None, money: float | None = None) -> None:
    who = tenant.identity
    known = Known(who.project_id, who.project, "active", who.organization_id, who.organization, 0)
    with tenant.transaction() as session:
        limits = [None if limit is None else Decimal(str(limit)) for limit in (hours, money)]
        budgets.put(session, Actor(who), known, *limits)


def now(tenant: Tenant) -> Standing:
    with tenant.transaction() as session:
        return budgets.standing(session, tenant.project_id)


def blocked(tenant: Tenant) -> str | None:
    with factories.owner(tenant.database) as session:
        return session.scalar(select(Project.blocked).where(Project.id == tenant.project_id))


def use(tenant: Tenant, node: FleetNode, hours: float, state: str = "succeeded") -> Work:
    return lived(tenant, [node], Life(hours * HOUR, 1, (hours * HOUR,), state, None, 1, None, None))


def use_later(tenant: Tenant) -> Callable[[float], None]:
    """A job that was accepted before the budget came, and gives its GPU back when called."""
    life = Life(1, None, (), "running", None, 1, None, None)
    work = claimed(tenant, [factories.node(tenant.database)], life)

    def end(hours: float) -> None:
        with one_moment(tenant) as session:
            lay(session, work, replace(life, held=hours * HOUR, state="succeeded"))
            leases.release(session, work.attempt_id)

    return end


def submit(client: httpx.Client, tenant: Tenant, **more: Any) -> httpx.Response:
    return client.post("/v1/fine_tuning/jobs", json={"model": "tiny", "training_file": factories.file(tenant), **more})


@pytest.fixture
def look(database: Database) -> Callable[[], None]:
    """One look of a leading scheduler."""

    def run() -> None:
        sessions = database.sessions("tunery_scheduler")
        Budgets(sessions, grace_s=120).run(lead(database))

    return run


def lead(database: Database, holder: str = "tests") -> int:
    with transaction(database.sessions("tunery_scheduler")) as session:
        epoch = queue.lead(session, holder, 600)
    assert epoch is not None
    return epoch


def alerts(tenant: Tenant) -> list[tuple[int, int]]:
    """Thresholds with the number of messages about each."""
    with factories.owner(tenant.database) as session:
        rows = select(BudgetAlert.threshold).where(BudgetAlert.project_id == tenant.project_id)
        told = select(Outbox.payload).where(Outbox.project_id == tenant.project_id, Outbox.topic == outbox.BUDGET_ALERT)
        sent = [payload["threshold"] for payload in session.scalars(told)]
        return [(one, sent.count(one)) for one in session.scalars(rows.order_by(BudgetAlert.threshold))]


# ---- holds ------------------------------------------------------------------------------------------------------


def test_a_job_holds_its_limit_from_its_acceptance_to_its_end(
    project: Tenant, node: FleetNode, base_model: str
) -> None:
    work = factories.submitted(project, node)
    assert now(project).held.gpu_hours == HOLD_H and now(project).holding_jobs == 1
    factories.cancel(work)
    assert now(project).held.gpu_hours == 0 and now(project).holding_jobs == 0


def test_a_job_that_has_ended_counts_by_what_it_used(project: Tenant, node: FleetNode, base_model: str) -> None:
    work = factories.running(project, node)
    assert now(project).holding_jobs == 1
    factories.publish(work)
    standing = now(project)
    assert (standing.holding_jobs, standing.held.gpu_hours) == (0, 0)
    with project.transaction() as session:
        used = ledger.of_jobs(session, project.project_id, [work.job_id])[work.job_id]
    assert standing.used.gpu_hours == pytest.approx(used.charged_s / HOUR) and used.charged_s > 0


def test_a_job_back_in_the_queue_holds_what_it_has_not_used(project: Tenant, node: FleetNode, base_model: str) -> None:
    use(project, node, 0.2, "preempted")
    standing = now(project)
    assert standing.used.gpu_hours == pytest.approx(0.2)
    assert standing.held.gpu_hours == pytest.approx(HOLD_H - 0.2)


def test_what_runs_counts_as_used_and_no_longer_as_held(project: Tenant, node: FleetNode, base_model: str) -> None:
    life = Life(0.3 * HOUR, 1, (), "running", None, 1, None, None)
    work = claimed(project, [node], life)
    with one_moment(project) as session:
        lay(session, work, life)
        standing = budgets.standing(session, project.project_id)
    assert standing.used.gpu_hours == pytest.approx(0.3)
    assert standing.held.gpu_hours == pytest.approx(HOLD_H - 0.3)


def test_a_hold_follows_what_is_learned_of_the_job(project: Tenant, node: FleetNode, base_model: str) -> None:
    work = factories.claimed(project, node)
    for expected_s, hours in ((900, 0.25), (None, HOLD_H), (90_000, HOLD_H)):
        with node.transaction() as session:
            budgets.refine(session, factories.jobs.lock(session, work.job_id), expected_s)
        with factories.owner(project.database) as session:
            held = text("SELECT gpu_seconds FROM usage_holds WHERE job_id = :id")
            assert session.scalar(held, {"id": work.job_id}) == hours * HOUR


def test_a_submit_that_does_not_fit_is_refused_with_the_numbers(
    client: httpx.Client, project: Tenant, node: FleetNode, base_model: str
) -> None:
    use(project, node, 1.25)
    give(project, hours=2.4)
    assert submit(client, project).status_code == 200
    assert submit(client, project).status_code == 200
    answer = submit(client, project)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (429, "budget_exceeded")
    assert answer.headers["x-should-retry"] == "false"
    assert "has 0.15 of 2.4 GPU-hours left" in error["message"]
    assert "(1.25 used, 1 held by 2 unfinished jobs)" in error["message"]
    assert "This job would hold 0.5: 1 x GPU for up to 30 minutes." in error["message"]
    assert "time limit" in error["fix"] and "turns on" in error["fix"]
    give(project, hours=3)
    assert submit(client, project).status_code == 200


def test_submits_that_fit_alone_fit_together(
    connect: Callable[[Tenant | None], httpx.Client], project: Tenant, base_model: str
) -> None:
    give(project, hours=3 * HOLD_H)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: submit(connect(project), project), range(8)))
    assert sorted(answer.status_code for answer in answers) == [200] * 3 + [429] * 5
    assert now(project).left.gpu_hours == 0


def test_a_budget_in_money_goes_by_the_highest_price_that_the_job_may_meet(
    client: httpx.Client, project: Tenant, node: FleetNode, base_model: str, database: Database
) -> None:
    with factories.owner(database) as session, session.begin():
        price(session, Decimal(3))
        session.execute(text("INSERT INTO gpu_classes (name, price_per_hour) VALUES ('dear', 8)"))
    give(project, money=6)
    assert submit(client, project).status_code == 200
    assert now(project).held.money == 4
    answer = submit(client, project)
    assert answer.status_code == 429 and "has 2 of 6 in money left" in answer.json()["error"]["message"]
    with factories.owner(database) as session, session.begin():
        session.execute(text("DELETE FROM gpu_classes"))


# ---- alerts, the block, the stop ----------------------------------------------------------------------------------


def test_each_threshold_is_told_once_whoever_looks(project: Tenant, base_model: str, database: Database) -> None:
    first, second, third = (use_later(project) for _ in range(3))
    give(project, hours=1)
    first(0.6)
    epoch, sessions = lead(database), database.sessions("tunery_scheduler")

    def race() -> None:
        with ThreadPoolExecutor(6) as pool:
            list(pool.map(lambda _: Budgets(sessions, 120).run(epoch), range(6)))

    race()
    assert alerts(project) == []
    second(0.21)
    race()
    assert alerts(project) == [(80, 1)] and blocked(project) is None
    third(0.2)
    race()
    race()
    assert alerts(project) == [(80, 1), (100, 1)]
    (warned, ended) = now(project).alerts
    assert (warned.kind, float(warned.budget)) == ("gpu_hours", 1)
    assert 0.81 <= float(warned.used) < 1.01 <= float(ended.used)


def test_a_scheduler_that_was_deposed_tells_and_blocks_nothing(
    project: Tenant, node: FleetNode, base_model: str, database: Database
) -> None:
    use(project, node, 2)
    give(project, hours=1)
    with pytest.raises(Deposed):
        Budgets(database.sessions("tunery_scheduler"), 120).run(lead(database) - 1)
    assert alerts(project) == [] and blocked(project) is None


def test_a_project_without_a_budget_is_left_alone(
    project: Tenant, node: FleetNode, base_model: str, look: Callable[[], None]
) -> None:
    use(project, node, 50)
    look()
    assert alerts(project) == [] and blocked(project) is None and now(project).left == budgets.Limits()


def test_at_the_end_of_a_budget_what_runs_is_asked_to_checkpoint_and_stop(
    project: Tenant,
    other_project: Tenant,
    node: FleetNode,
    base_model: str,
    look: Callable[[], None],
    database: Database,
) -> None:
    other = factories.running(other_project, factories.node(database))
    use(project, node, 1)
    work = factories.running(project, node)
    give(project, hours=1)
    look()
    assert blocked(project) == (
        "the monthly budget of 1 GPU-hours is used up; it turns on "
        f"{ledger.after(now(project).month).isoformat()} (UTC)"
    )
    attempt = factories.attempt(work)
    assert (attempt.state, attempt.stop_reason) == ("running", StopReason.PREEMPT)
    assert attempt.stop_by is not None and attempt.preempted_at is None
    assert factories.attempt(other).stop_reason is None
    look()  # asked once
    with factories.owner(database) as session:
        events = text("SELECT message FROM events WHERE job_id = :id AND message LIKE '%budget%'")
        assert session.scalars(events, {"id": work.job_id}).all() == [
            "The project's budget for this month is used up; the job saves a checkpoint and goes on later"
        ]
    factories.checkpoint(work, 10)
    factories.stop(work, StopReason.PREEMPT)
    assert factories.look(work).state == "queued"


def test_an_attempt_that_nobody_has_claimed_is_taken_back_at_once(
    project: Tenant, node: FleetNode, base_model: str, look: Callable[[], None]
) -> None:
    use(project, node, 1)
    work = factories.assigned(project, node)
    give(project, hours=1)
    look()
    assert factories.attempt(work).state == "lost" and factories.look(work).state == "queued"


def test_a_cancel_is_not_made_a_stop(
    project: Tenant, node: FleetNode, base_model: str, look: Callable[[], None]
) -> None:
    use(project, node, 1)
    work = factories.cancelling(project, node)
    give(project, hours=1)
    look()
    assert factories.attempt(work).stop_reason == StopReason.CANCEL


def test_what_a_stop_refunds_does_not_start_the_jobs_again(
    project: Tenant, node: FleetNode, base_model: str, look: Callable[[], None]
) -> None:
    use(project, node, 0.9)
    life = Life(0.2 * HOUR, 1, (), "running", None, 1, None, None)
    work = claimed(project, [node], life)
    with one_moment(project) as session:
        lay(session, work, life)
    give(project, hours=1)
    look()
    assert blocked(project)
    factories.stop(work, StopReason.PREEMPT)  # before its first checkpoint: all of it is refunded
    assert now(project).used.gpu_hours == pytest.approx(0.9)
    look()
    assert blocked(project)


@pytest.mark.parametrize("way", ["raised", "deleted", "month"])
def test_a_blocked_project_goes_on(
    project: Tenant, node: FleetNode, base_model: str, look: Callable[[], None], database: Database, way: str
) -> None:
    give(project, hours=1)
    use(project, node, 1)
    look()
    assert blocked(project)
    if way == "month":
        with factories.owner(database) as session, session.begin():
            mine = {"id": project.project_id}
            session.execute(
                text("UPDATE budgets SET exhausted_month = exhausted_month - 31 WHERE project_id = :id"), mine
            )
            session.execute(
                text("UPDATE usage SET created_at = created_at - interval '31 days' WHERE project_id = :id"), mine
            )
    else:
        give(project, hours=2 if way == "raised" else None)
    look()
    assert blocked(project) is None
    assert now(project).blocked is None


def test_a_raise_that_is_too_small_blocks_again_and_tells_nothing_twice(
    project: Tenant, node: FleetNode, base_model: str, look: Callable[[], None]
) -> None:
    use(project, node, 1.5)
    give(project, hours=1)
    look()
    give(project, hours=1.2)
    look()
    assert "of 1.2 GPU-hours" in (blocked(project) or "")
    assert alerts(project) == [(80, 1), (100, 1)]


def test_a_block_that_is_no_budgets_is_not_lifted(
    project: Tenant, base_model: str, look: Callable[[], None], database: Database
) -> None:
    runs = use_later(project)
    give(project, hours=1)
    with factories.owner(database) as session, session.begin():
        session.execute(
            text("UPDATE projects SET blocked = 'its owner asked' WHERE id = :id"), {"id": project.project_id}
        )
    look()
    give(project)
    runs(2)
    give(project, hours=1)
    look()
    give(project)
    look()
    assert blocked(project) == "its owner asked"


def test_a_budget_of_nothing_starts_nothing(
    client: httpx.Client, project: Tenant, base_model: str, look: Callable[[], None]
) -> None:
    give(project, hours=0)
    look()
    assert blocked(project)
    assert submit(client, project).json()["error"]["code"] == "budget_exceeded"


# ---- over HTTP ----------------------------------------------------------------------------------------------------


def test_whoever_operates_sets_a_budget_and_its_project_sees_it(
    client: httpx.Client,
    connect: Callable[[Tenant | None], httpx.Client],
    tenants: Callable[..., Tenant],
    node: FleetNode,
    base_model: str,
    look: Callable[[], None],
) -> None:
    team = tenants("jobs:read")
    project_id = ids.encode(ids.PROJECT, team.project_id)
    path = f"/v1/projects/{project_id}/budget"
    body = {"monthly_gpu_hours": 2, "monthly_amount": 10.5}
    answer = client.put(path, json=body).json()
    assert (answer["gpu_hours"]["limit"], answer["amount"]["limit"]) == (2, 10.5)
    use(team, node, 1.7)
    look()
    seen = connect(team).get("/v1/budget").json()
    assert seen == client.get(path).json()
    assert seen["project_id"] == project_id and seen["blocked"] is None
    assert seen["gpu_hours"] == {"limit": 2, "used": 1.7, "held": 0, "left": 0.3}
    assert [(one["threshold"], one["kind"], one["used"]) for one in seen["alerts"]] == [(80, "gpu_hours", 1.7)]
    assert connect(team).put(path, json=body).status_code == 403
    gone = client.delete(path).json()
    assert (gone["gpu_hours"]["limit"], gone["gpu_hours"]["left"]) == (None, None)
    named = f"{team.identity.organization}:{team.identity.project}"
    assert client.put(path.replace(project_id, named), json=body).json()["project_id"] == project_id
    entries = client.get("/v1/audit", params={"target": named}).json()["data"]
    assert [entry["action"] for entry in entries] == ["project.budget"] * 3
    assert entries[2]["after"] == body and entries[1]["after"] == {"monthly_gpu_hours": None, "monthly_amount": None}


@pytest.mark.parametrize(
    "body", [{}, {"monthly_gpu_hours": None}, {"monthly_gpu_hours": -1}, {"monthly_amount": 1e30}, {"gpu_hours": 1}]
)
def test_a_budget_that_is_none_is_refused(client: httpx.Client, project: Tenant, body: dict[str, Any]) -> None:
    path = f"/v1/projects/{ids.encode(ids.PROJECT, project.project_id)}/budget"
    assert client.put(path, json=body).status_code == 400


@pytest.mark.parametrize("name", ["nobody", "proj_x", f"proj_{'0' * 26}"])
def test_a_project_that_is_not_there(client: httpx.Client, name: str) -> None:
    for answer in (
        client.put(f"/v1/projects/{name}/budget", json={"monthly_amount": 1}),
        client.delete(f"/v1/projects/{name}/budget"),
        client.get(f"/v1/projects/{name}/budget"),
    ):
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")


def test_every_holder_of_a_lock_lets_go(project: Tenant, base_model: str) -> None:
    """A refusal rolls back: nothing of the refused job stays, and the next submit is not kept waiting."""
    give(project, hours=0.1)
    node = factories.node(project.database)
    with pytest.raises(Exception, match=r"of 0\.1 GPU-hours left"):
        factories.submitted(project, node)
    give(project, hours=1)
    factories.submitted(project, node)
    assert now(project).holding_jobs == 1


def test_leases_know_what_an_eviction_is(project: Tenant, node: FleetNode, base_model: str, database: Database) -> None:
    work = factories.succeeded(project, node)
    with transaction(database.sessions("tunery_scheduler")) as session:
        assert not leases.evict(session, work.attempt_id, 1, "too late")
