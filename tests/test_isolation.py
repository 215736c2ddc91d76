"""One project never sees another: over every route, under the ORM, through a shared pool."""

import random
import re
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute, iter_route_contexts
from sqlalchemy import select, text
from sqlalchemy.exc import ProgrammingError

from api.deps import PUBLIC, Scope, authenticate
from tests import factories
from tests.factories import Database, FleetNode, Tenant
from tunery import db, ids, tenancy
from tunery.db import make_engine, make_sessions, transaction
from tunery.models import Adapter, Event, File, Job

BODIES = {("POST", "/v1/fine_tuning/jobs/{fine_tuning_job_id}/priority"): {"priority": 1}}
"""What has to be said for a request to reach its object at all."""
METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")


# ---- default-deny -------------------------------------------------------------------------------------------------


def unguarded(app: FastAPI) -> list[str]:
    """Routes that need no key, or that ask for no scope."""
    found = []
    for context in iter_route_contexts(app.routes):
        path = context.path or ""
        if path in PUBLIC:
            continue
        if not isinstance(context.original_route, APIRoute):
            found.append(path)
            continue
        calls = [each.call for each in context.dependant.dependencies]
        if authenticate not in calls or sum(isinstance(call, Scope) for call in calls) != 1:
            found.append(path)
    return found


def test_every_route_asks_for_a_key_and_one_scope(app: FastAPI) -> None:
    assert unguarded(app) == []


def test_that_walk_finds_a_route_without_a_scope_or_a_key() -> None:
    bare = FastAPI(openapi_url=None)

    @bare.get("/v1/forgotten")
    def forgotten() -> None: ...

    bare.add_route("/v1/plain", lambda _request: None)  # type: ignore[arg-type]
    assert unguarded(bare) == ["/v1/forgotten", "/v1/plain"]


def operations(app: FastAPI) -> Iterator[tuple[str, str]]:
    for path, entry in app.openapi()["paths"].items():
        for method in entry:
            if path not in PUBLIC:
                yield method.upper(), path


def fill(path: str, **known: str) -> str:
    """A path with every placeholder filled; those not named get something harmless."""
    harmless = {"version": "1", "filename": "adapter_model.safetensors"}
    return re.sub(r"{(\w+)(?::path)?}", lambda found: known.get(found[1]) or harmless.get(found[1]) or "x", path)


def test_no_key_opens_nothing(app: FastAPI, connect: Callable[[Tenant | None], httpx.Client]) -> None:
    nobody = connect(None)
    for method, path in operations(app):
        answer = nobody.request(method, fill(path))
        assert answer.status_code in (400, 401), (method, path)  # 400: a body that is no JSON is read first
        assert answer.json()["error"]["code"] in ("invalid_api_key", "invalid_request")
        if not path.endswith("jobs"):
            assert answer.status_code == 401, (method, path)


@pytest.mark.parametrize("header", ["", "Bearer", "Basic abc", "bearer\tx", "Bearer ftk_live_x"])
def test_headers_that_are_no_key(connect: Callable[[Tenant | None], httpx.Client], header: str) -> None:
    answer = connect(None).get("/v1/whoami", headers={"authorization": header})
    assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"


NEEDS = {
    ("POST", "/v1/files"): "files:write",
    ("DELETE", "/v1/files/{file_id}"): "files:write",
    ("POST", "/v1/fine_tuning/jobs"): "jobs:write",
    ("POST", "/v1/fine_tuning/jobs/{fine_tuning_job_id}/cancel"): "jobs:write",
    ("DELETE", "/v1/fine_tuning/jobs/{fine_tuning_job_id}"): "jobs:write",
    ("DELETE", "/v1/models/{model}"): "jobs:write",
    ("GET", "/v1/usage/storage"): "files:read",
    ("GET", "/v1/usage"): "jobs:read",
    ("GET", "/v1/budget"): "jobs:read",
    ("PUT", "/v1/projects/{project}/budget"): "admin",
    ("DELETE", "/v1/projects/{project}/budget"): "admin",
    ("POST", "/v1/base_models"): "admin",
    ("GET", "/v1/files"): "files:read",
    ("GET", "/v1/fine_tuning/jobs"): "jobs:read",
    ("POST", "/v1/fine_tuning/estimate"): "jobs:read",
    ("POST", "/v1/fine_tuning/jobs/{fine_tuning_job_id}/priority"): "jobs:write",
    ("GET", "/v1/models"): "models:read",
    ("GET", "/v1/base_models"): "models:read",
    ("GET", "/v1/adapters"): "adapters:read",
}


@pytest.mark.parametrize(("operation", "scope"), NEEDS.items(), ids=lambda value: str(value))
def test_a_key_does_what_its_scopes_say_and_no_more(
    tenants: Callable[..., Tenant],
    connect: Callable[[Tenant | None], httpx.Client],
    operation: tuple[str, str],
    scope: str,
) -> None:
    method, path = operation
    every_other = [other for other in tenancy.SCOPES if other not in (scope, "admin")]
    body = {"model": "x", "training_file": "x"} if path.endswith("jobs") else {"source": "demo"}
    sent = {"json": body} if method == "POST" and path != "/v1/files" else {}
    refused = connect(tenants(*every_other)).request(method, fill(path), **sent)  # type: ignore[arg-type]
    assert refused.status_code == 403 and scope in refused.json()["error"]["message"]
    assert connect(tenants(scope)).request(method, fill(path), **sent).status_code != 403  # type: ignore[arg-type]


# ---- another project's ids ----------------------------------------------------------------------------------------


@pytest.fixture
def theirs(other_project: Tenant, node: FleetNode, base_model: str) -> dict[str, list[str]]:
    """Everything of the other project that has an id or a name, by the placeholder it goes into."""
    work = factories.running(other_project, node, suffix="secret")
    factories.checkpoint(work, 10)
    factories.publish(work)
    job = factories.look(work)
    with other_project.transaction() as session:
        adapter = session.scalars(select(Adapter)).one()
    return {
        "file_id": [ids.encode(ids.FILE, job.training_file_id)],
        "fine_tuning_job_id": [work.id],
        "model": [job.model_name],
        "name": [job.model_name],
        "name_or_id": ["secret", ids.encode(ids.ADAPTER, adapter.id), job.model_name],
    }


def random_like(name: str, given: str) -> str:
    """What exists nowhere, of the same form as `given`."""
    for prefix in (ids.FILE, ids.JOB, ids.ADAPTER):
        if given.startswith(prefix):
            return ids.encode(prefix, ids.uuid7())
    return given[:-6] + "zzzzzz" if given.startswith("ft:") else "nobody"


def body_of(answer: httpx.Response, named: str) -> str:
    """An error without what differs by nature: the request's id and the name that was asked for."""
    told = answer.json()["error"]
    told.pop("request_id")
    return str(told).replace(named, "<id>").replace(named[:80], "<id>")


def test_another_projects_id_is_answered_like_one_that_does_not_exist(
    app: FastAPI, client: httpx.Client, theirs: dict[str, list[str]]
) -> None:
    tried = 0
    documented = {(method, path) for method, path in operations(app)}
    for path in {path for _, path in documented}:
        placeholders = [name for name in re.findall(r"{(\w+)", path) if name in theirs]
        for method in METHODS if placeholders else ():
            for given in theirs[placeholders[0]]:
                name = placeholders[0]
                absent = random_like(name, given)
                body = BODIES.get((method, path))
                one, other = (client.request(method, fill(path, **{name: each}), json=body) for each in (given, absent))
                expected = 404 if (method, path) in documented else (404, 405)
                assert one.status_code == other.status_code, (method, path)
                assert one.status_code in (expected if isinstance(expected, tuple) else (expected,)), (method, path)
                if one.status_code == 404:
                    assert body_of(one, given) == body_of(other, absent), (method, path)
                tried += 1
    assert tried > 60


def test_their_ids_as_inputs_and_cursors(
    client: httpx.Client, project: Tenant, theirs: dict[str, list[str]], base_model: str
) -> None:
    [file_id], [model] = theirs["file_id"], theirs["model"]
    own = factories.file(project)
    for body in (
        {"model": base_model, "training_file": file_id},
        {"model": base_model, "training_file": own, "validation_file": file_id},
        {"model": model, "training_file": own},
    ):
        assert client.post("/v1/fine_tuning/jobs", json=body).status_code == 404
    for path, after in (("/v1/files", file_id), ("/v1/fine_tuning/jobs", theirs["fine_tuning_job_id"][0])):
        assert client.get(path, params={"after": after, "limit": 1}).status_code == 200


def test_lists_hold_only_ones_own(client: httpx.Client, project: Tenant, theirs: dict[str, list[str]]) -> None:
    own = factories.file(project)
    assert [file["id"] for file in client.get("/v1/files").json()["data"]] == [own]
    for path in ("/v1/fine_tuning/jobs", "/v1/adapters"):
        assert client.get(path).json()["data"] == []
    assert theirs["model"][0] not in client.get("/v1/models").text


def test_nothing_of_theirs_changes(
    client: httpx.Client, other_project: Tenant, node: FleetNode, base_model: str
) -> None:
    work = factories.queued(other_project, node)
    file_id = ids.encode(ids.FILE, factories.look(work).training_file_id)
    assert client.post(f"/v1/fine_tuning/jobs/{work.id}/cancel").status_code == 404
    assert client.delete(f"/v1/files/{file_id}").status_code == 404
    assert factories.look(work).state == "queued"
    with other_project.transaction() as session:
        assert session.scalar(select(File.deleted_at)) is None


# ---- under the services -------------------------------------------------------------------------------------------


def test_a_query_without_its_where_still_sees_one_project(
    project: Tenant, other_project: Tenant, node: FleetNode, base_model: str
) -> None:
    """What a forgotten `WHERE project_id = ...` would do: row-level security hides the rest."""
    factories.succeeded(project, node)
    factories.succeeded(other_project, node)
    with project.transaction() as session:
        for table in (Job, File, Event, Adapter):
            seen = set(session.scalars(select(table.project_id)))
            assert seen == {project.project_id}, table.__tablename__


def test_without_row_level_security_that_query_would_see_both(
    database: Database, project: Tenant, other_project: Tenant, node: FleetNode, base_model: str
) -> None:
    """The test above can fail: it is the policies that make it pass."""
    factories.queued(project, node)
    factories.queued(other_project, node)
    with factories.owner(database) as session, session.begin():
        session.execute(text("ALTER TABLE jobs DISABLE ROW LEVEL SECURITY"))
    try:
        with project.transaction() as session:
            assert {project.project_id, other_project.project_id} <= set(session.scalars(select(Job.project_id)))
    finally:
        with factories.owner(database) as session, session.begin():
            session.execute(text("ALTER TABLE jobs ENABLE ROW LEVEL SECURITY"))


def test_a_transaction_without_a_project_sees_nothing(
    database: Database, project: Tenant, node: FleetNode, base_model: str
) -> None:
    factories.queued(project, node)
    with transaction(database.sessions("tunery_api")) as session:
        assert session.scalars(select(Job.id)).all() == []


def test_rows_cannot_be_written_into_another_project(project: Tenant, other_project: Tenant) -> None:
    row = File(project_id=other_project.project_id, filename="x", purpose="batch", bytes=0, sha256="", object_key="x")
    with pytest.raises(ProgrammingError, match="row-level security"), project.transaction() as session:
        session.add(row)


def test_interleaved_projects_on_two_connections(database: Database, tenants: Callable[..., Tenant]) -> None:
    """Commits, rollbacks and errors in random order: what a pooled connection carried over would show here."""
    owners = [tenants() for _ in range(4)]
    for owner in owners:
        factories.file(owner)
    engine = make_engine(database.url("tunery_api"), pool_size=2)
    sessions = make_sessions(engine)
    engine.pool._max_overflow = 0  # type: ignore[attr-defined] - two connections, whatever is asked

    def visit(number: int) -> set[uuid.UUID]:
        owner = owners[number % len(owners)]
        with db.for_project(sessions, owner.project_id) as session:
            seen = set(session.scalars(select(File.project_id)))
            match random.Random(number).randrange(3):
                case 0:
                    session.commit()
                case 1:
                    session.rollback()
                case _:
                    with pytest.raises(ProgrammingError):
                        session.execute(text("SELECT nonsense"))
        return seen ^ {owner.project_id}

    with ThreadPoolExecutor(8) as pool:
        crossed = set().union(*pool.map(visit, range(400)))
    engine.dispose()
    assert crossed == set()


def test_interleaved_requests(connect: Callable[[Tenant | None], httpx.Client], tenants: Callable[..., Tenant]) -> None:
    owners = {tenant.key: (factories.file(tenant), connect(tenant)) for tenant in (tenants() for _ in range(3))}

    def ask(number: int) -> bool:
        file_id, client = list(owners.values())[number % 3]
        return [file["id"] for file in client.get("/v1/files").json()["data"]] == [file_id]

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(ask, range(120)))
