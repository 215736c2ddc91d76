"""What a training would take, asked before it is submitted."""

from collections.abc import Callable
from typing import Any

import httpx
import pytest
from sqlalchemy import text, update

from tests import factories
from tests.factories import GIB, Database, FleetNode, Tenant
from tunery.models import Gpu, Node

Ask = Callable[..., dict[str, Any]]


@pytest.fixture(autouse=True)
def alone(database: Database) -> None:
    with factories.owner(database) as session, session.begin():
        session.execute(update(Node).values(removed_at=text("now()")))


@pytest.fixture
def ask(client: httpx.Client) -> Ask:
    def call(status: int = 200, **body: Any) -> dict[str, Any]:
        answer = client.post("/v1/fine_tuning/estimate", json=body)
        assert answer.status_code == status, answer.text
        return answer.json() if status == 200 else answer.json()["error"]

    return call


def gpus(database: Database, name: str, gib: int, *, price: float | None = None) -> FleetNode:
    node = factories.node(database, gpus=2, usable_bytes=gib * GIB)
    with factories.owner(database) as session, session.begin():
        session.execute(update(Gpu).where(Gpu.node_id == node.id).values(gpu_class=name))
        query = """INSERT INTO gpu_classes (name, price_per_hour) VALUES (:name, :price)
                   ON CONFLICT (name) DO UPDATE SET price_per_hour = :price"""
        session.execute(text(query), {"name": name, "price": price})
    return node


def test_the_rule_of_thumb_gives_the_known_figures(ask: Ask) -> None:
    """8B, 10,000 rows, 3 epochs: 0.3 h, 16 GB, $0.26, about 80 MB."""
    found = ask(parameters=8_000_000_000, rows=10_000, hyperparameters={"n_epochs": 3}, profile="seed001")
    (one,) = found["classes"]
    assert one["hours"] == 0.3 and one["gpu_bytes"] == 16_000_000_000
    assert round(one["amount"], 2) == 0.26
    assert 76e6 <= found["adapter_bytes"] <= 84e6


def test_each_class_has_its_time_its_price_and_whether_it_fits(ask: Ask, database: Database) -> None:
    gpus(database, "h100-80gb", 76, price=2.0)
    gpus(database, "l4-24gb", 22, price=0.5)
    gpus(database, "t4-8gb", 8)
    asked = {"parameters": 8_000_000_000, "rows": 10_000, "hyperparameters": {"n_epochs": 3}}
    found = ask(**asked)
    by_name = {one["gpu_class"]: one for one in found["classes"]}
    assert found["tokens"] == 10_000 * 3 * 300 and found["epochs"] == 3
    assert by_name["h100-80gb"]["fits"] and not by_name["t4-8gb"]["fits"]
    assert found["classes"][-1]["gpu_class"] == "t4-8gb", "what does not fit comes last"
    assert by_name["h100-80gb"]["hours"] < by_name["l4-24gb"]["hours"] < by_name["l4-24gb"]["hours_p90"]
    fast = by_name["h100-80gb"]
    assert fast["amount"] == pytest.approx(2 * fast["hours"], abs=1e-3) and fast["runs"] == 0
    assert by_name["t4-8gb"]["amount"] is None
    (only,) = ask(**asked, tunery={"resources": {"gpu_class": "l4-24gb"}})["classes"]
    assert only == by_name["l4-24gb"]
    double = ask(**asked, tunery={"resources": {"gpus": 2}})
    assert double["gpus"] == 2 and ask(**asked, tunery={"resources": {"gpus": 3}})["classes"][0]["fits"] is False


def test_without_nodes_nothing_is_said_of_fitting(ask: Ask, base_model: str) -> None:
    (one,) = ask(model=base_model, rows=100)["classes"]
    assert one["fits"] is None and one["amount"] is None and one["gpu_bytes"] > 1 << 30


def test_rows_of_a_checked_file_are_known_and_past_runs_speak(
    ask: Ask, project: Tenant, database: Database, client: httpx.Client
) -> None:
    node, model = gpus(database, "h100-80gb", 76, price=1.0), factories.base_model(database, "quoted")
    work = factories.running(project, node, model=model)
    with factories.owner(database) as session, session.begin():
        query = "UPDATE attempts SET first_step_at = now() - interval '72 s' WHERE id = :id"
        session.execute(text(query), {"id": work.attempt_id})
    factories.publish(work, peak_bytes=3 * GIB)
    training_file = client.get(f"/v1/fine_tuning/jobs/{work.id}").json()["training_file"]
    found = ask(model=model, training_file=training_file)
    (one,) = found["classes"]
    assert found["rows"] == 40 and one["runs"] == 1
    # the run had two GPUs; one alone takes twice as long
    assert 144 <= one["hours"] * 3600 < 264 and one["gpu_bytes"] > 3 * GIB
    longer = ask(model=model, training_file=training_file, hyperparameters={"n_epochs": 6})["classes"][0]
    assert longer["hours"] > 1.8 * one["hours"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"rows": 10}, "model"),
        ({"parameters": 8_000_000_000}, "rows"),
        ({"parameters": 8_000_000_000, "rows": 0}, "rows"),
        ({"parameters": 1, "rows": 10}, "parameters"),
        ({"parameters": 8_000_000_000, "rows": 10, "profile": "guess"}, "profile"),
        ({"parameters": 8_000_000_000, "rows": 10, "tunery": {"resources": {"gpus": 0}}}, "tunery.resources.gpus"),
    ],
)
def test_what_is_missing_or_wrong_is_named(ask: Ask, body: dict[str, Any], param: str) -> None:
    assert ask(400, **body)["param"] == param


def test_a_file_that_was_never_checked_needs_its_rows(ask: Ask, project: Tenant, base_model: str) -> None:
    training_file = factories.file(project)
    assert ask(400, model=base_model, training_file=training_file)["param"] == "rows"
    assert ask(model=base_model, training_file=training_file, rows=10)["rows"] == 10


def test_anothers_file_and_an_unknown_model(ask: Ask, other_project: Tenant, base_model: str) -> None:
    theirs = factories.file(other_project)
    assert ask(404, model=base_model, training_file=theirs)["param"] == "training_file"
    assert ask(404, model="nope", rows=1)["code"] == "model_not_found"
