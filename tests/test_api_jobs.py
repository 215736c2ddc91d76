"""Jobs over HTTP: what a request may say, what a job shows, cancelling in every state, logs."""

import json
import time
from typing import Any

import httpx
import pytest
from sqlalchemy import event, update

from tests import factories
from tests.factories import Database, FleetNode, Tenant
from tunery import ids, leases, queue
from tunery.contracts.scheduling import Plan, Reason, Wait, WaitCode
from tunery.db import transaction
from tunery.models import Attempt, Job
from tunery.states import FailureCode, JobState
from tunery.storage import Storage

JOBS = "/v1/fine_tuning/jobs"


@pytest.fixture
def body(base_model: str, project: Tenant) -> dict[str, Any]:
    return {"model": base_model, "training_file": factories.file(project)}


def error(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    return response.json()["error"]


# ---- what a request may say -----------------------------------------------------------------------------------

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"model": None}, "model"),
    ({"model": ""}, "model"),
    ({"training_file": 7}, "training_file"),
    ({"epochs": 3}, "epochs"),
    ({"seed": "x"}, "seed"),
    ({"seed": 2**64}, "seed"),
    ({"seed": 1, "tunery": {"training": {"seed": 2}}}, "seed"),
    ({"suffix": ""}, "suffix"),
    ({"suffix": "a" * 65}, "suffix"),
    ({"suffix": "a:b"}, "suffix"),
    ({"suffix": "../up"}, "suffix"),
    ({"metadata": {"team": 1}}, "metadata.team"),
    ({"metadata": {"k" * 65: "v"}}, "metadata"),
    ({"metadata": {"k": "v" * 513}}, "metadata"),
    ({"metadata": {f"k{n}": "v" for n in range(17)}}, "metadata"),
    ({"integrations": [{"type": "wandb", "wandb": {"project": "x"}}]}, "integrations"),
    ({"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.1}}}}, "method.type"),
    ({"method": {"type": "reinforcement"}}, "method.type"),
    ({"method": {}}, "method.type"),
    ({"method": {"type": "supervised", "supervised": {"hyperparameters": {"beta": 1}}}}, "method.supervised"),
    ({"hyperparameters": {"n_epochs": 0}}, "hyperparameters.n_epochs"),
    ({"hyperparameters": {"n_epochs": 51}}, "hyperparameters.n_epochs"),
    ({"hyperparameters": {"n_epochs": 1.5}}, "hyperparameters.n_epochs"),
    ({"hyperparameters": {"n_epochs": True}}, "hyperparameters.n_epochs"),
    ({"hyperparameters": {"n_epochs": "three"}}, "hyperparameters.n_epochs"),
    ({"hyperparameters": {"batch_size": 257}}, "hyperparameters.batch_size"),
    ({"hyperparameters": {"learning_rate_multiplier": 0}}, "hyperparameters.learning_rate_multiplier"),
    ({"hyperparameters": {"learning_rate_multiplier": 1e9}}, "hyperparameters.learning_rate_multiplier"),
    (
        {
            "hyperparameters": {"n_epochs": 2},
            "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 3}}},
        },
        "hyperparameters.n_epochs",
    ),
    ({"tunery": {"training": {"learning_rate": 2}}}, "tunery.training.learning_rate"),
    ({"tunery": {"training": {"lerning_rate": 1e-4}}}, "tunery.training.lerning_rate"),
    ({"tunery": {"adapter": {"r": 0}}}, "tunery.adapter.r"),
    ({"tunery": {"adapter": {"target_modules": 7}}}, "tunery.adapter.target_modules"),
    ({"tunery": {"resources": {"gpus": 8}}}, "tunery.resources.gpus"),
    ({"tunery": {"optimiser": {}}}, "tunery.optimiser"),
    ({"metadata": {"k": "NUL \0"}}, ""),
    ({"metadata": {"k": "\ud800"}}, ""),
]


@pytest.mark.parametrize(("change", "param"), REFUSED, ids=[str(change)[:60] for change, _ in REFUSED])
def test_a_bad_field_is_named(client: httpx.Client, body: dict[str, Any], change: dict[str, Any], param: str) -> None:
    raw = json.dumps(body | change).encode()  # ASCII, so that a lone surrogate arrives as such
    told = error(client.post(JOBS, content=raw, headers={"content-type": "application/json"}), 400)
    assert (told["param"] or "").startswith(param), told
    assert told["message"].endswith(".") and told["docs"].endswith("#invalid_request")
    assert client.get(JOBS).json()["data"] == []


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_not_json(client: httpx.Client, value: str) -> None:
    raw = f'{{"model": "m", "training_file": "f", "tunery": {{"training": {{"weight_decay": {value}}}}}}}'
    error(client.post(JOBS, content=raw, headers={"content-type": "application/json"}), 400)


def test_what_does_not_exist_is_named(client: httpx.Client, body: dict[str, Any], project: Tenant) -> None:
    no_model = error(client.post(JOBS, json=body | {"model": "gpt-9"}), 404)
    assert (no_model["code"], no_model["param"]) == ("model_not_found", "model") and "gpt-9" in no_model["message"]
    for param in ("training_file", "validation_file"):
        missing = error(client.post(JOBS, json=body | {param: "file-nope"}), 404)
        assert missing["param"] == param and "file-nope" in missing["message"]
    wrong = factories.file(project, purpose="batch")
    assert error(client.post(JOBS, json=body | {"training_file": wrong}), 400)["param"] == "training_file"


def test_a_model_that_is_still_being_imported(client: httpx.Client, body: dict[str, Any], database: Database) -> None:
    name = factories.base_model(database, "soon", state="importing")
    told = error(client.post(JOBS, json=body | {"model": name}), 400)
    assert told["param"] == "model" and "still being imported" in told["message"] and told["fix"]


def test_a_quota_that_waiting_does_not_clear(client: httpx.Client, body: dict[str, Any], project: Tenant) -> None:
    made = [client.post(JOBS, json=body).status_code for _ in range(50)]
    assert set(made) == {200}
    refused = client.post(JOBS, json=body)
    assert error(refused, 429)["code"] == "insufficient_quota" and refused.headers["x-should-retry"] == "false"


def test_what_is_unset_stays_unset(client: httpx.Client, body: dict[str, Any], database: Database) -> None:
    """A partial `training` must not carry defaults: they would win over OpenAI's hyperparameters."""
    asked = {"hyperparameters": {"n_epochs": 7}, "tunery": {"training": {"max_length": 512}}}
    made = client.post(JOBS, json=body | asked).json()
    with transaction(database.sessions("owner")) as session:
        job = session.get_one(Job, ids.decode(ids.JOB, made["id"]))
        assert job.request["tunery"] == {"training": {"max_length": 512}}
        assert job.request["hyperparameters"]["n_epochs"] == 7


@pytest.mark.parametrize("empty", [{"integrations": None}, {"integrations": []}, {"method": None}, {"metadata": None}])
def test_nothing_is_as_good_as_absent(client: httpx.Client, body: dict[str, Any], empty: dict[str, Any]) -> None:
    assert client.post(JOBS, json=body | empty | {"validation_file": None, "tunery": None}).status_code == 200


def test_a_seed_in_our_extension_is_the_seed_that_is_shown(client: httpx.Client, body: dict[str, Any]) -> None:
    assert client.post(JOBS, json=body | {"tunery": {"training": {"seed": 5}}}).json()["seed"] == 5


def test_a_job_gets_a_seed_if_it_has_none(client: httpx.Client, body: dict[str, Any]) -> None:
    assert isinstance(client.post(JOBS, json=body).json()["seed"], int)


# ---- what a job shows -------------------------------------------------------------------------------------------


def test_a_waiting_job_says_why_and_where_it_stands(
    client: httpx.Client, project: Tenant, node: FleetNode, base_model: str, database: Database
) -> None:
    first, second = factories.queued(project, node), factories.queued(project, node)
    waits = [(first.job_id, Reason(WaitCode.HOLDS)), (second.job_id, Reason(WaitCode.NO_NODE))]
    with transaction(database.sessions("tunery_scheduler")) as session:
        epoch = queue.lead(session, "test", ttl_s=60)
        assert epoch is not None
        queue.record(session, epoch, Plan(waits=tuple(Wait(*wait) for wait in waits)), queue.Mirror())
    listed = {job["id"]: job["tunery"]["queue"] for job in client.get(JOBS).json()["data"]}
    reason = "needs 1 GPU with 1.1 GB; no node is up that has room on its disk"
    assert listed[second.id]["reason"] == {"code": "no_node", "message": reason, "numbers": {}}
    assert listed[second.id]["jobs_ahead"] == {"own": 1, "others": None}
    assert listed[first.id]["jobs_ahead"]["own"] == 0 and listed[first.id]["estimated_start"] is None
    factories.assign(first)
    shown = client.get(f"{JOBS}/{first.id}").json()
    assert "assigned to node" in shown["tunery"]["queue"]["reason"]["message"] and shown["status"] == "queued"


def test_a_running_job_says_how_far_it_is(
    client: httpx.Client, project: Tenant, node: FleetNode, base_model: str
) -> None:
    work = factories.running(project, node)
    factories.tell(
        work,
        *(
            factories.metrics(n + 1, step=n, loss=2.0 / n).model_copy(update={"time": 1000.0 + 3 * n})
            for n in range(1, 11)
        ),
    )
    sampled = {"train/loss": 0.2, "system/gpu_memory_bytes": 3e9}
    factories.tell(work, factories.metrics(12, step=10).model_copy(update={"time": 1030.0, "values": sampled}))
    shown = client.get(f"{JOBS}/{work.id}").json()
    progress = shown["tunery"]["progress"]
    assert (progress["gpu_memory_bytes"], progress["gpu_utilization"]) == (3e9, None)
    assert (progress["sampled_at"], progress["underused_since"], progress["epoch_seconds"]) == (None, None, [])
    assert (progress["step"], progress["total_steps"], progress["percent"]) == (10, 40, 25.0)
    assert progress["loss"] == pytest.approx(0.2) and progress["eta_seconds"] == 90
    assert abs(shown["estimated_finish"] - time.time() - 90) < 5
    [attempt] = shown["tunery"]["attempts"]
    assert (attempt["no"], attempt["state"], attempt["device"]) == (1, "running", "Test GPU")


def test_a_succeeded_job_names_its_adapter(
    client: httpx.Client, project: Tenant, node: FleetNode, base_model: str, storage: Storage
) -> None:
    work = factories.succeeded(project, node, suffix="capitals")
    shown = client.get(f"{JOBS}/{work.id}").json()
    adapter = shown["tunery"]["adapter"]
    assert (adapter["name"], adapter["version"], adapter["model_name"]) == ("capitals", 1, shown["fine_tuned_model"])
    assert adapter["uri"] == storage.uri(f"a/{project.project_id}/{work.attempt_id}/output")
    assert shown["tunery"]["progress"]["percent"] == 100 and shown["trained_tokens"] == 2000


def test_a_failed_job_says_why(client: httpx.Client, project: Tenant, node: FleetNode, base_model: str) -> None:
    shown = client.get(f"{JOBS}/{factories.failed(project, node).id}").json()
    assert shown["error"] == {"code": "non_finite_loss", "message": "The loss is NaN at step 3.", "param": None}
    assert shown["tunery"]["attempts"][0]["failure_code"] == "non_finite_loss"


def test_a_page_of_jobs_costs_the_same_queries_whatever_its_length(
    client: httpx.Client, project: Tenant, node: FleetNode, base_model: str, database: Database
) -> None:
    seen: list[str] = []
    engine = database.engine("tunery_api")
    event.listen(engine, "before_cursor_execute", lambda *given: seen.append(given[2]))
    counts = []
    for _ in range(2):
        factories.queued(project, node)
        seen.clear()
        client.get(JOBS)
        counts.append(len(seen))
    assert counts[0] == counts[1]


# ---- cancelling ---------------------------------------------------------------------------------------------------

AT_ONCE = (JobState.VALIDATING, JobState.QUEUED)
ASKED = (JobState.STARTING, JobState.RUNNING, JobState.CANCELLING)


@pytest.mark.parametrize("state", list(factories.IN_STATE))
def test_cancel_in_every_state(
    client: httpx.Client, project: Tenant, node: FleetNode, base_model: str, state: JobState
) -> None:
    work = factories.IN_STATE[state](project, node)
    answer = client.post(f"{JOBS}/{work.id}/cancel")
    if state in (JobState.SUCCEEDED, JobState.FAILED):
        assert error(answer, 409)["code"] == "conflict" and answer.headers["x-should-retry"] == "false"
        assert factories.look(work).state == state
        return
    shown = answer.json()
    assert answer.status_code == 200 and shown["status"] == "cancelled"
    assert shown["tunery"]["state"] == ("cancelling" if state in ASKED else "cancelled")
    assert (shown["finished_at"] is None) == (state in ASKED)
    if state in ASKED:
        assert factories.attempt(work).stop_reason == "cancel"
        factories.stop(work)
    assert factories.look(work).state == JobState.CANCELLED
    assert factories.free_bytes(node) == node.usable_bytes
    assert client.post(f"{JOBS}/{work.id}/cancel").json()["tunery"]["state"] == "cancelled"  # twice is once
    told = [event["message"] for event in client.get(f"{JOBS}/{work.id}/events").json()["data"]]
    assert told.count("The job was cancelled") == 1


def test_cancelling_an_assigned_job_frees_what_it_was_given(
    client: httpx.Client, project: Tenant, node: FleetNode, base_model: str
) -> None:
    work = factories.assigned(project, node)
    assert factories.free_bytes(node) == 0
    assert client.post(f"{JOBS}/{work.id}/cancel").json()["tunery"]["state"] == "cancelled"
    assert factories.free_bytes(node) == node.usable_bytes
    with node.transaction() as session:
        assert leases.claim(session, work.attempt_id, "late", 45) is None


def test_cancelling_a_paused_job(client: httpx.Client, project: Tenant, node: FleetNode, base_model: str) -> None:
    """Nothing pauses yet; the state exists, and must have its way out."""
    work = factories.queued(project, node)
    with transaction(node.database.sessions("owner")) as session:
        session.execute(update(Job).where(Job.id == work.job_id).values(state=JobState.PAUSED))
    shown = client.get(f"{JOBS}/{work.id}").json()
    assert (shown["status"], shown["tunery"]["state"]) == ("queued", "paused")
    assert client.post(f"{JOBS}/{work.id}/cancel").json()["tunery"]["state"] == "cancelled"


def test_a_job_cancelled_while_its_trainer_dies_is_cancelled(
    client: httpx.Client, project: Tenant, node: FleetNode, base_model: str
) -> None:
    work = factories.cancelling(project, node)
    assert factories.fault(work, FailureCode.TRAINER_CRASHED) == JobState.CANCELLED


# ---- logs -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def logged(project: Tenant, node: FleetNode, base_model: str, storage: Storage) -> Any:
    """A running job whose log lies in chunks."""
    work = factories.running(project, node)

    def write(*chunks: bytes) -> Any:
        offset = 0
        for chunk in chunks:
            storage.put_bytes(f"a/{project.project_id}/{work.attempt_id}/logs/{offset:012}", chunk)
            offset += len(chunk)
        with node.transaction() as session:
            session.execute(update(Attempt).where(Attempt.id == work.attempt_id).values(log_bytes=offset))
        return work

    return write


def read_all(client: httpx.Client, work: Any, **params: int) -> tuple[str, list[dict[str, Any]]]:
    pieces: list[dict[str, Any]] = []
    offset = 0
    while not pieces or (pieces[-1]["next_offset"] > offset and not pieces[-1]["complete"]):
        offset = pieces[-1]["next_offset"] if pieces else 0
        pieces.append(client.get(f"{JOBS}/{work.id}/logs", params={"offset": offset} | params).json())
    return "".join(piece["text"] for piece in pieces), pieces


def test_a_log_is_read_back_across_chunks_and_letters(client: httpx.Client, logged: Any) -> None:
    text = "step 1\n" + "café 日本 🎉 " * 30_000  # 780,000 bytes: several answers, cut anywhere
    raw = text.encode()
    work = logged(*(raw[at : at + 9973] for at in range(0, len(raw), 9973)))
    read, pieces = read_all(client, work)
    assert read == text and len(pieces) > 2 and "\ufffd" not in read
    assert all(piece["next_offset"] - piece["offset"] <= 256 * 1024 for piece in pieces)
    assert pieces[-1]["complete"] is False and pieces[-1]["next_offset"] == len(raw)
    factories.publish(work)
    ended = client.get(f"{JOBS}/{work.id}/logs", params={"offset": len(raw)}).json()
    assert (ended["text"], ended["complete"], ended["attempt"]) == ("", True, 1)


def test_a_log_from_the_middle(client: httpx.Client, logged: Any) -> None:
    work = logged(b"one\n", b"two\n", b"three\n")
    piece = client.get(f"{JOBS}/{work.id}/logs", params={"offset": 6}).json()
    assert (piece["text"], piece["offset"], piece["next_offset"]) == ("o\nthree\n", 6, 14)
    beyond = client.get(f"{JOBS}/{work.id}/logs", params={"offset": 99}).json()
    assert (beyond["text"], beyond["next_offset"]) == ("", 99)


def test_bytes_that_are_no_text_do_not_stop_a_log(client: httpx.Client, logged: Any) -> None:
    work = logged(b"ok \xff\xfe\x80\x80\x80\x80 then", b" more \xe6\x97")
    assert read_all(client, work)[0].endswith("then more ")
    factories.publish(work)
    text, pieces = read_all(client, work)
    assert text.endswith("more \ufffd") and pieces[-1]["complete"]


def test_logs_before_any_attempt_and_of_none(
    client: httpx.Client, project: Tenant, node: FleetNode, logged: Any
) -> None:
    waiting = factories.submitted(project, node)
    assert error(client.get(f"{JOBS}/{waiting.id}/logs"), 404)["param"] == "attempt"
    work = logged(b"x")
    assert error(client.get(f"{JOBS}/{work.id}/logs", params={"attempt": 2}), 404)["param"] == "attempt"
    assert client.get(f"{JOBS}/{work.id}/logs", params={"attempt": 1}).json()["text"] == "x"
    assert error(client.get(f"{JOBS}/{work.id}/logs", params={"offset": -1}), 400)["param"] == "offset"


def test_a_quiet_trainers_many_chunks_take_several_answers(client: httpx.Client, logged: Any) -> None:
    work = logged(*[b"tick\n"] * 150)
    text, pieces = read_all(client, work)
    assert text == "tick\n" * 150 and len(pieces) >= 3
