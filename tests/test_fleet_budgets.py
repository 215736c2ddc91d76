"""A budget runs out below a running job, end to end: stopped with a checkpoint, told once, resumed at its step."""

import json
import signal
from decimal import Decimal
from pathlib import Path

from redis import Redis
from sqlalchemy import text

from tests.fleet import Fleet, fleet
from tests.servers import servers
from tunery import budgets, ids, tenancy
from tunery.audit import Actor
from tunery.db import for_project, transaction
from tunery.shares import Known


def give(running: Fleet, hours: str) -> None:
    who = tenancy.Identity(
        running.organization_id, "Acme", running.project_id, "first", ids.uuid7(), "k", frozenset({"admin"}), None
    )
    known = Known(running.project_id, "first", "active", running.organization_id, "Acme", 0)
    with transaction(lambda: for_project(running.api, running.project_id)) as session:
        budgets.put(session, Actor(who), known, Decimal(hours), None)


def standing(running: Fleet) -> budgets.Standing:
    with transaction(lambda: for_project(running.api, running.project_id)) as session:
        return budgets.standing(session, running.project_id)


def listener(running: Fleet):
    heard = Redis.from_url(servers().redis_url).pubsub()
    heard.subscribe(f"budget:alert:{ids.encode(ids.PROJECT, running.project_id)}")
    assert heard.get_message(timeout=20)["type"] == "subscribe"
    return heard


def thresholds(heard) -> list[int]:
    """What was told until nothing more came."""
    told = []
    while (message := heard.get_message(timeout=2)) is not None:
        told.append(json.loads(message["data"])["threshold"])
    return told


def all_told(running: Fleet) -> bool:
    query = text(
        "SELECT count(*) FILTER (WHERE published_at IS NULL), count(*) FROM outbox WHERE topic = 'budget_alert'"
    )
    with running.look() as session:
        return tuple(session.execute(query).one()) == (0, 2)


def reasons(running: Fleet) -> str:
    query = text("SELECT reasons::text FROM queue_views WHERE project_id = :id")
    with running.look() as session:
        return session.scalar(query, {"id": running.project_id}) or ""


def test_a_job_stops_with_a_checkpoint_and_goes_on_at_its_step_when_the_budget_is_raised():
    with fleet() as running:
        heard = listener(running)
        running.scheduler(BUDGET_S="0.2")
        running.node()
        job_id = running.submit("slow", steps=60, save_steps=1000)
        running.until(lambda: running.step(job_id) >= 5)
        give(running, "0.0001")  # a third of a second
        running.until(lambda: running.state(job_id) == "queued", 60)
        (stopped,) = running.attempts(job_id)
        assert (stopped.state, stopped.stop_reason, stopped.preempted_at) == ("preempted", "preempt", None)
        at = running.newest_checkpoint(job_id)
        assert at >= 5
        running.until(running.nothing_held)
        assert any("budget for this month is used up" in message for message in running.messages(job_id))
        running.until(lambda: all_told(running))
        now = standing(running)
        assert now.blocked is not None and now.used.gpu_hours > 0.0001
        assert [alert.threshold for alert in now.alerts] == [80, 100]
        running.until(lambda: "the monthly budget of" in reasons(running))  # a pass has seen the job and left it
        assert [attempt.no for attempt in running.attempts(job_id)] == [1]
        give(running, "100")
        assert running.ends(job_id) == "succeeded"
        first, second = running.attempts(job_id)
        assert (first.id, second.start_step) == (stopped.id, at)
        assert running.steps_trained(job_id)[1][1][0] == at + 1
        assert standing(running).blocked is None and standing(running).holding_jobs == 0
        assert thresholds(heard) == [80, 100]


def test_a_scheduler_that_dies_before_it_commits_leaves_the_telling_to_the_next(tmp_path: Path):
    with fleet() as running:
        heard = listener(running)
        give(running, "0")
        dies = {"FAILPOINT": "budget.settled:kill:once", "FAILPOINT_DIR": str(tmp_path), "FAILPOINTS_ALLOWED": "1"}
        both = [running.scheduler(name, BUDGET_S="0.2", **dies) for name in "ab"]
        running.until(lambda: all_told(running), 60)
        ended = [process.poll() for process in both]
        assert sorted(ended, key=str) == [-signal.SIGKILL, None]
        assert [alert.threshold for alert in standing(running).alerts] == [80, 100]
        assert standing(running).blocked
        assert thresholds(heard) == [80, 100]
