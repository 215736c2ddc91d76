"""Nodes taken out of service and brought back, and their labels: what the api says, and what then happens."""

import uuid
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from sqlalchemy import select, text

from tests import factories
from tests.factories import Database, FleetNode, Tenant
from tests.fleet import Fleet, fleet
from tunery import labels, maintenance, nodes, queue, tasks
from tunery.db import transaction
from tunery.gpu_classes import class_of
from tunery.models import Attempt, AuditEntry, Node
from tunery.states import StopReason

MIB = 1 << 20


def name_of(node: FleetNode) -> str:
    with factories.owner(node.database) as session:
        return session.get_one(Node, node.id).name


def register(node: FleetNode, **changes: Any) -> None:
    """The node's process starts again."""
    device = nodes.Device("GPU-0", 0, "cuda", "Test GPU", node.usable_bytes, node.usable_bytes)
    given: dict[str, Any] = {"boot_id": uuid.uuid4(), "devices": [device], "slots": 1, "task_slots": 2, "info": {}}
    with node.transaction() as session:
        nodes.register(session, node.id, name=name_of(node), version="test", **(given | changes))


def schedulable(node: FleetNode) -> bool:
    with transaction(node.database.sessions("tunery_scheduler")) as session:
        found = {one.id: one for one in queue.snapshot(session, 45).nodes}
    return node.id in found and found[node.id].schedulable


def audited(database: Database, target: str) -> list[tuple[str, Any, Any]]:
    with factories.owner(database) as session:
        rows = session.scalars(select(AuditEntry).where(AuditEntry.target == target).order_by(AuditEntry.id)).all()
        return [(row.action, row.before, row.after) for row in rows]


# ---- cordon, drain, return ----------------------------------------------------------------------------------------


def test_a_cordoned_node_gets_no_work_until_it_is_returned(
    client: httpx.Client, node: FleetNode, project: Tenant, base_model: str
) -> None:
    factories.queued(project, node)  # the snapshot shows nodes where something waits
    path = f"/v1/nodes/{name_of(node)}"
    assert schedulable(node)
    for _ in range(2):  # repeating it changes nothing
        answer = client.post(f"{path}/cordon")
        assert answer.status_code == 200 and answer.json()["state"] == "cordoned"
    assert not schedulable(node)
    assert client.post(f"{path}/uncordon").json()["state"] == "up"
    assert client.post(f"{path}/uncordon").json()["state"] == "up"
    assert schedulable(node)
    up, cordoned = {"state": "up"}, {"state": "cordoned"}
    assert audited(node.database, name_of(node)) == [
        ("node.cordon", up, cordoned),
        ("node.uncordon", cordoned, up),
    ]


@pytest.mark.parametrize("verb", ["cordon", "drain"])
def test_a_restart_of_the_node_brings_it_back_into_the_same_state(
    client: httpx.Client, node: FleetNode, verb: str
) -> None:
    state = client.post(f"/v1/nodes/{name_of(node)}/{verb}").json()["state"]
    with node.transaction() as session:
        nodes.go_down(session, node.id)
    register(node)
    assert client.get(f"/v1/nodes/{name_of(node)}").json()["state"] == state


def test_a_node_that_is_down_stays_down_when_it_is_returned(client: httpx.Client, node: FleetNode) -> None:
    with node.transaction() as session:
        nodes.go_down(session, node.id)
    assert client.post(f"/v1/nodes/{name_of(node)}/uncordon").json()["state"] == "down"


def test_what_is_to_end_on_a_draining_node_and_what_is_not(
    client: httpx.Client, project: Tenant, other_project: Tenant, database: Database, base_model: str
) -> None:
    """Of every project; not what ends already, and nothing of a node that is only cordoned."""
    here, elsewhere = (factories.node(database, gpus=1, slots=1) for _ in range(2))
    moving = factories.running(other_project, here)
    staying = factories.running(project, elsewhere)
    client.post(f"/v1/nodes/{name_of(elsewhere)}/cordon")
    shown = client.post(f"/v1/nodes/{name_of(here)}/drain").json()
    assert (shown["state"], shown["attempts"]) == ("draining", 1)
    with transaction(database.sessions("tunery_scheduler")) as session:
        assert maintenance.to_end(session) == [moving.attempt_id]
    with transaction(database.sessions("tunery_scheduler")) as session:
        from tunery import leases

        assert leases.evict(session, moving.attempt_id, 120, "Its node is taken out of service")
        assert not leases.evict(session, moving.attempt_id, 120, "twice is once")
    asked = factories.attempt(moving)
    assert (asked.stop_reason, asked.preempted_at) == (StopReason.PREEMPT, None)
    with factories.owner(database) as session:
        grace = "SELECT extract(epoch FROM stop_by - now()) BETWEEN 60 AND 121 FROM attempts WHERE id = :id"
        assert session.scalar(text(grace), {"id": moving.attempt_id})
        assert maintenance.to_end(session) == []
    assert factories.attempt(staying).stop_reason is None
    factories.stop(moving, StopReason.PREEMPT)
    assert factories.look(moving).state == "queued"
    assert client.get(f"/v1/nodes/{name_of(here)}").json()["state"] == "drained"


def test_an_attempt_that_nobody_has_claimed_is_taken_back_uncharged(
    client: httpx.Client, project: Tenant, node: FleetNode, database: Database, base_model: str
) -> None:
    from tunery import leases

    work = factories.assigned(project, node)
    before = factories.look(work).queued_at
    client.post(f"/v1/nodes/{name_of(node)}/drain")
    with transaction(database.sessions("tunery_scheduler")) as session:
        assert leases.evict(session, work.attempt_id, 120, "Its node is taken out of service")
    job, ended = factories.look(work), factories.attempt(work)
    assert (job.state, job.queued_at, job.faults_without_progress) == ("queued", before, 0)
    assert (ended.state, ended.claimed_at) == ("lost", None)
    assert factories.free_bytes(node) == node.usable_bytes
    assert client.get(f"/v1/nodes/{name_of(node)}").json()["state"] == "drained"


def test_a_draining_node_takes_no_task_and_is_not_drained_while_it_runs_one(
    client: httpx.Client, project: Tenant, database: Database, base_model: str
) -> None:
    first, second = factories.node(database), factories.node(database)
    factories.submitted(project, first)
    with first.transaction() as session:
        lease = tasks.claim(session, first.id, 60)
    assert lease is not None
    shown = client.post(f"/v1/nodes/{name_of(first)}/drain").json()
    assert (shown["state"], shown["tasks"]) == ("draining", 1)
    factories.submitted(project, first)
    with first.transaction() as session:
        assert tasks.claim(session, first.id, 60) is None
        tasks.finish(tasks.hold(session, lease))
    assert client.get(f"/v1/nodes/{name_of(first)}").json()["state"] == "drained"
    with second.transaction() as session:
        assert tasks.claim(session, second.id, 60) is not None


@pytest.mark.parametrize("verb", ["cordon", "drain", "uncordon"])
def test_only_admins_take_nodes_out_of_service(
    tenants: Callable[..., Tenant], connect: Callable[..., httpx.Client], node: FleetNode, verb: str
) -> None:
    ordinary = connect(tenants("jobs:read", "jobs:write"))
    assert ordinary.post(f"/v1/nodes/{name_of(node)}/{verb}").status_code == 403
    assert ordinary.patch(f"/v1/nodes/{name_of(node)}", json={"labels": {"a": "b"}}).status_code == 403
    admin = connect(tenants("admin"))
    assert admin.post(f"/v1/nodes/nobody/{verb}").json()["error"]["code"] == "not_found"


def test_a_drained_job_goes_on_elsewhere_from_its_checkpoint_in_its_old_place() -> None:
    """The whole way: api, scheduler, two nodes, a trainer that is asked to save."""
    with fleet() as running:
        running.scheduler()
        running.serve_api()
        running.node("a")
        job_id = running.submit("slow-start", steps=3000)
        running.until(lambda: running.newest_checkpoint(job_id) >= 10)
        running.node("b")
        running.until(lambda: node_state(running, "b") == "up")
        with running.look() as session:
            queued_at = session.execute(text("SELECT queued_at FROM jobs WHERE id = :id"), {"id": job_id}).scalar_one()
        with running.client() as client:
            client.post(f"/v1/nodes/a-{running.database}/drain").raise_for_status()
            running.until(lambda: node_state(running, "a") == "drained")
        running.until(lambda: len(running.attempts(job_id)) == 2)
        first, second = running.attempts(job_id)
        assert (first.state, first.stop_reason, first.preempted_at) == ("preempted", "preempt", None)
        assert second.node_id != first.node_id
        assert second.start_step == running.steps_trained(job_id)[0][1][-1], "it saved when it was asked"
        assert running.ends(job_id) == "succeeded"
        with running.look() as session:
            after = session.execute(
                text("SELECT queued_at, faults_without_progress FROM jobs WHERE id = :id"), {"id": job_id}
            ).one()
        assert tuple(after) == (queued_at, 0)
        assert any("taken out of service" in message for message in running.messages(job_id))


def node_state(running: Fleet, name: str) -> str:
    with running.client() as client:
        answer = client.get(f"/v1/nodes/{name}-{running.database}")
    return answer.json().get("state", "")


# ---- labels -------------------------------------------------------------------------------------------------------


def test_the_operators_labels_win_over_the_nodes_own_through_restarts(client: httpx.Client, node: FleetNode) -> None:
    path = f"/v1/nodes/{name_of(node)}"
    register(node, labels={"rack": "a", "disk": "nvme"})
    assert client.get(path).json()["labels"] == {"rack": "a", "disk": "nvme"}
    changed = client.patch(path, json={"labels": {"rack": "b", "zone": "north", "disk": None}})
    assert changed.status_code == 200 and changed.json()["labels"] == {"rack": "b", "zone": "north"}
    register(node, labels={"rack": "c", "disk": "nvme", "new": "1"})
    assert client.get(path).json()["labels"] == {"rack": "b", "zone": "north", "new": "1"}
    assert client.patch(path, json={"labels": {"zone": None}}).json()["labels"] == {"rack": "b", "new": "1"}
    register(node, labels={"rack": "c"})
    assert client.get(path).json()["labels"] == {"rack": "b"}
    assert [action for action, _, _ in audited(node.database, name_of(node))] == ["node.label", "node.label"]


@pytest.mark.parametrize("wrong", [{"bad name": "b"}, {"a": "b c"}, {"a": "x" * 64}, {"": "b"}])
def test_labels_that_are_none_are_refused(client: httpx.Client, node: FleetNode, wrong: dict[str, str]) -> None:
    answer = client.patch(f"/v1/nodes/{name_of(node)}", json={"labels": wrong})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "labels"


def test_labels_as_a_node_is_told_them() -> None:
    assert labels.parse(" rack=b, interconnect=nvlink ,") == {"rack": "b", "interconnect": "nvlink"}
    assert labels.parse("") == {}
    for wrong in ("rack", "rack=b c", "=b", "a=1," + ",".join(f"k{n}=v" for n in range(64))):
        with pytest.raises(ValueError, match="label"):
            labels.parse(wrong)


def test_a_node_is_labelled_by_its_environment(servers: object) -> None:
    with fleet() as running:
        running.node(NODE_LABELS="rack=b,interconnect=nvlink")

        def told() -> dict[str, str] | None:
            with running.look() as session:
                return session.scalar(select(Node.labels))

        assert running.until(told) == {"rack": "b", "interconnect": "nvlink"}


# ---- GPU classes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "mib", "expected"),
    [  # as NVML tells them
        ("NVIDIA H100 80GB HBM3", 81559, "h100-80gb"),
        ("NVIDIA H100 PCIe", 81559, "h100-80gb"),
        ("NVIDIA H100 NVL", 95830, "h100-94gb"),
        ("NVIDIA H200", 143771, "h200-141gb"),
        ("NVIDIA GH200 480GB", 97871, "gh200-96gb"),
        ("NVIDIA B200", 183359, "b200-180gb"),
        ("NVIDIA A100-SXM4-40GB", 40960, "a100-40gb"),
        ("NVIDIA A100-PCIE-40GB", 40536, "a100-40gb"),
        ("NVIDIA A100 80GB PCIe", 81920, "a100-80gb"),
        ("NVIDIA GeForce RTX 4090", 24564, "rtx4090-24gb"),
        ("NVIDIA GeForce RTX 3080", 10240, "rtx3080-10gb"),
        ("NVIDIA GeForce GTX 1080 Ti", 11264, "gtx1080ti-11gb"),
        ("NVIDIA RTX 6000 Ada Generation", 49140, "rtx6000ada-48gb"),
        ("NVIDIA L4", 23034, "l4-24gb"),
        ("NVIDIA L40S", 46068, "l40s-48gb"),
        ("Tesla T4", 15360, "t4-16gb"),
        ("Tesla V100-SXM2-16GB", 16160, "v100-16gb"),
        ("Tesla V100-SXM2-32GB", 32510, "v100-32gb"),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", 9984, "h100-mig-10gb"),
        ("", 1000, "gpu-1gb"),
    ],
)
def test_a_device_has_the_class_of_its_name_and_memory(name: str, mib: int, expected: str) -> None:
    assert class_of("cuda", name, mib * MIB) == expected


def test_a_host_without_a_gpu_has_the_class_cpu() -> None:
    assert class_of("cpu", "AMD EPYC 9654 x 96", 768 << 30) == "cpu"


def test_classes_appear_with_the_nodes_that_bring_them_and_keep_their_price(
    client: httpx.Client, node: FleetNode
) -> None:
    device = nodes.Device("GPU-0", 0, "cuda", "NVIDIA GeForce RTX 4090", 24564 * MIB, 23000 * MIB)
    register(node, devices=[device])
    path = "/v1/gpu_classes/rtx4090-24gb"
    found = client.get(path).json()
    assert (found["cost"], found["price_per_hour"], found["devices"]) == (1.0, None, 1)
    answer = client.put(path, json={"cost": 0.5, "price_per_hour": "2.10"})
    assert answer.status_code == 200, answer.text
    register(node, devices=[device])
    found = client.get(path).json()
    assert (found["cost"], found["price_per_hour"]) == (0.5, 2.1)
    assert "rtx4090-24gb" in [one["id"] for one in client.get("/v1/gpu_classes").json()["data"]]
    assert audited(node.database, "rtx4090-24gb") == [
        (
            "gpu_class.set",
            {"cost": 1.0, "price_per_hour": None},
            {"cost": 0.5, "price_per_hour": "2.1"},
        )
    ]


@pytest.mark.parametrize("body", [{"cost": 0}, {"cost": -1}, {"price_per_hour": -1}, {"price_per_hour": 1e9}, {"x": 1}])
def test_costs_and_prices_that_make_no_sense_are_refused(client: httpx.Client, body: dict[str, Any]) -> None:
    assert client.put("/v1/gpu_classes/h100-80gb", json=body).status_code == 400


def test_prices_are_for_everybody_to_read_and_for_admins_to_set(
    tenants: Callable[..., Tenant], connect: Callable[..., httpx.Client]
) -> None:
    ordinary = connect(tenants("jobs:read"))
    assert connect(tenants("admin")).put("/v1/gpu_classes/a100-40gb", json={"price_per_hour": 1.5}).status_code == 200
    assert ordinary.get("/v1/gpu_classes/a100-40gb").json()["price_per_hour"] == 1.5
    assert ordinary.put("/v1/gpu_classes/a100-40gb", json={"cost": 2}).status_code == 403
    assert ordinary.get("/v1/gpu_classes/none").status_code == 404
    assert connect(tenants("admin")).put("/v1/gpu_classes/No Name", json={}).status_code == 400


def test_attempts_are_counted_where_they_are(
    client: httpx.Client, project: Tenant, other_project: Tenant, node: FleetNode, base_model: str
) -> None:
    assert client.get(f"/v1/nodes/{name_of(node)}").json()["attempts"] == 0
    work = factories.running(other_project, node)
    assert client.get(f"/v1/nodes/{name_of(node)}").json()["attempts"] == 1
    factories.publish(work)
    assert client.get(f"/v1/nodes/{name_of(node)}").json()["attempts"] == 0
    with factories.owner(node.database) as session:
        assert session.scalar(select(Attempt.id).where(Attempt.node_id == node.id)) is not None
