"""Models, base models, adapters and their files, and who is asking."""

import hashlib
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from tests import factories
from tests.factories import Database, FleetNode, Tenant
from tunery.contracts.events import FileEntry
from tunery.storage import Storage

CONTENTS = {"adapter_model.safetensors": b"weights" * 100_000, "adapter_config.json": b"{}", "card/README.md": b"# x"}


@pytest.fixture
def published(project: Tenant, node: FleetNode, base_model: str, storage: Storage) -> Callable[..., factories.Work]:
    """A job that succeeded, with the objects that it says it published."""

    def make(suffix: str = "capitals") -> factories.Work:
        work = factories.running(project, node, suffix=suffix)
        entries = []
        for name, content in CONTENTS.items():
            storage.put_bytes(f"a/{project.project_id}/{work.attempt_id}/output/{name}", content)
            sha256 = hashlib.sha256(content).hexdigest()
            entries.append(FileEntry(name=name, bytes=len(content), sha256=sha256))
        return factories.publish(work, entries)

    return make


def test_versions_of_one_name_count_up(client: httpx.Client, published: Any, base_model: str) -> None:
    jobs = [published().id, published().id]
    [adapter] = client.get("/v1/adapters").json()["data"]
    assert adapter["name"] == "capitals" and [version["version"] for version in adapter["versions"]] == [2, 1]
    newest = adapter["versions"][0]
    assert newest["job_id"] == jobs[1] and newest["base_model"] == base_model and newest["adapter"] == "capitals"
    assert newest["bytes"] == sum(map(len, CONTENTS.values())) and newest["metrics"] == {"eval/loss": 1.1}
    assert newest["sha256"] == hashlib.sha256(CONTENTS["adapter_model.safetensors"]).hexdigest()
    for name in ("capitals", adapter["id"], newest["model_name"]):
        assert client.get(f"/v1/adapters/{name}").json() == adapter
    assert client.get("/v1/adapters/capitals/versions/2").json() == newest
    assert client.get("/v1/adapters/capitals/versions/3").status_code == 404


def test_files_of_a_version(client: httpx.Client, published: Any) -> None:
    published()
    for entry in client.get("/v1/adapters/capitals/versions/1").json()["files"]:
        answer = client.get(f"/v1/adapters/capitals/versions/1/files/{entry['name']}")
        assert answer.content == CONTENTS[entry["name"]]
        assert hashlib.sha256(answer.content).hexdigest() == entry["sha256"]
        assert answer.headers["etag"] == f'"{entry["sha256"]}"'
        assert answer.headers["content-disposition"].startswith("attachment")
        assert int(answer.headers["content-length"]) == entry["bytes"]


@pytest.mark.parametrize(
    "name",
    ["nope.bin", "..%2Foutput%2Fadapter_config.json", "%2e%2e/adapter_config.json", "adapter_config.json%00", "card"],
)
def test_only_names_in_the_manifest(client: httpx.Client, published: Any, name: str) -> None:
    published()
    assert client.get(f"/v1/adapters/capitals/versions/1/files/{name}").status_code == 404


def test_an_object_that_is_gone_is_a_404_and_not_half_an_answer(
    client: httpx.Client, published: Any, storage: Storage, project: Tenant
) -> None:
    work = published()
    storage.delete(f"a/{project.project_id}/{work.attempt_id}/output/adapter_config.json")
    assert client.get("/v1/adapters/capitals/versions/1/files/adapter_config.json").status_code == 404


def test_adapters_come_in_pages(client: httpx.Client, published: Any) -> None:
    for suffix in ("a", "b", "c"):
        published(suffix)
    first = client.get("/v1/adapters", params={"limit": 2}).json()
    second = client.get("/v1/adapters", params={"limit": 2, "after": first["last_id"]}).json()
    names = [adapter["name"] for adapter in first["data"] + second["data"]]
    assert names == ["c", "b", "a"] and first["has_more"] and not second["has_more"]


def test_an_import_is_queued_once(client: httpx.Client, database: Database) -> None:
    asked = {"source": "hub", "repo": "org/Some-Model", "revision": "abc"}
    answer = client.post("/v1/base_models", json=asked)
    assert answer.status_code == 202
    model = answer.json()
    assert (model["id"], model["state"], model["files"]) == ("some-model", "importing", [])
    assert client.post("/v1/base_models", json=asked).json() == model
    taken = client.post("/v1/base_models", json=asked | {"revision": "def"})
    assert taken.status_code == 409 and taken.json()["error"]["param"] == "name"
    assert client.get("/v1/models/some-model").status_code == 404  # not ready: no job can use it
    assert client.get("/v1/base_models/some-model").json() == model


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "source"),
        ({"source": "ftp"}, "source"),
        ({"source": "hub"}, "repo"),
        ({"source": "demo", "name": "a:b"}, "name"),
        ({"source": "demo", "token": "x"}, "token"),
        ({"source": "path", "path": "/models/a:b"}, None),
    ],
)
def test_imports_that_cannot_be(client: httpx.Client, body: dict[str, str], param: str | None) -> None:
    answer = client.post("/v1/base_models", json=body)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param


def test_base_models(client: httpx.Client, base_model: str) -> None:
    ready = next(model for model in client.get("/v1/base_models").json()["data"] if model["id"] == base_model)
    assert ready["state"] == "ready" and ready["files"][0]["name"] == "model.safetensors"
    assert ready == client.get(f"/v1/base_models/{base_model}").json()
    seen, after = [], ""
    while True:
        page = client.get("/v1/base_models", params={"limit": 1, "after": after}).json()
        seen += [model["id"] for model in page["data"]]
        if not page["has_more"]:
            break
        after = page["last_id"]
    assert seen == sorted(seen) and base_model in seen


def test_a_base_models_name_may_hold_a_slash(client: httpx.Client, database: Database) -> None:
    name = factories.base_model(database, "meta/Llama-Tiny")
    assert client.get("/v1/models/meta%2FLlama-Tiny").json()["id"] == name
    assert client.get("/v1/base_models/meta/Llama-Tiny").json()["id"] == name


def test_whoami(client: httpx.Client, project: Tenant) -> None:
    who = project.identity
    shown = client.get("/v1/whoami").json()
    assert shown["organization"]["name"] == who.organization and shown["project"]["name"] == who.project
    assert shown["key"]["scopes"] == ["admin"] and shown["key"]["expires_at"] is None
    assert shown["project"]["id"].startswith("proj_") and shown["key"]["id"].startswith("key_")
