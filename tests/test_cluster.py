"""GPUs, the queue in numbers, shares and the audit log: what each key is told, and what admins may set."""

import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import psycopg
import pytest
from sqlalchemy import text
from sqlalchemy.exc import ProgrammingError

from scheduler.policy import schedule
from tests import factories
from tests.factories import Database, FleetNode, Tenant, Work
from tunery import audit, ids, leases, queue
from tunery.audit import Actor
from tunery.db import transaction
from tunery.models import Project
from tunery.states import FailureCode

Connect = Callable[..., httpx.Client]
Tenants = Callable[..., Tenant]


@pytest.fixture
def alone(database: Database) -> Iterator[None]:
    """Nothing of other tests waits, runs or has GPUs: numbers of the whole deployment are this test's own."""
    with factories.owner(database) as session, session.begin():
        session.execute(text("UPDATE nodes SET removed_at = now() WHERE removed_at IS NULL"))
        session.execute(text("UPDATE allocations SET released_at = now() WHERE released_at IS NULL"))
        session.execute(text("UPDATE jobs SET state = 'cancelled', finished_at = now() WHERE finished_at IS NULL"))
        session.execute(
            text(
                "UPDATE attempts SET state = 'cancelled', ended_at = now(), lease_expires_at = NULL "
                "WHERE ended_at IS NULL"
            )
        )
        session.execute(text("UPDATE attempts SET ended_at = now() - interval '2 days'"))
        session.execute(text("UPDATE projects SET guarantee = 0, cap = NULL"))
        session.execute(text("UPDATE organizations SET guarantee = 0, cap = NULL"))
    yield


def one_pass(database: Database) -> int:
    """A pass of the real scheduler's policy over real rows."""
    sessions = database.sessions("tunery_scheduler")
    with transaction(sessions) as session:
        epoch = queue.lead(session, "the tests", 60)
    assert epoch is not None
    with transaction(sessions) as session:
        seen = queue.snapshot(session, 45)
    return len(queue.apply(sessions, epoch, schedule(seen)))


def numbers(client: httpx.Client, pool: str | None = None) -> dict[str, int]:
    told = client.get("/v1/queue").json()
    told = told["pools"][pool] if pool else told
    return {key: told[key] for key in ("queued", "running", "completed", "available_gpus", "total_gpus")}


# ---- the queue in numbers -----------------------------------------------------------------------------------------


def test_six_jobs_on_four_gpus_and_what_each_end_gives_back(
    alone: None, client: httpx.Client, project: Tenant, database: Database, base_model: str
) -> None:
    node = factories.node(database, gpus=4, slots=4)
    works = [factories.queued(project, node) for _ in range(6)]
    assert numbers(client) == {"queued": 6, "running": 0, "completed": 0, "available_gpus": 4, "total_gpus": 4}
    assert one_pass(database) == 4
    full = {"queued": 2, "running": 4, "completed": 0, "available_gpus": 0, "total_gpus": 4}
    assert numbers(client) == full and client.get("/v1/queue").json()["object"] == "queue"
    assert numbers(client, "test-8gb") == full
    running = [taken for work in works if (taken := live(database, work)) is not None]

    factories.publish(factories.tell(factories.claim(running[0]), factories.started()))
    assert numbers(client) == {"queued": 2, "running": 3, "completed": 1, "available_gpus": 1, "total_gpus": 4}
    assert one_pass(database) == 1
    assert numbers(client) == {"queued": 1, "running": 4, "completed": 1, "available_gpus": 0, "total_gpus": 4}

    # the ones that end badly free their GPU like the others
    factories.fault(factories.claim(running[1]), FailureCode.NON_FINITE_LOSS)
    assert numbers(client) == {"queued": 1, "running": 3, "completed": 1, "available_gpus": 1, "total_gpus": 4}
    assert one_pass(database) == 1
    factories.cancel(running[2])
    assert numbers(client) == {"queued": 0, "running": 3, "completed": 1, "available_gpus": 1, "total_gpus": 4}
    assert numbers(client, "test-8gb") == numbers(client)


def live(database: Database, work: Work) -> Work | None:
    """The job with its live attempt, if it has one."""
    with factories.owner(database) as session:
        query = "SELECT id, fence FROM attempts WHERE job_id = :job AND ended_at IS NULL"
        row = session.execute(text(query), {"job": work.job_id}).one_or_none()
    return Work(work.tenant, work.node, work.job_id, row.id, row.fence) if row else None


def test_others_are_counted_and_ones_own_told_apart(
    alone: None, connect: Connect, project: Tenant, other_project: Tenant, database: Database, base_model: str
) -> None:
    node = factories.node(database)
    theirs = factories.running(other_project, node)
    factories.queued(project, node)
    told = connect(project).get("/v1/queue").json()
    assert (told["queued"], told["running"]) == (1, 1)
    assert told["project"] == {"queued": 1, "running": 0, "completed": 0}
    [gpu] = [one for one in connect(project).get("/v1/gpus").json()["data"] if one["busy"]]
    assert (gpu["attempts"], gpu["jobs"], gpu["state"]) == (1, [], "busy")
    [gpu] = [one for one in connect(other_project).get("/v1/gpus").json()["data"] if one["busy"]]
    assert gpu["jobs"] == [theirs.id]


def test_a_job_for_one_class_waits_there_and_one_for_any_waits_in_each(
    alone: None, client: httpx.Client, project: Tenant, database: Database, base_model: str
) -> None:
    node = factories.node(database, gpus=0)
    anywhere, picky = factories.queued(project, node), factories.queued(project, node)
    with factories.owner(database) as session, session.begin():
        session.execute(text("UPDATE jobs SET gpu_class = 'h100-80gb' WHERE id = :id"), {"id": picky.job_id})
    factories.node(database)
    assert numbers(client)["queued"] == 2
    assert (numbers(client, "test-8gb")["queued"], numbers(client, "h100-80gb")["queued"]) == (1, 2)
    assert numbers(client, "h100-80gb")["total_gpus"] == 0
    assert anywhere.job_id != picky.job_id


def test_gpus_that_cannot_take_work_are_not_available(alone: None, client: httpx.Client, database: Database) -> None:
    node = factories.node(database, gpus=3)
    with factories.owner(database) as session, session.begin():
        mark = text("UPDATE gpus SET state = :state WHERE id = :id")
        session.execute(mark, {"state": "unhealthy", "id": node.gpu_ids[0]})
        session.execute(mark, {"state": "absent", "id": node.gpu_ids[1]})
    assert numbers(client)["available_gpus"] == 1 and numbers(client)["total_gpus"] == 2
    states = {one["state"] for one in client.get("/v1/gpus").json()["data"]}
    assert states == {"unhealthy", "free"}
    name = client.get("/v1/gpus").json()["data"][0]["node"]
    client.post(f"/v1/nodes/{name}/cordon")
    assert numbers(client)["available_gpus"] == 0 and numbers(client)["total_gpus"] == 2
    assert {one["state"] for one in client.get("/v1/gpus").json()["data"]} == {"unhealthy", "unavailable"}


def test_gpus_come_in_pages(alone: None, client: httpx.Client, database: Database) -> None:
    factories.node(database, gpus=5)
    seen, after = [], None
    while True:
        page = client.get("/v1/gpus", params={"limit": 2} | ({"after": after} if after else {})).json()
        seen += [one["index"] for one in page["data"]]
        after = page["last_id"]
        if not page["has_more"]:
            break
    assert sorted(seen) == [0, 1, 2, 3, 4]


# ---- shares -------------------------------------------------------------------------------------------------------


def path(tenant: Tenant) -> str:
    return f"/v1/projects/{ids.encode(ids.PROJECT, tenant.project_id)}"


def test_an_admin_of_one_project_sets_what_another_may_have(
    alone: None, connect: Connect, tenants: Tenants, database: Database
) -> None:
    admin, other = tenants("admin"), tenants("jobs:read")
    factories.node(database, gpus=4)
    body = {"weight": 2, "guarantee": 3, "cap": 16, "max_running_jobs": 8}
    answer = connect(admin).patch(path(other), json=body)
    assert answer.status_code == 200, answer.text
    told = connect(other).get(path(other)).json()
    assert {key: told[key] for key in body} == body
    assert told["cluster"] == {"total": 4.0, "guaranteed": 3.0}
    assert connect(admin).patch(path(other), json={"cap": None}).json()["cap"] is None
    assert connect(other).get(path(other)).json()["weight"] == 2, "what is left out stays"
    with factories.owner(database) as session:
        row = session.get_one(Project, other.project_id)
        assert (row.weight, row.guarantee, row.cap, row.max_running_jobs) == (2, 3, None, 8)
        assert session.get_one(Project, admin.project_id).weight == 1, "and nobody else's"


def test_an_ordinary_key_reads_its_own_share_and_nobody_elses(connect: Connect, tenants: Tenants) -> None:
    mine, other = tenants("jobs:read"), tenants("jobs:read")
    client = connect(mine)
    assert client.get(path(mine)).status_code == 200
    hidden, absent = client.get(path(other)), client.get(f"/v1/projects/{ids.encode(ids.PROJECT, ids.uuid7())}")
    assert hidden.status_code == absent.status_code == 404
    assert client.patch(path(mine), json={"weight": 9}).status_code == 403
    assert client.get("/v1/projects").status_code == 403
    assert client.get("/v1/organization").json()["name"] == mine.identity.organization
    assert client.patch("/v1/organization", json={"weight": 9}).status_code == 403
    assert client.get(f"/v1/organizations/{mine.identity.organization}").status_code == 403


def test_projects_are_found_by_name_and_told_apart_by_organization(connect: Connect, tenants: Tenants) -> None:
    admin, other = tenants("admin"), tenants("admin")  # factories call every project "research"
    several = connect(admin).get("/v1/projects/research")
    assert several.status_code == 409 and other.identity.organization in several.json()["error"]["message"]
    one = connect(admin).get(f"/v1/projects/{other.identity.organization}%3Aresearch")
    assert one.json()["id"] == ids.encode(ids.PROJECT, other.project_id)


def test_more_guarantees_than_gpus_are_refused_with_the_numbers(
    alone: None, connect: Connect, tenants: Tenants, database: Database
) -> None:
    admin, other = tenants("admin"), tenants()
    client = connect(admin)
    assert client.patch(path(admin), json={"guarantee": 100}).status_code == 200, "no node has come yet"
    assert client.patch(path(admin), json={"guarantee": 3}).status_code == 200
    factories.node(database, gpus=4)
    refused = client.patch(path(other), json={"guarantee": 2})
    error = refused.json()["error"]
    assert (refused.status_code, error["param"]) == (400, "guarantee")
    assert all(number in error["message"] for number in ("has 4", "3 of it", "2 more", "1 too much"))
    assert "at most 1 more" in error["fix"]
    client.put("/v1/gpu_classes/test-8gb", json={"cost": 2}).raise_for_status()
    assert client.patch(path(other), json={"guarantee": 2}).status_code == 200, "a rate counts what a class costs"
    client.put("/v1/gpu_classes/test-8gb", json={"cost": 1}).raise_for_status()
    assert client.patch(path(other), json={"guarantee": 1.5}).status_code == 200, "lowering is always possible"
    assert client.patch(path(other), json={"weight": 3}).status_code == 200


def test_two_guarantees_that_fit_alone_must_fit_together(
    alone: None, connect: Connect, tenants: Tenants, database: Database
) -> None:
    factories.node(database, gpus=4)
    admin, projects = tenants("admin"), [tenants() for _ in range(6)]
    client = connect(admin)
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda one: client.patch(path(one), json={"guarantee": 2}).status_code, projects))
    assert sorted(answers) == [200, 200, 400, 400, 400, 400]


@pytest.mark.parametrize(
    "body",
    [
        {"weight": 0},
        {"weight": -1},
        {"guarantee": -1},
        {"cap": -1},
        {"max_running_jobs": -1},
        {"guarantee": 5, "cap": 4},
        {"service": 0},
    ],
)
def test_shares_that_make_no_sense_are_refused(client: httpx.Client, project: Tenant, body: dict[str, Any]) -> None:
    assert client.patch(path(project), json=body).status_code == 400


def test_an_organization_has_a_share_of_its_own(
    alone: None, connect: Connect, tenants: Tenants, database: Database
) -> None:
    admin, other = tenants("admin"), tenants()
    client = connect(admin)
    assert client.patch("/v1/organization", json={"weight": 3, "cap": 8}).json()["cap"] == 8
    theirs = f"/v1/organizations/{other.identity.organization}"
    assert client.get(theirs).json()["weight"] == 1
    assert client.patch(theirs, json={"weight": 5, "guarantee": 2}).json()["guarantee"] == 2
    assert client.get("/v1/organization").json()["weight"] == 3
    assert client.patch("/v1/organizations/nobody", json={"weight": 5}).status_code == 404


# ---- the audit log ------------------------------------------------------------------------------------------------


def test_every_change_is_written_down_with_who_what_and_the_request(
    alone: None, connect: Connect, tenants: Tenants, node: FleetNode
) -> None:
    admin, other = tenants("admin"), tenants()
    client = connect(admin)
    name = next(one["node"] for one in client.get("/v1/gpus").json()["data"])
    target = f"{other.identity.organization}:research"
    client.post("/v1/nodes/tokens", json={}).raise_for_status()
    client.patch(f"/v1/nodes/{name}", json={"labels": {"rack": "b"}}).raise_for_status()
    client.post(f"/v1/nodes/{name}/drain").raise_for_status()
    client.patch(path(other), json={"weight": 2}, headers={"x-request-id": "request-0001"}).raise_for_status()
    client.patch(path(other), json={"weight": 2}).raise_for_status()
    client.patch("/v1/organization", json={"cap": 4}).raise_for_status()
    client.put("/v1/gpu_classes/test-8gb", json={"price_per_hour": 2.5}).raise_for_status()
    told = client.get("/v1/audit", params={"limit": 6}).json()["data"]
    assert [entry["action"] for entry in told] == [
        "gpu_class.set", "organization.share", "project.share", "node.drain", "node.label", "node.token",
    ]  # fmt: skip
    [change] = client.get("/v1/audit", params={"target": target}).json()["data"]
    assert (change["before"], change["after"], change["request_id"]) == (
        {"weight": 1.0},
        {"weight": 2.0},
        "request-0001",
    )
    assert change["key"]["id"] == ids.encode(ids.KEY, admin.identity.key_id)
    assert change["project_id"] == ids.encode(ids.PROJECT, admin.project_id)
    assert "tunery_join_" not in str(told), "a token's text is no part of the record"


def test_a_removed_node_is_written_down(connect: Connect, tenants: Tenants, node: FleetNode) -> None:
    client = connect(tenants("admin"))
    name = client.get(f"/v1/nodes/{ids.encode(ids.NODE, node.id)}").json()["name"]
    assert client.delete(f"/v1/nodes/{name}").status_code == 409, "it is up"
    assert client.get("/v1/audit", params={"target": name}).json()["data"] == [], "what did not happen is no entry"
    with factories.owner(node.database) as session, session.begin():
        session.execute(text("UPDATE nodes SET state = 'down' WHERE id = :id"), {"id": node.id})
    assert client.delete(f"/v1/nodes/{name}").status_code == 200
    [entry] = client.get("/v1/audit", params={"target": name}).json()["data"]
    assert entry["action"] == "node.remove"


def test_an_entry_stands_and_falls_with_its_change(project: Tenant, node: FleetNode) -> None:
    target = f"never {uuid.uuid4().hex}"
    with pytest.raises(RuntimeError), project.transaction() as session:
        audit.record(session, Actor(project.identity), "node.drain", target)
        session.flush()
        raise RuntimeError
    with project.transaction() as session:
        assert audit.page(session, after=None, limit=10, target=target) == ([], False)


@pytest.mark.parametrize("role", ["tunery_api", "tunery_scheduler", "tunery_worker"])
@pytest.mark.parametrize("sql", ["UPDATE audit_log SET target = 'x'", "DELETE FROM audit_log"])
def test_no_program_may_change_what_was_written_down(database: Database, role: str, sql: str) -> None:
    with pytest.raises(ProgrammingError) as refused, database.sessions(role)() as session:
        session.execute(text(sql))
    assert isinstance(refused.value.orig, psycopg.errors.InsufficientPrivilege)


def test_the_audit_log_is_for_admins_and_comes_in_pages(connect: Connect, tenants: Tenants) -> None:
    assert connect(tenants("jobs:read", "jobs:write")).get("/v1/audit").status_code == 403
    client = connect(tenants("admin"))
    for weight in (2, 3, 4):
        client.patch("/v1/organization", json={"weight": weight}).raise_for_status()
    first = client.get("/v1/audit", params={"limit": 2}).json()
    second = client.get("/v1/audit", params={"limit": 2, "after": first["last_id"]}).json()
    assert first["has_more"]
    weights = [entry["after"]["weight"] for entry in (*first["data"], second["data"][0])]
    assert weights == [4, 3, 2]


def test_a_drained_node_that_was_evicted_is_not_counted_as_a_preemption(
    client: httpx.Client, project: Tenant, node: FleetNode, database: Database, base_model: str
) -> None:
    work = factories.running(project, node)
    with transaction(database.sessions("tunery_scheduler")) as session:
        leases.evict(session, work.attempt_id, 120, "Its node is taken out of service")
    assert factories.attempt(work).preempted_at is None
