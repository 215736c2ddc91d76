"""What a project stores, and what happens where its room ends: at the announced length, midway, at the commit."""

import http.client
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from sqlalchemy import update

from tests import factories
from tests.factories import Database, FleetNode, Tenant
from tunery import usage
from tunery.db import transaction
from tunery.models import Project
from tunery.storage import Storage

ROW = b'{"prompt": "a", "completion": "b"}\n'


def limit(tenant: Tenant, size: int | None) -> None:
    with factories.owner(tenant.database) as session, session.begin():
        session.execute(update(Project).where(Project.id == tenant.project_id).values(max_storage_bytes=size))


def post(client: httpx.Client, content: bytes = ROW) -> httpx.Response:
    return client.post("/v1/files", files={"file": ("rows.jsonl", content)}, data={"purpose": "fine-tune"})


def refused(answer: httpx.Response) -> dict[str, Any]:
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (429, "storage_quota_exceeded")
    assert answer.headers["x-should-retry"] == "false" and "Delete files" in error["fix"]
    return error


def test_usage_counts_every_kind_of_this_project_alone(
    client: httpx.Client, project: Tenant, other_project: Tenant, node: FleetNode, base_model: str, database: Database
) -> None:
    for tenant in (project, other_project):
        work = factories.running(tenant, node if tenant is project else factories.node(database))
        factories.checkpoint(work, 10)
        factories.publish(work)
    found = client.get("/v1/usage/storage").json()
    kinds = {kind: (found[kind]["count"], found[kind]["bytes"]) for kind in usage.KINDS}
    assert kinds == {
        "files": (1, 100),
        "datasets": (1, 8000),
        "checkpoints": (1, 10),
        "adapters": (1, 10),
        "logs": (0, 0),
    }
    assert found["total_bytes"] == 8120 and found["limit_bytes"] == 1 << 40
    with transaction(database.sessions("tunery_scheduler")) as session:
        everyone = usage.by_project(session)
    assert {project.project_id, other_project.project_id} <= everyone.keys()


def test_a_file_that_does_not_fit_is_refused_with_the_numbers(
    client: httpx.Client, project: Tenant, storage: Storage
) -> None:
    limit(project, 50)
    assert post(client).status_code == 200
    assert "stores 35 of at most 50 bytes (files 35," in refused(post(client))["message"]
    assert len(list(storage.keys(f"u/{project.project_id}/"))) == 1
    limit(project, None)
    assert post(client).status_code == 200


def test_a_full_project_is_told_before_its_body_is_read(api_url: str, project: Tenant) -> None:
    limit(project, 50)
    place = urlsplit(api_url)
    connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=5)
    connection.putrequest("POST", "/v1/files")
    connection.putheader("authorization", f"Bearer {project.key}")
    connection.putheader("content-length", "100000")
    connection.putheader("content-type", "multipart/form-data; boundary=x")
    connection.endheaders()
    answer = connection.getresponse()
    assert answer.status == 429 and answer.headers["connection"] == "close"
    connection.close()


def test_a_body_of_unknown_length_is_cut_where_the_room_ends(client: httpx.Client, project: Tenant) -> None:
    limit(project, 50)
    head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    pieces = [head, *[ROW * 1000] * 40]  # 1.4 MB, under the limit of one file
    headers = {"content-type": "multipart/form-data; boundary=x"}
    refused(client.post("/v1/files", content=iter(pieces), headers=headers))


def test_uploads_that_fit_alone_do_not_pass_the_limit_together(
    connect: Callable[[Tenant | None], httpx.Client], project: Tenant
) -> None:
    limit(project, 3 * len(ROW))
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: post(connect(project)), range(8)))
    assert sorted(answer.status_code for answer in answers) == [200] * 3 + [429] * 5


def test_a_full_project_submits_nothing_and_what_runs_goes_on(
    client: httpx.Client, project: Tenant, node: FleetNode, base_model: str
) -> None:
    work = factories.running(project, node)
    limit(project, 100)
    body = {"model": base_model, "training_file": factories.file(project)}
    refused(client.post("/v1/fine_tuning/jobs", json=body))
    factories.checkpoint(work, 10)
    factories.publish(work)
    assert client.get(f"/v1/fine_tuning/jobs/{work.id}").json()["status"] == "succeeded"


@pytest.mark.parametrize("size", [0, 1])
def test_a_project_may_be_given_no_room(client: httpx.Client, project: Tenant, size: int) -> None:
    limit(project, size)
    refused(post(client))
