"""What a job asks for and what it needs: refused, written down, learned from, raised."""

import uuid
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from sqlalchemy import select, text, update

from tests import factories
from tests.factories import GIB, Database, FleetNode, Tenant, Work
from tunery import events, observations
from tunery.estimate.correction import Seen, reservation, tail_mean
from tunery.models import Gpu, Node, RunObservation
from tunery.recipes import Extension
from tunery.states import FailureCode, JobState

Client = Callable[[Tenant | None], httpx.Client]


@pytest.fixture(autouse=True)
def alone(database: Database) -> None:
    """Nodes of earlier tests are gone: what is largest is this test's own."""
    with factories.owner(database) as session, session.begin():
        session.execute(update(Node).values(removed_at=text("now()")))


@pytest.fixture
def ask(client: httpx.Client, base_model: str, project: Tenant, app: Any) -> Callable[..., httpx.Response]:
    """Submit a job with these `resources` or this `scheduling`."""
    app.state.settings = app.state.settings.model_copy(update={"max_gpus_per_job": 8})

    def submit(**tunery: Any) -> httpx.Response:
        body = {"model": base_model, "training_file": factories.file(project), "tunery": tunery}
        return client.post("/v1/fine_tuning/jobs", json=body)

    return submit


def refused(response: httpx.Response) -> dict[str, Any]:
    assert response.status_code == 400, response.text
    assert response.json()["error"]["code"] == "invalid_request"
    return response.json()["error"]


# ---- asking -------------------------------------------------------------------------------------------------------


def test_what_is_asked_for_is_kept_and_shown(ask: Callable[..., httpx.Response], database: Database) -> None:
    node = factories.node(database, gpus=2)
    describe(database, node, gpu_class="h100-80gb", labels={"rack": "b", "disk": "nvme"})
    resources = {"gpus": 2, "gpu_class": "h100-80gb", "node_labels": {"rack": "b"}, "shareable": True}
    made = ask(resources=resources, scheduling={"priority": -7, "time_limit": "2h30m", "preemptible": False})
    assert made.status_code == 200, made.text
    shown = made.json()["tunery"]
    assert shown["resources"] == resources | {"gpu_bytes": None}
    assert shown["scheduling"] == {
        "priority": -7, "time_limit": 9000.0, "preemptible": False, "urgent": False, "limit_s": 1800.0,
    }  # fmt: skip


def test_what_is_not_asked_for_has_its_default(ask: Callable[..., httpx.Response]) -> None:
    shown = ask().json()["tunery"]
    assert shown["resources"] == {
        "gpus": 1, "gpu_class": None, "node_labels": {}, "shareable": False, "gpu_bytes": None,
    }  # fmt: skip
    assert shown["scheduling"]["priority"] == 0 and shown["scheduling"]["time_limit"] is None


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"resources": {"gpus": 0}}, "tunery.resources.gpus"),
        ({"resources": {"gpus": 9}}, "tunery.resources.gpus"),
        ({"resources": {"gpu_class": "no spaces"}}, "tunery.resources.gpu_class"),
        ({"scheduling": {"priority": 101}}, "tunery.scheduling.priority"),
        ({"scheduling": {"time_limit": "soon"}}, "tunery.scheduling.time_limit"),
        ({"scheduling": {"time_limit": 59}}, "tunery.scheduling.time_limit"),
        ({"scheduling": {"time_limit": ""}}, "tunery.scheduling.time_limit"),
        ({"scheduling": {"whenever": True}}, "tunery.scheduling.whenever"),
    ],
)
def test_nonsense_is_refused_by_name(ask: Callable[..., httpx.Response], wrong: dict[str, Any], param: str) -> None:
    assert refused(ask(**wrong))["param"] == param


@pytest.mark.parametrize(("given", "seconds"), [("90m", 5400), ("1d2h", 93600), ("3600s", 3600), (120, 120)])
def test_a_time_limit_is_seconds_or_a_period(given: Any, seconds: float) -> None:
    said = Extension.model_validate({"scheduling": {"time_limit": given}})
    assert said.scheduling.time_limit == seconds
    assert Extension.model_validate(said.model_dump(exclude_unset=True)) == said


def test_urgent_is_for_operators(
    connect: Client, tenants: Callable[..., Tenant], base_model: str, ask: Callable[..., httpx.Response]
) -> None:
    ordinary = tenants("jobs:write", "jobs:read")
    body = {"model": base_model, "training_file": factories.file(ordinary), "tunery": {"scheduling": {"urgent": True}}}
    answer = connect(ordinary).post("/v1/fine_tuning/jobs", json=body)
    assert answer.status_code == 403 and answer.json()["error"]["code"] == "insufficient_scope"
    assert ask(scheduling={"urgent": True}).json()["tunery"]["scheduling"]["urgent"]


def test_what_no_node_could_ever_have_is_refused_with_what_there_is(
    ask: Callable[..., httpx.Response], database: Database
) -> None:
    assert ask(resources={"gpus": 8, "gpu_class": "unheard-of"}).status_code == 200, "no nodes, nothing to compare"
    describe(database, factories.node(database, gpus=2), gpu_class="h100-80gb", labels={"rack": "b"})
    describe(database, factories.node(database, gpus=4), gpu_class="a100-40gb", labels={"rack": "c"})
    assert "there are: a100-40gb, h100-80gb" in refused(ask(resources={"gpu_class": "unheard-of"}))["message"]
    assert "has 4" in refused(ask(resources={"gpus": 5}))["message"]
    assert "has 2" in refused(ask(resources={"gpus": 3, "gpu_class": "h100-80gb"}))["message"]
    assert "rack=d" in refused(ask(resources={"node_labels": {"rack": "d"}}))["message"]
    neither = refused(ask(resources={"gpu_class": "h100-80gb", "node_labels": {"rack": "c"}}))
    assert "rack=c and GPUs of the class 'h100-80gb'" in neither["message"]
    assert ask(resources={"gpus": 4, "node_labels": {"rack": "c"}}).status_code == 200


def test_a_model_whose_weights_fit_no_device_is_refused(
    ask: Callable[..., httpx.Response], client: httpx.Client, project: Tenant, database: Database
) -> None:
    factories.node(database, usable_bytes=GIB)
    name = f"huge-{uuid.uuid4().hex[:6]}"
    factories.base_model(database, name)
    with factories.owner(database) as session, session.begin():
        session.execute(text("UPDATE base_models SET parameters = 70000000000 WHERE name = :name"), {"name": name})
    body = {"model": name, "training_file": factories.file(project)}
    told = refused(client.post("/v1/fine_tuning/jobs", json=body))
    assert "140.0 GB" in told["message"] and "1.1 GB" in told["message"]


# ---- priority -----------------------------------------------------------------------------------------------------


def test_a_priority_is_changed_and_told(
    client: httpx.Client, project: Tenant, node: FleetNode, base_model: str
) -> None:
    work = factories.queued(project, node, model=base_model)
    changed = client.post(f"/v1/fine_tuning/jobs/{work.id}/priority", json={"priority": 20})
    assert changed.status_code == 200 and changed.json()["tunery"]["scheduling"]["priority"] == 20
    assert "Priority changed from 0 to 20" in messages(work)
    assert client.post(f"/v1/fine_tuning/jobs/{work.id}/priority", json={"priority": 101}).status_code == 400


def test_a_priority_of_what_has_ended_or_is_anothers(
    client: httpx.Client, connect: Client, project: Tenant, other_project: Tenant, node: FleetNode, base_model: str
) -> None:
    work = factories.cancelled(project, node, model=base_model)
    assert client.post(f"/v1/fine_tuning/jobs/{work.id}/priority", json={"priority": 1}).status_code == 409
    theirs = connect(other_project).post(f"/v1/fine_tuning/jobs/{work.id}/priority", json={"priority": 1})
    assert theirs.status_code == 404


# ---- out of memory ------------------------------------------------------------------------------------------------


def test_the_first_time_more_is_reserved_the_second_time_it_fails(
    project: Tenant, base_model: str, database: Database
) -> None:
    node = factories.node(database, usable_bytes=8 * GIB)
    work = factories.running(project, node, model=base_model)
    assert factories.fault(work, FailureCode.OUT_OF_MEMORY) == JobState.QUEUED
    assert factories.look(work).required_bytes == 1.5 * GIB
    assert any("It had 1.1 GB reserved" in told and "Now 1.6 GB are reserved" in told for told in messages(work))
    again = factories.tell(factories.claim(factories.assign(work)), factories.started())
    assert factories.fault(again, FailureCode.OUT_OF_MEMORY, "CUDA out of memory.") == JobState.FAILED
    job = factories.look(work)
    assert job.error_code == FailureCode.OUT_OF_MEMORY and "second try" in (job.error_message or "")
    assert job.faults_without_progress == 0


def test_what_was_measured_counts_where_it_is_more(project: Tenant, base_model: str, database: Database) -> None:
    node = factories.node(database, usable_bytes=8 * GIB)
    work = factories.running(project, node, model=base_model)
    assert factories.fault(work, FailureCode.OUT_OF_MEMORY, peak_bytes=4 * GIB) == JobState.QUEUED
    assert abs((factories.look(work).required_bytes or 0) - 1.15 * 4 * GIB) < 2


def test_without_a_larger_device_it_fails_at_once_and_says_the_numbers(
    project: Tenant, base_model: str, database: Database
) -> None:
    node = factories.node(database, usable_bytes=8 * GIB)
    work = factories.running(project, node, model=base_model)
    assert factories.fault(work, FailureCode.OUT_OF_MEMORY, peak_bytes=8 * GIB) == JobState.FAILED
    told = factories.look(work).error_message or ""
    assert "held 8.6 GB" in told and "needs 9.9 GB" in told and "has 8.6 GB" in told
    assert factories.look(work).required_bytes == GIB


def test_out_of_memory_while_being_cancelled_is_cancelled(project: Tenant, node: FleetNode, base_model: str) -> None:
    work = factories.cancelling(project, node, model=base_model)
    assert factories.fault(work, FailureCode.OUT_OF_MEMORY) == JobState.CANCELLED
    assert factories.look(work).required_bytes == GIB


# ---- learning -----------------------------------------------------------------------------------------------------


def test_a_run_that_ended_leaves_what_it_took(
    project: Tenant, node: FleetNode, base_model: str, database: Database
) -> None:
    work = factories.running(project, node, model=base_model)
    began(database, work)
    factories.publish(work, peak_bytes=3 * GIB)
    seen = observation(work)
    assert seen.outcome == "succeeded" and seen.method == "lora" and seen.gpus == 1
    assert seen.peak_bytes == 3 * GIB and seen.estimated_bytes == factories.look(work).estimated_bytes
    assert seen.tokens == 2000 and 7 <= seen.train_s < 60 and seen.load_s >= 0


def test_a_run_out_of_memory_leaves_its_peak_and_no_speed(project: Tenant, node: FleetNode, base_model: str) -> None:
    work = factories.running(project, node, model=base_model)
    factories.fault(work, FailureCode.OUT_OF_MEMORY, peak_bytes=3 * GIB)
    seen = observation(work)
    assert (seen.outcome, seen.peak_bytes, seen.tokens) == ("out_of_memory", 3 * GIB, 0)


def test_other_failures_teach_nothing(project: Tenant, node: FleetNode, base_model: str) -> None:
    work = factories.failed(project, node, model=base_model)
    with factories.owner(node.database) as session:
        assert session.get(RunObservation, work.attempt_id) is None


@pytest.mark.parametrize("samples", [1, 4, 9, 10, 23])
def test_the_database_and_the_rule_agree(project: Tenant, database: Database, samples: int) -> None:
    """The tail of the newest 50 ratios, in SQL and in Python; the largest peak of the same estimate."""
    node, name = factories.node(database), f"learned-{uuid.uuid4().hex[:6]}"
    factories.base_model(database, name)
    work = factories.succeeded(project, node, model=name)
    ratios = [0.3 + 0.13 * (7 * index % 20) for index in range(samples)]
    with factories.owner(database) as session, session.begin():
        first = session.get_one(RunObservation, work.attempt_id)
        first.estimated_bytes, first.peak_bytes = 1000, round(1000 * ratios[0])
        base_id, gpu_class = first.base_model_id, first.gpu_class
    for ratio in ratios[1:]:
        other = factories.succeeded(project, node, model=name)
        with factories.owner(database) as session, session.begin():
            row = session.get_one(RunObservation, other.attempt_id)
            row.estimated_bytes, row.peak_bytes = 1000, round(1000 * ratio)
    with node.transaction() as session:
        seen = observations.peaks(session, base_id, "lora", gpu_class, 1000)
        nothing = observations.peaks(session, uuid.uuid4(), "qlora", None, 1000)
    assert seen.samples == samples and seen.largest_bytes == round(1000 * max(ratios))
    assert seen.tail == pytest.approx(tail_mean([round(1000 * ratio) / 1000 for ratio in ratios]))
    assert nothing == Seen()


def test_the_next_job_of_its_kind_gets_what_the_last_one_took(
    project: Tenant, other_project: Tenant, database: Database
) -> None:
    """Also where the last one was another project's: that it ran is not told, that it took more is."""
    node, name = factories.node(database, usable_bytes=64 * GIB), f"learned-{uuid.uuid4().hex[:6]}"
    factories.base_model(database, name)
    first = factories.running(other_project, node, model=name)
    factories.publish(first, peak_bytes=9 * GIB)
    second = factories.queued(project, node, model=name)
    estimate = factories.look(second).estimated_bytes
    with node.transaction() as session:
        seen = observations.peaks(session, factories.look(second).base_model_id, "lora", None, estimate or 0)
    assert reservation(estimate or 0, seen) > 9 * GIB
    with project.transaction() as session:
        assert session.scalars(select(RunObservation.attempt_id)).all() == []


# ---- helpers ------------------------------------------------------------------------------------------------------


def describe(database: Database, node: FleetNode, *, gpu_class: str, labels: dict[str, str]) -> None:
    with factories.owner(database) as session, session.begin():
        session.execute(update(Gpu).where(Gpu.node_id == node.id).values(gpu_class=gpu_class))
        session.execute(update(Node).where(Node.id == node.id).values(labels=labels))


def messages(work: Work) -> list[str]:
    with work.tenant.transaction() as session:
        rows, _ = events.page(session, work.tenant.project_id, work.job_id, after=None, limit=100)
        return [row.message for row in rows]


def observation(work: Work) -> RunObservation:
    with factories.owner(work.node.database) as session:
        return session.get_one(RunObservation, work.attempt_id)


def began(database: Database, work: Work) -> None:
    """Its first step was eight seconds ago."""
    with factories.owner(database) as session, session.begin():
        query = "UPDATE attempts SET first_step_at = now() - interval '8 s' WHERE id = :id"
        session.execute(text(query), {"id": work.attempt_id})
