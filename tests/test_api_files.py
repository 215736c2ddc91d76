"""Uploads: what is refused leaves nothing behind, what is accepted is whole."""

import hashlib
import http.client
import json
import shutil
import socket
import subprocess
import uuid
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from sqlalchemy import select

from tests import factories
from tests.conftest import MAX_FILE_BYTES
from tests.factories import FleetNode, Tenant
from tunery.models import ObjectDeletion
from tunery.storage import Storage

GOOD = b'{"prompt": "a", "completion": "b"}\n'


@pytest.fixture
def left_behind(storage: Storage, client: httpx.Client, project: Tenant) -> Any:
    """Objects and rows of the project, together."""

    def look() -> list[Any]:
        objects = list(storage.keys(f"u/{project.project_id}/"))
        return [*objects, *client.get("/v1/files").json()["data"]]

    return look


def post(client: httpx.Client, content: bytes = GOOD, name: str = "rows.jsonl", **form: str) -> httpx.Response:
    return client.post("/v1/files", files={"file": (name, content)}, data={"purpose": "fine-tune"} | form)


def error(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    return response.json()["error"]


def test_an_upload_is_stored_with_its_hash(client: httpx.Client, storage: Storage, project: Tenant) -> None:
    made = post(client).json()
    assert made["tunery"] == {"sha256": hashlib.sha256(GOOD).hexdigest()}
    [key] = storage.keys(f"u/{project.project_id}/")
    assert storage.get_bytes(key) == GOOD
    answer = client.get(f"/v1/files/{made['id']}/content", headers={"accept": "application/binary"})
    assert answer.content == GOOD and answer.headers["etag"] == f'"{made["tunery"]["sha256"]}"'


def test_the_first_bad_line_is_named_and_more_are_listed(client: httpx.Client, left_behind: Any) -> None:
    rows = GOOD * 16 + b'{"prompt": \n' + GOOD + b"[1, 2]\n"
    told = error(post(client, rows), 400)
    assert told["message"].startswith("line 17: not valid JSON") and told["param"] == "file"
    assert [problem["line"] for problem in told["errors"]] == [17, 19]
    assert left_behind() == []


@pytest.mark.parametrize(
    ("content", "said"), [(b"", "empty"), (b"\n \n", "no rows"), (b"\xff\xfe{}\n", "line 1"), (b"7\n", "line 1")]
)
def test_files_that_hold_no_rows(client: httpx.Client, left_behind: Any, content: bytes, said: str) -> None:
    assert said in error(post(client, content), 400)["message"]
    assert left_behind() == []


def test_a_byte_order_mark_is_no_error(client: httpx.Client) -> None:
    assert post(client, b"\xef\xbb\xbf" + GOOD).status_code == 200


def test_other_purposes_are_not_looked_into(client: httpx.Client) -> None:
    assert post(client, b"\x00\x01", purpose="user_data").status_code == 200


@pytest.mark.parametrize(
    ("request_", "param"),
    [
        ({"data": {"purpose": "fine-tune"}}, "file"),
        ({"files": {"file": ("a", GOOD)}}, "purpose"),
        ({"files": {"file": ("a", GOOD)}, "data": {"purpose": "training"}}, "purpose"),
        ({"files": {"file": ("a", GOOD)}, "data": {"purpose": "batch", "expires_after[anchor]": "x"}}, "expires_after"),
        ({"json": {"file": "x", "purpose": "batch"}}, "file"),
    ],
)
def test_what_is_missing_or_unknown_is_named(client: httpx.Client, request_: dict[str, Any], param: str) -> None:
    told = error(client.post("/v1/files", **request_), 400)
    assert told["param"].startswith(param) and told["fix"]


@pytest.mark.parametrize("body", [b"", b"--x\r\nnonsense", b'--x\r\nContent-Disposition: form-data; name="file'])
def test_broken_multipart_is_a_400(client: httpx.Client, left_behind: Any, body: bytes) -> None:
    headers = {"content-type": "multipart/form-data; boundary=x"}
    error(client.post("/v1/files", content=body, headers=headers), 400)
    assert left_behind() == []


@pytest.mark.parametrize(
    ("sent", "shown"),
    [("../../etc/passwd", "passwd"), ("C:\\data\\a.jsonl", "a.jsonl"), ("日本.jsonl", "日本.jsonl")],
)
def test_a_file_name_is_only_shown(client: httpx.Client, sent: str, shown: str) -> None:
    made = post(client, name=sent).json()
    assert made["filename"] == shown
    assert client.get(f"/v1/files/{made['id']}/content").status_code == 200


# ---- size -------------------------------------------------------------------------------------------------------


def test_exactly_the_limit_fits_and_one_byte_more_does_not(client: httpx.Client, left_behind: Any) -> None:
    whole = b"x" * MAX_FILE_BYTES
    told = error(post(client, whole + b"x", purpose="user_data"), 413)
    assert told["code"] == "file_too_large" and f"{MAX_FILE_BYTES:,}" in told["message"]
    assert left_behind() == []
    assert post(client, whole, purpose="user_data").status_code == 200


def test_a_body_of_unknown_length_is_counted(client: httpx.Client, left_behind: Any) -> None:
    head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    body = (head if block == 0 else b"y" * 65536 for block in range(200))
    response = client.post("/v1/files", content=body, headers={"content-type": "multipart/form-data; boundary=x"})
    assert error(response, 413)["code"] == "file_too_large"
    assert left_behind() == []


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
@pytest.mark.parametrize("expect", ["Expect: 100-continue", "Expect:"])
def test_curl_sees_the_413(api_url: str, project: Tenant, tmp_path: Path, left_behind: Any, expect: str) -> None:
    big = tmp_path / "big.jsonl"
    with big.open("wb") as out:
        out.truncate(64 * 1024 * 1024)
    options = ["-sS", "--noproxy", "*", "-w", "\n%{http_code}", "-H", f"Authorization: Bearer {project.key}"]
    form = ["-H", expect, "-F", "purpose=fine-tune", "-F", f"file=@{big}", f"{api_url}/v1/files"]
    shown = subprocess.run(["curl", *options, *form], capture_output=True, text=True, timeout=30)
    assert shown.returncode == 0, shown.stderr
    body, _, status = shown.stdout.rpartition("\n")
    assert status == "413" and json.loads(body)["error"]["code"] == "file_too_large"
    assert left_behind() == []


def test_a_client_that_reads_only_after_it_has_sent_everything_sees_the_413(api_url: str, project: Tenant) -> None:
    """Closing on it at once would reset the connection, and it would never learn why."""
    place = urlsplit(api_url)
    connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=20)
    headers = {"authorization": f"Bearer {project.key}", "content-type": "multipart/form-data; boundary=x"}
    connection.request("POST", "/v1/files", b"z" * 32 * 1024 * 1024, headers)
    answer = connection.getresponse()
    assert answer.status == 413 and json.loads(answer.read())["error"]["code"] == "file_too_large"
    connection.close()


def test_an_upload_without_a_key_is_refused_before_it_is_read(api_url: str, project: Tenant) -> None:
    """The server answers although not one byte of the announced body has come."""
    place = urlsplit(api_url)
    connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=5)
    connection.putrequest("POST", "/v1/files")
    connection.putheader("content-length", "1000000")
    connection.putheader("content-type", "multipart/form-data; boundary=x")
    connection.endheaders()
    answer = connection.getresponse()
    assert answer.status == 401 and answer.headers["connection"] == "close"
    connection.close()


def test_a_client_that_goes_away_in_the_middle_leaves_nothing(api_url: str, project: Tenant, left_behind: Any) -> None:
    place = urlsplit(api_url)
    with socket.create_connection((place.hostname or "", place.port or 0), timeout=5) as connection:
        connection.sendall(
            f"POST /v1/files HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {project.key}\r\nContent-Length: 100000\r\n"
            "Content-Type: multipart/form-data; boundary=x\r\n\r\n--x\r\nContent-Disposition: form-data; "
            'name="file"; filename="a"\r\n\r\nhalf'.encode()
        )
    assert left_behind() == []


def test_a_row_that_cannot_be_written_takes_its_object_along(
    client: httpx.Client, project: Tenant, left_behind: Any
) -> None:
    with factories.owner(project.database) as session, session.begin():
        session.connection().exec_driver_sql("ALTER TABLE files ADD CONSTRAINT refuse CHECK (filename <> 'no.jsonl')")
    try:
        assert post(client, name="no.jsonl").status_code == 500
    finally:
        with factories.owner(project.database) as session, session.begin():
            session.connection().exec_driver_sql("ALTER TABLE files DROP CONSTRAINT refuse")
    assert left_behind() == []


# ---- deleting ---------------------------------------------------------------------------------------------------


def test_deleting_hides_the_row_and_has_the_object_deleted(
    client: httpx.Client, project: Tenant, left_behind: Any
) -> None:
    file_id = post(client).json()["id"]
    assert client.delete(f"/v1/files/{file_id}").json() == {"id": file_id, "object": "file", "deleted": True}
    with project.transaction() as session:
        assert list(session.scalars(select(ObjectDeletion.key))) == left_behind() != []
    for method, path in (("GET", ""), ("GET", "/content"), ("DELETE", "")):
        error(client.request(method, f"/v1/files/{file_id}{path}"), 404)


def test_a_file_that_a_job_uses_stays(client: httpx.Client, project: Tenant, node: FleetNode, base_model: str) -> None:
    file_id = post(client).json()["id"]
    work = factories.submitted(project, node, training_file=file_id)
    refused = client.delete(f"/v1/files/{file_id}")
    assert error(refused, 409)["param"] == "file_id" and refused.headers["x-should-retry"] == "false"
    assert work.id in refused.json()["error"]["message"]
    client.post(f"/v1/fine_tuning/jobs/{work.id}/cancel")
    assert client.delete(f"/v1/files/{file_id}").status_code == 200
    assert client.get(f"/v1/fine_tuning/jobs/{work.id}").json()["training_file"] == file_id


@pytest.mark.parametrize("limit", ["-1", "10001", "many"])
def test_limits_of_lists(client: httpx.Client, limit: str) -> None:
    assert error(client.get("/v1/files", params={"limit": limit}), 400)["param"] == "limit"


@pytest.mark.parametrize("order", ["asc", "desc"])
def test_nothing_comes_after_an_id_that_is_none(client: httpx.Client, order: str) -> None:
    assert post(client).status_code == 200
    for after in ("after", f"file-{uuid.uuid4().hex}"):
        page = client.get("/v1/files", params={"after": after, "order": order}).json()
        assert page["data"] == [] and page["has_more"] is False
