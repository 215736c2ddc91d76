"""The main job, end to end, with a trainer that needs no torch."""

import json
import math
import signal

import pytest
from redis import Redis
from sqlalchemy import select, text

from tests.fleet import ROWS, fleet, rows_of
from tests.servers import servers
from tunery import adapters, ids, leases
from tunery.db import for_project, transaction
from tunery.models import Dataset, Job, Usage


@pytest.fixture(scope="module")
def running():
    with fleet() as started:
        started.scheduler()
        started.node()
        yield started


def test_a_job_runs_to_a_published_verified_adapter(running):
    job_id = running.submit("ok")
    assert running.ends(job_id) == "succeeded"
    (version,) = running.versions(job_id)
    assert version.model_name.startswith("ft:tiny:acme:ok:")
    weights = next(file for file in version.files if file["name"] == adapters.WEIGHTS)
    stored = running.storage.get_bytes(f"{version.object_prefix}/{adapters.WEIGHTS}")
    assert stored.startswith(b"weights of ftjob-")
    assert weights["sha256"] == version.sha256
    (attempt,) = running.attempts(job_id)
    assert attempt.state == "succeeded"
    assert attempt.details["peak_memory_bytes"] == 4096
    running.until(running.nothing_held, 5)
    running.until(running.nothing_left, 5)
    with running.look() as session:
        job = session.get_one(Job, job_id)
        assert job.trained_tokens == 140
        assert job.progress["eval_before"] == {"eval/loss": 2.0}
        assert job.hyperparameters["n_epochs"] > 0
        usage = session.scalars(select(Usage).where(Usage.job_id == job_id)).one()
        assert usage.gpu_seconds > 0
    messages = running.messages(job_id)
    assert messages[0].startswith("Created fine-tuning job")
    assert messages[-1] == "The job has successfully completed"


def test_a_subscriber_hears_once_that_a_job_has_ended(running):
    listener = Redis.from_url(servers().redis_url).pubsub()
    listener.psubscribe("training:done:*")
    assert listener.get_message(timeout=5)["type"] == "psubscribe"
    job_id = running.submit("ok", steps=1)
    running.ends(job_id)
    heard = []
    while (message := listener.get_message(timeout=2)) is not None:
        heard.append(message)
    mine = [message for message in heard if ids.encode(ids.JOB, job_id) in message["channel"].decode()]
    assert [json.loads(message["data"])["status"] for message in mine] == ["succeeded"]


def test_another_node_raises_what_runs_at_once_without_a_restart(running):
    made = [running.submit("slow", steps=120) for _ in range(2)]
    running.until(lambda: sorted(map(running.state, made)) == ["queued", "running"])
    waiting = next(job_id for job_id in made if running.state(job_id) == "queued")
    running.until(lambda: "1 of 1 suitable devices are busy" in running.why(waiting))
    second = running.node("second")
    running.until(lambda: [running.state(job_id) for job_id in made] == ["running", "running"], 20)
    assert [running.ends(job_id) for job_id in made] == ["succeeded"] * 2
    second.send_signal(signal.SIGTERM)
    assert second.wait(20) == 0


def test_a_loss_of_nan_survives_to_the_stored_series(running):
    job_id = running.submit("ok", steps=3)
    running.ends(job_id)
    query = text(
        "SELECT v FROM metric_chunks c JOIN metric_series m ON m.id = c.series_id, unnest(c.vals) v "
        "WHERE m.job_id = :j AND m.name = 'train/loss'"
    )
    with running.look() as session:
        values = list(session.scalars(query, {"j": job_id}))
    assert len(values) == 3
    assert sum(math.isnan(value) for value in values) == 1


def test_rows_checked_once_are_not_checked_again(running):
    first, second = running.submit("ok", steps=1), running.submit("ok", steps=1)
    running.ends(first)
    running.ends(second)
    assert any("already checked" in message for message in running.messages(second))
    with running.look() as session:
        assert len(list(session.scalars(select(Dataset)))) == 1


def test_two_jobs_of_one_name_become_two_versions_of_one_adapter(running):
    made = [running.submit("twice", steps=1) for _ in range(2)]
    assert [running.ends(job_id) for job_id in made] == ["succeeded"] * 2
    numbers = {running.versions(job_id)[0].version for job_id in made}
    assert len(numbers) == 2
    assert len({running.versions(job_id)[0].adapter_id for job_id in made}) == 1


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (ROWS + b"{not json\n", "line 13: not valid JSON"),
        (ROWS + b'{"messages": [{"role": "bot", "content": "x"}]}\n', "messages[0].role is 'bot'"),
        (ROWS + b'{"messages": [{"role": "user", "content": "x"}]}\n', "the last message must be from the assistant"),
        (ROWS + b'{"text": "x"}\n', "a 'text' row in a file whose first row is 'chat'"),
        (rows_of(9), "has 9 rows; at least 10 are needed"),
    ],
)
def test_bad_rows_end_the_job_and_name_the_line(running, rows, says):
    job_id = running.submit("ok", rows=rows)
    assert running.ends(job_id) == "failed"
    with running.look() as session:
        job = session.get_one(Job, job_id)
        assert says in job.error_message
        assert (job.error_code, job.error_param) == ("invalid_training_file", "training_file")
    assert running.attempts(job_id) == []


def test_a_users_fault_is_not_tried_again(running):
    job_id = running.submit("reject")
    assert running.ends(job_id) == "failed"
    (attempt,) = running.attempts(job_id)
    assert attempt.failure_code == "invalid_target_modules"
    assert "nose" in attempt.failure_message


def test_a_trainer_that_always_crashes_is_given_up_after_three_faults_without_progress(running):
    job_id = running.submit("crash-always")
    assert running.ends(job_id) == "failed"
    made = running.attempts(job_id)
    assert [attempt.state for attempt in made] == ["failed"] * 3
    assert all(
        "signal 9" in attempt.failure_message and "something of ours broke" in attempt.failure_message
        for attempt in made
    )
    running.until(running.nothing_held, 5)


def test_progress_forgives_earlier_faults(running):
    job_id = running.submit("crash-25", steps=30)
    assert running.ends(job_id) == "succeeded"
    assert running.steps_trained(job_id)[-1][1][0] == 21
    starts = [attempt.start_step for attempt in running.attempts(job_id)]
    assert starts[0] == 0 and starts[-1] == 20


def test_a_running_job_is_cancelled_promptly_and_keeps_nothing(running):
    job_id = running.submit("slow", steps=1000)
    running.until(lambda: running.step(job_id) > 1)
    with transaction(lambda: for_project(running.api, running.project_id)) as session:
        leases.cancel(session, running.project_id, job_id)
    assert running.ends(job_id, 10) == "cancelled"
    running.until(running.nothing_held, 5)
    running.until(running.nothing_left, 5)
    assert running.versions(job_id) == []


def test_a_trainer_that_talks_on_and_ignores_a_stop_is_killed(running):
    job_id = running.submit("deaf", steps=400, save_steps=1000)
    running.until(lambda: running.step(job_id) > 2)
    with transaction(lambda: for_project(running.api, running.project_id)) as session:
        leases.cancel(session, running.project_id, job_id)
    assert running.ends(job_id, 20) == "cancelled"
    running.until(running.nothing_held, 5)


def test_a_flood_of_metrics_neither_stops_the_job_nor_fills_the_disk(running):
    job_id = running.submit("flood", steps=5)
    assert running.ends(job_id) == "succeeded"
    assert {step for _, steps in running.steps_trained(job_id) for step in steps} <= set(range(1, 6))


def test_an_orderly_stop_checkpoints_and_another_start_goes_on_from_there():
    with fleet() as running:
        running.scheduler()
        node = running.node()
        job_id = running.submit("slow", steps=40, save_steps=1000)
        running.until(lambda: running.step(job_id) >= 5)
        node.send_signal(signal.SIGTERM)
        assert node.wait(20) == 0
        assert running.state(job_id) == "queued"
        assert running.nothing_held()
        stopped_at = running.newest_checkpoint(job_id)
        assert stopped_at >= 4
        running.node()
        assert running.ends(job_id) == "succeeded"
        assert running.steps_trained(job_id)[1][1][0] == stopped_at + 1
