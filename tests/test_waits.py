"""Why jobs wait and when they start, on real rows: what each project is told, and what it is never told."""

import json
import os
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from pydantic import SecretStr
from sqlalchemy import text

from scheduler.forecast.child import Child
from scheduler.forecast.service import Forecaster
from scheduler.policy import schedule
from tests import factories
from tests.factories import Database, FleetNode, Tenant, Work
from tunery import forecasts, ids, queue
from tunery.contracts.scheduling import JobView
from tunery.db import transaction
from tunery.forecasts import Forecast, Outlook
from tunery.settings import SchedulerSettings

Connect = Callable[[Tenant | None], httpx.Client]
JOBS, QUEUE = "/v1/fine_tuning/jobs", "/v1/queue"


@pytest.fixture
def alone(database: Database) -> None:
    factories.end_everything(database)


@pytest.fixture
def forecaster(alone: None, database: Database) -> Forecaster:
    """Of a scheduler that leads."""
    with transaction(database.sessions("tunery_scheduler")) as session:
        assert queue.lead(session, "the tests", 600) is not None
    return Forecaster(database.sessions("tunery_scheduler"), settings(database), "the tests")


def settings(database: Database) -> SchedulerSettings:
    url = SecretStr(database.url("tunery_scheduler"))
    return SchedulerSettings(database_url=url, redis_url=SecretStr("redis://unused"), forecast_s=30)


def one_pass(database: Database) -> list[uuid.UUID]:
    """As the leader has them: starts, and reasons for the rest."""
    sessions = database.sessions("tunery_scheduler")
    with transaction(sessions) as session:
        epoch = queue.epoch_of(session, "the tests")
        assert epoch is not None
    with transaction(sessions) as session:
        seen = queue.snapshot(session, 60)
    return queue.apply(sessions, epoch, schedule(seen), queue.Mirror(), 120)


def wait_of(client: httpx.Client, work: Work) -> dict[str, Any]:
    return client.get(f"{JOBS}/{work.id}").json()["tunery"]["queue"]


# ---- what is told ---------------------------------------------------------------------------------------------------


def test_a_job_says_why_it_waits_its_place_and_when_it_starts(
    forecaster: Forecaster, connect: Connect, project: Tenant, other_project: Tenant, database: Database,
    base_model: str,
) -> None:  # fmt: skip
    node = factories.node(database, gpus=1)
    factories.running(other_project, node)
    theirs = factories.queued(other_project, node)
    first, second = factories.queued(project, node), factories.queued(project, node)
    assert one_pass(database) == []
    mine = connect(project)
    before = wait_of(mine, second)
    assert before["estimated_start"] is None and before["jobs_ahead"] == {"own": 1, "others": None}
    assert forecaster.tell() == 2

    told = wait_of(mine, second)
    assert told["reason"]["code"] == "busy" and told["reason"]["numbers"]["busy"] == 1
    assert told["reason"]["message"].startswith(
        "needs 1 GPU with 1.1 GB; 1 of 1 suitable devices are busy; a place is free by"
    )
    start = told["estimated_start"]
    assert time.time() < start["p50"] <= start["p90"] and start["not_before"] is None
    assert told["position"] == 1 + told["jobs_ahead"]["own"] + told["jobs_ahead"]["others"]
    assert told["jobs_ahead"]["own"] == 1
    assert wait_of(mine, first)["position"] < told["position"]
    places = {wait_of(mine, work)["position"] for work in (first, second)}
    assert places | {wait_of(connect(other_project), theirs)["position"]} == {1, 2, 3}
    assert wait_of(connect(other_project), theirs)["jobs_ahead"]["own"] == 0


def test_the_queue_lists_ones_own_jobs_in_their_order_and_names_nothing_of_others(
    forecaster: Forecaster, connect: Connect, project: Tenant, other_project: Tenant, database: Database,
    base_model: str,
) -> None:  # fmt: skip
    node = factories.node(database, gpus=1)
    others = [factories.running(other_project, node), *(factories.queued(other_project, node) for _ in range(2))]
    works = [factories.queued(project, node) for _ in range(3)]
    client = connect(project)
    assert client.post(f"{JOBS}/{works[2].id}/priority", json={"priority": 5}).status_code == 200
    one_pass(database)
    forecaster.tell()
    answer = client.get(QUEUE)
    told = answer.json()
    assert [job["id"] for job in told["jobs"]] == [works[2].id, works[0].id, works[1].id]
    assert (told["queued"], told["running"], told["project"]["queued"]) == (5, 1, 3)
    assert [job["queue"]["jobs_ahead"]["own"] for job in told["jobs"]] == [0, 1, 2]
    assert client.get(QUEUE, params={"limit": 1}).json()["jobs"][0]["id"] == works[2].id
    simulated = ask(forecaster, client)
    everything = answer.text + client.get(JOBS).text + json.dumps(simulated)
    for other in others:
        for name in (other.id, str(other.job_id), str(other.attempt_id), other.job_id.hex):
            assert name not in everything
    assert str(other_project.project_id) not in everything


def test_a_reason_that_is_no_longer_true_is_no_longer_told(
    forecaster: Forecaster, client: httpx.Client, project: Tenant, database: Database, base_model: str
) -> None:
    node = factories.node(database, gpus=1)
    running, waits = factories.running(project, node), factories.queued(project, node)
    one_pass(database)
    assert wait_of(client, waits)["reason"]["code"] == "busy"
    with factories.owner(database) as session, session.begin():
        session.execute(text("UPDATE projects SET cap = 1 WHERE id = :id"), {"id": project.project_id})
    one_pass(database)
    told = wait_of(client, waits)
    cap = "your project uses 1 of the 1 GPUs that it may use at once"
    assert told["reason"]["message"] == f"needs 1 GPU with 1.1 GB; {cap}"
    assert told["advice"]
    factories.publish(running)
    assert len(one_pass(database)) == 1
    assert wait_of(client, waits)["reason"]["code"] == "assigned"


def test_a_limit_of_nothing_promises_no_start(
    forecaster: Forecaster, client: httpx.Client, project: Tenant, database: Database, base_model: str
) -> None:
    waits = factories.queued(project, factories.node(database, gpus=1))
    for column, sentence in (("max_running_jobs", "may run no jobs"), ("cap", "may use 0 GPUs at once")):
        with factories.owner(database) as session, session.begin():
            session.execute(text(f"UPDATE projects SET {column} = 0 WHERE id = :id"), {"id": project.project_id})
        one_pass(database)
        told = wait_of(client, waits)
        assert sentence in told["reason"]["message"], told
        assert "An operator" in told["advice"][0] and "ends" not in told["advice"][0]
        with factories.owner(database) as session, session.begin():
            session.execute(text(f"UPDATE projects SET {column} = NULL WHERE id = :id"), {"id": project.project_id})


def test_a_forecast_that_is_too_old_is_not_shown(
    forecaster: Forecaster, client: httpx.Client, project: Tenant, database: Database, base_model: str
) -> None:
    node = factories.node(database, gpus=1)
    factories.running(project, node)
    work = factories.queued(project, node)
    one_pass(database)
    forecaster.tell()
    assert wait_of(client, work)["estimated_start"] is not None
    with factories.owner(database) as session, session.begin():
        session.execute(text("UPDATE queue_views SET forecast_at = now() - interval '91 seconds'"))
    told = wait_of(client, work)
    assert told["estimated_start"] is told["position"] is None and told["reason"]["code"] == "busy"
    factories.cancel(work)
    assert forecaster.tell() == 0
    with factories.owner(database) as session:
        assert session.scalar(text("SELECT count(*) FROM queue_views WHERE forecast <> '{}'")) == 0


def test_those_behind_the_first_fifty_are_told_a_bound(project: Tenant, database: Database) -> None:
    first, last = uuid.uuid4(), uuid.uuid4()
    outlook = Outlook({first: Forecast(3, 0, 2, 10.0, 20.0)}, Forecast(9, 1, 7, not_before=1000.0))
    with transaction(database.sessions("tunery_scheduler")) as session:
        now = session.scalar(text("SELECT extract(epoch FROM now())::float8"))
        forecasts.store(session, {project.project_id: outlook}, now, 60)
    with project.transaction() as session:
        told = forecasts.of_project(session, project.project_id)
    assert told == outlook
    assert forecasts.of_job(told, first, 1) == outlook.jobs[first]
    assert forecasts.of_job(told, last, 4) == Forecast(11, 3, 7, not_before=1000.0)


def test_one_who_does_not_lead_tells_nothing(
    forecaster: Forecaster, project: Tenant, database: Database, base_model: str
) -> None:
    factories.queued(project, factories.node(database, gpus=1))
    other = Forecaster(database.sessions("tunery_scheduler"), settings(database), "somebody else")
    assert other.tell() == 0 and other.answer() == 0
    assert forecaster.tell() == 1


# ---- what-if --------------------------------------------------------------------------------------------------------


def ask(forecaster: Forecaster, client: httpx.Client, **more: Any) -> dict[str, Any]:
    """With a forecaster that looks for questions meanwhile."""
    stop = threading.Event()

    def answer() -> None:
        while not stop.is_set():
            forecaster.answer()
            stop.wait(0.02)

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        given = {"model": "tiny", "rows": 500} | more
        answered = client.post(f"{QUEUE}/simulate", json=given)
    finally:
        stop.set()
        thread.join()
    assert answered.status_code == 200, answered.text
    return answered.json()


def rows_of(database: Database) -> dict[str, int]:
    tables = ("jobs", "files", "tasks", "events", "outbox", "usage_holds", "attempts", "holds")
    with factories.owner(database) as session:
        return {name: session.scalar(text(f"SELECT count(*) FROM {name}")) or 0 for name in tables}


def test_what_if_tells_place_start_reason_and_changes_nothing(
    forecaster: Forecaster, client: httpx.Client, project: Tenant, database: Database, base_model: str
) -> None:
    node = factories.node(database, gpus=1)
    free = ask(forecaster, client)
    assert (free["starts_in"]["p50"], free["starts_in"]["p90"], free["reason"]) == (0, 0, None)
    assert free["position"] == 1 and free["gpu_bytes"] > 0 and free["cost"]["hours"] > 0

    factories.running(project, node)
    factories.queued(project, node)
    one_pass(database)
    before = rows_of(database)
    told = ask(forecaster, client, tunery={"scheduling": {"time_limit": "1h"}})
    assert told["reason"]["code"] == "busy" and told["limit_s"] == 3600
    assert told["starts_in"]["p90"] >= told["starts_in"]["p50"] > 0
    assert all(told["starts_in"][name] % 300 == 0 for name in ("p50", "p90"))
    assert (told["position"], told["jobs_ahead"]) == (2, {"own": 1, "others": 0})
    assert rows_of(database) == before


def test_what_if_refuses_what_a_submit_refuses(client: httpx.Client, base_model: str) -> None:
    for body, status in (
        ({"model": "tiny", "rows": 5, "tunery": {"resources": {"gpus": 64}}}, 400),
        ({"model": "nothing", "rows": 5}, 404),
        ({"model": "tiny"}, 400),
        ({"model": "tiny", "training_file": "file-0000"}, 404),
    ):
        assert client.post(f"{QUEUE}/simulate", json=body).status_code == status, body


def test_without_a_scheduler_the_answer_is_what_to_do(
    alone: None, client: httpx.Client, base_model: str, app: Any
) -> None:
    app.state.settings = app.state.settings.model_copy(update={"simulate_wait_s": 0.2})
    try:
        answer = client.post(f"{QUEUE}/simulate", json={"model": "tiny", "rows": 5})
    finally:
        app.state.settings = app.state.settings.model_copy(update={"simulate_wait_s": 5})
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "service_unavailable" and "scheduler" in answer.json()["error"]["fix"]


def test_questions_are_forgotten_and_are_not_too_many(
    forecaster: Forecaster, project: Tenant, database: Database
) -> None:
    job = JobView(uuid.uuid4(), project.identity.organization_id, project.project_id, 0.0, 1, 1)
    with project.transaction() as session:
        for _ in range(forecasts.MOST_WAITING):
            forecasts.ask(session, job, (60, 60))
    with pytest.raises(Exception, match="unanswered"), project.transaction() as session:
        forecasts.ask(session, job, (60, 60))
    with factories.owner(database) as session, session.begin():
        session.execute(text("UPDATE queue_questions SET created_at = now() - interval '2 minutes'"))
    assert forecaster.answer() == 0
    with factories.owner(database) as session:
        assert session.scalar(text("SELECT count(*) FROM queue_questions")) == 0


# ---- the process ----------------------------------------------------------------------------------------------------


def test_a_process_forecasts_while_its_scheduler_leads_and_ends_with_it(
    forecaster: Forecaster, client: httpx.Client, project: Tenant, database: Database, base_model: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    node = factories.node(database, gpus=1)
    factories.running(project, node)
    work = factories.queued(project, node)
    one_pass(database)
    monkeypatch.setenv("TUNERY_DATABASE_URL", database.url("tunery_scheduler"))
    monkeypatch.setenv("TUNERY_REDIS_URL", "redis://unused")
    monkeypatch.setenv("TUNERY_FORECAST_S", "0.2")
    child = Child("the tests")
    child.keep(False)
    assert child.pid is None
    child.keep(True)
    pid = child.pid
    try:
        assert pid is not None
        until(lambda: wait_of(client, work)["estimated_start"] is not None)
        answer = client.post(f"{QUEUE}/simulate", json={"model": "tiny", "rows": 500}, timeout=60)
        assert answer.status_code == 200 and answer.json()["position"] == 2
        child.keep(True)
        assert child.pid == pid
    finally:
        child.end()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def until(true: Callable[[], bool], within_s: float = 60) -> None:
    by = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < by
        time.sleep(0.05)


def test_an_id_of_the_api_is_what_the_forecast_is_kept_under(
    forecaster: Forecaster, project: Tenant, node: FleetNode, base_model: str, database: Database
) -> None:
    work = factories.queued(project, node)
    forecaster.tell()
    with project.transaction() as session:
        told = forecasts.of_project(session, project.project_id)
    assert told is not None and ids.decode(ids.JOB, work.id) in told.jobs
