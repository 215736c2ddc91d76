"""One envelope for everything that can go wrong, the edge of the program, and the document that describes it."""

import http.client
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import prometheus_client
import pytest
from fastapi import FastAPI
from pydantic import SecretStr

from api.main import create_app
from tests import factories
from tests.chaos.faults import refuse
from tests.chaos.proxy import Proxy
from tests.conftest import serving, settings_of
from tests.factories import Database, Tenant
from tunery.db import make_engine, make_sessions
from tunery.embedded.servers import Servers
from tunery.settings import ApiSettings
from tunery.storage import Storage

KEYS = {"message", "type", "param", "code", "docs", "request_id"}


def envelope(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    body = response.json()
    assert body.keys() == {"error"} and body["error"].keys() >= KEYS
    assert body["error"]["request_id"] == response.headers["x-request-id"]
    return body["error"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/v1", 404),
        ("GET", "/v1/nothing", 404),
        ("GET", "/v1/files/", 404),
        ("PUT", "/v1/files", 405),
        ("POST", "/v1/fine_tuning/jobs/x/pause", 404),
        ("DELETE", "/v1/fine_tuning/jobs", 405),
        ("GET", "/v1/fine_tuning/jobs?limit=x", 400),
        ("GET", "/v1/fine_tuning/jobs?limit=-1", 400),
        ("GET", "/v1/fine_tuning/jobs?metadata=null", 400),
        ("GET", "/v1/fine_tuning/jobs?metadata[a]=%00", 400),
        ("GET", "/v1/models/%00", 400),
        ("GET", "/v1/adapters/x/versions/0", 400),
        ("POST", "/v1/fine_tuning/jobs", 400),
    ],
)
def test_the_envelope(client: httpx.Client, method: str, path: str, status: int) -> None:
    told = envelope(client.request(method, path), status)
    assert told["type"] == "invalid_request_error" and told["message"] and told["fix"]


@pytest.mark.parametrize(
    ("changes", "message", "fix"),
    [
        (
            {"weight": -1},
            "Invalid 'weight': input should be greater than 0.",
            "Send a number greater than 0; it was -1.",
        ),
        ({"weight": "secret"}, "Invalid 'weight': input should be a valid number", "Send a valid number"),
        ({"max_running_jobs": 1.5}, "Invalid 'max_running_jobs'", "Send a valid integer; it was 1.5."),
        ({"colour": 1}, "Unknown parameter: 'colour'.", "Correct its name"),
    ],
)
def test_what_would_have_been_right(
    client: httpx.Client, project: Tenant, changes: dict[str, Any], message: str, fix: str
) -> None:
    told = envelope(client.patch("/v1/projects/research", json=changes), 400)
    assert told["message"].startswith(message) and told["fix"].startswith(fix)
    assert "secret" not in json.dumps(told)


def test_a_time_limit_has_units(client: httpx.Client) -> None:
    body = {"model": "x", "training_file": "x", "tunery": {"scheduling": {"time_limit": 0}}}
    told = envelope(client.post("/v1/fine_tuning/jobs", json=body), 400)
    assert told["message"].endswith("expected 60 seconds to 90 days; it was 0 seconds.")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"7", b'"x"', b"\xff", b"[" * 100_000])
def test_bodies_that_are_no_object(client: httpx.Client, content: bytes) -> None:
    response = client.post("/v1/fine_tuning/jobs", content=content, headers={"content-type": "application/json"})
    envelope(response, 400)


def test_a_json_body_has_a_limit_of_its_own(client: httpx.Client) -> None:
    told = envelope(client.post("/v1/fine_tuning/jobs", json={"model": "x" * 2_000_000}), 413)
    assert told["code"] == "file_too_large"
    pieces = (b" " * 65536 for _ in range(64))
    headers = {"content-type": "application/json"}
    envelope(client.post("/v1/fine_tuning/jobs", content=pieces, headers=headers), 413)


def test_request_ids(client: httpx.Client) -> None:
    own = client.get("/v1/whoami", headers={"x-request-id": "trace-12345678"})
    assert own.headers["x-request-id"] == "trace-12345678"
    for odd in ("short", "with spaces in it", "x" * 200):
        assert client.get("/v1/whoami", headers={"x-request-id": odd}).headers["x-request-id"].startswith("req_")
    assert client.get("/healthz").headers["x-request-id"] != client.get("/healthz").headers["x-request-id"]


def test_a_bug_tells_nothing_but_its_id(app: FastAPI, client: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    good, app.state.storage = app.state.storage, None
    try:
        with caplog.at_level(logging.ERROR):
            response = client.post("/v1/files", files={"file": ("a", b"{}\n")}, data={"purpose": "batch"})
    finally:
        app.state.storage = good
    told = envelope(response, 500)
    assert "NoneType" not in response.text and "Traceback" not in response.text
    assert told["request_id"] in caplog.text and "AttributeError" in caplog.text


def test_a_database_that_is_away(storage: Storage, servers: Servers, project: Tenant) -> None:
    nowhere = f"postgresql://x:y@127.0.0.1:{_free_port()}/x"
    engine = make_engine(nowhere)
    with serving(create_app(make_sessions(engine), storage, settings_of(servers, nowhere))) as url:
        headers = {"authorization": f"Bearer {project.key}"}
        with httpx.Client(base_url=url, headers=headers, trust_env=False) as client:
            response = client.get("/v1/files")
            told = envelope(response, 503)
            assert told["code"] == "service_unavailable" and told["type"] == "server_error"
            assert int(response.headers["retry-after"]) > 0 and "x-should-retry" not in response.headers
            ready = client.get("/readyz")
            assert ready.status_code == 503 and ready.json()["parts"]["storage"] == "ok"
            assert ready.json()["parts"]["database"] != "ok" and "127.0.0.1" not in ready.text
            assert client.get("/healthz").status_code == 200


def test_every_route_says_503_while_the_database_is_away_and_recovers_unaided(
    database: Database, storage: Storage, servers: Servers, project: Tenant
) -> None:
    with Proxy.of(database.url("tunery_api")) as proxy:
        settings = settings_of(servers, proxy.reach(database.url("tunery_api")))
        app = create_app(make_sessions(make_engine(settings.database_url.get_secret_value())), storage, settings)
        with serving(app) as url, httpx.Client(base_url=url, trust_env=False, timeout=20) as client:
            client.headers["authorization"] = f"Bearer {project.key}"
            assert client.get("/v1/files").status_code == 200
            paths = client.get("/openapi.json").json()["paths"]
            routes = [
                (method, path) for path, entry in paths.items() for method in entry if entry[method].get("security")
            ]
            routes.remove(("post", "/v1/nodes/join"))  # a token instead of a key, and its body is read first
            assert len(routes) > 15
            proxy.set(refuse())
            proxy.cut()
            for method, path in routes:
                response = client.request(method, re.sub(r"{\w+}", "x", path))
                told = envelope(response, 503)
                assert told["code"] == "service_unavailable" and int(response.headers["retry-after"]) > 0, path
            proxy.set()
            assert client.get("/v1/files").status_code == 200


def test_an_object_store_that_is_away(database: Database, settings: ApiSettings, project: Tenant) -> None:
    broken = settings.model_copy(update={"s3_secret_access_key": SecretStr("wrong")})
    with serving(create_app(database.sessions("tunery_api"), Storage(broken), broken)) as url:
        headers = {"authorization": f"Bearer {project.key}"}
        with httpx.Client(base_url=url, headers=headers, trust_env=False, timeout=30) as client:
            upload = client.post("/v1/files", files={"file": ("a", b"{}\n")}, data={"purpose": "batch"})
            assert envelope(upload, 503)["code"] == "service_unavailable"
            assert client.get("/v1/files").json()["data"] == []
            assert client.get("/readyz").json()["parts"]["database"] == "ok"
            assert client.get("/readyz").status_code == 503


def test_a_commit_that_fails_is_not_acknowledged(client: httpx.Client, project: Tenant, base_model: str) -> None:
    """A deferred trigger fails at COMMIT, after the route has returned: the answer must know."""
    owner = factories.owner
    statements = (
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'no'; END $$",
        "CREATE CONSTRAINT TRIGGER refuse AFTER INSERT ON jobs DEFERRABLE INITIALLY DEFERRED "
        "FOR EACH ROW EXECUTE FUNCTION refuse()",
    )
    file_id = factories.file(project)
    with owner(project.database) as session, session.begin():
        for statement in statements:
            session.connection().exec_driver_sql(statement)
    try:
        answer = client.post("/v1/fine_tuning/jobs", json={"model": base_model, "training_file": file_id})
        assert answer.status_code == 500
        assert client.get("/v1/fine_tuning/jobs").json()["data"] == []
    finally:
        with owner(project.database) as session, session.begin():
            session.connection().exec_driver_sql("DROP FUNCTION refuse() CASCADE")


def test_health_and_metrics(client: httpx.Client) -> None:
    parts = {"database": "ok", "storage": "ok", "redis": "ok"}
    assert client.get("/readyz").json() == {"status": "ready", "parts": parts}
    assert client.get("/livez").status_code == 200
    client.get("/v1/files/file-x")
    client.request("BREW", "/v1/coffee")
    assert client.get("/metrics").status_code == 404, "numbers are for operators, on a port of their own"
    text = prometheus_client.generate_latest().decode()
    assert 'route="/v1/files/{file_id}",status="404"' in text
    assert "BREW" not in text and "coffee" not in text and "file-x" not in text


def test_a_connection_survives_errors(api_url: str, project: Tenant) -> None:
    """Errors whose body was read keep the connection; the next request on it is understood."""
    place = urlsplit(api_url)
    connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=5)
    headers = {"authorization": f"Bearer {project.key}", "content-type": "application/json"}
    for body, status in (("{", 400), (json.dumps({"model": "x", "training_file": "y"}), 404)):
        connection.request("POST", "/v1/fine_tuning/jobs", body, headers)
        answer = connection.getresponse()
        assert (answer.status, bool(answer.read())) == (status, True)
    connection.close()


# ---- the document -------------------------------------------------------------------------------------------------

OPERATIONS = {
    "cancel_job",
    "create_file",
    "create_job",
    "delete_file",
    "download_adapter_file",
    "download_file",
    "healthz",
    "import_base_model",
    "list_adapters",
    "list_base_models",
    "list_files",
    "list_job_checkpoints",
    "list_job_events",
    "list_jobs",
    "list_models",
    "read_job_log",
    "readyz",
    "retrieve_adapter",
    "retrieve_adapter_version",
    "retrieve_base_model",
    "retrieve_file",
    "retrieve_job",
    "retrieve_model",
    "whoami",
}


def test_the_document(client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()
    operations = {entry["operationId"]: entry for path in document["paths"].values() for entry in path.values()}
    assert operations.keys() >= OPERATIONS, "generated clients call their methods after these names"
    for name, operation in operations.items():
        assert operation.get("description"), name
        assert "422" not in operation["responses"] and "default" in operation["responses"], name
        for response in {"401", "403", "503"} - ({"503"} if name == "readyz" else set()):
            schema = operation["responses"][response]["content"]["application/json"]["schema"]
            assert schema["$ref"].endswith("/ErrorOut"), name
    open_to_all = {name for name, operation in operations.items() if not operation.get("security")}
    assert open_to_all == {"healthz", "readyz"}
    assert client.get("/docs").status_code == 200


# ---- the program --------------------------------------------------------------------------------------------------


def environment(settings: ApiSettings, **changes: str) -> dict[str, str]:
    named = {f"TUNERY_{name.upper()}": value for name, value in settings.model_dump().items() if value is not None}
    plain = {
        name: value.get_secret_value() if isinstance(value, SecretStr) else str(value) for name, value in named.items()
    }
    return {"PATH": os.environ["PATH"], "PYTHONPATH": str(Path(__file__).parent.parent)} | plain | changes


def test_the_program_serves_and_stops_in_order(settings: ApiSettings, tmp_path: Path) -> None:
    port = _free_port()
    own = environment(settings, TUNERY_API_PORT=str(port))
    with (tmp_path / "log").open("w+") as log:
        process = subprocess.Popen([sys.executable, "-P", "-m", "api"], env=own, stderr=log, cwd=tmp_path)
        try:
            transport = httpx.HTTPTransport(retries=0)
            with httpx.Client(transport=transport) as client:
                _until_ready(client, f"http://127.0.0.1:{port}/readyz", process)
                assert client.get(f"http://127.0.0.1:{port}/v1/files").status_code == 401
            process.send_signal(signal.SIGTERM)
            assert process.wait(10) == 0
        finally:
            process.kill()
        log.seek(0)
        lines = [json.loads(line) for line in log]
    assert any(line.get("route") == "/v1/files" and line["request_id"] for line in lines)


def test_the_program_refuses_a_role_that_sees_everything(servers: Servers, settings: ApiSettings) -> None:
    own = environment(settings, TUNERY_DATABASE_URL=servers.admin_url)
    done = subprocess.run([sys.executable, "-P", "-m", "api"], env=own, capture_output=True, text=True, timeout=30)
    assert done.returncode == 2 and "superuser" in done.stderr


def test_the_program_names_the_settings_it_lacks(settings: ApiSettings) -> None:
    own = environment(settings)
    del own["TUNERY_KEY_PEPPER"]
    done = subprocess.run([sys.executable, "-P", "-m", "api"], env=own, capture_output=True, text=True, timeout=30)
    assert done.returncode == 2 and "TUNERY_KEY_PEPPER" in done.stderr


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _until_ready(client: httpx.Client, url: str, process: subprocess.Popen[bytes]) -> None:
    for _ in range(300):
        assert process.poll() is None, "the program ended"
        try:
            if client.get(url).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.05)
    raise AssertionError("the program did not become ready")
