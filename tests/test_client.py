"""The client against a real server: what it retries, what it refuses, and how much memory it needs."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_cli_server import KEY, WEIGHTS, Answer, Server, adapter, job, refuse, reply, serving
from tunery.client import APIError, Client, Conflict, CorruptDownload, NotFound, RateLimited, ServerError, Unreachable


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as state:
        yield state


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    with Client(server.url, KEY) as api:
        yield api


def test_an_error_carries_all_that_the_envelope_says(server: Server, client: Client) -> None:
    server.routes["GET", "/v1/whoami"] = lambda: refuse(
        409, "It has ended.", "job_ended", param="job", fix="Do nothing.", docs="https://d/e", errors=[{"line": 1}]
    )
    with pytest.raises(Conflict) as caught:
        client.whoami()
    error = caught.value
    assert (error.status, error.code, error.param, error.message) == (409, "job_ended", "job", "It has ended.")
    assert (error.fix, error.docs, error.errors) == ("Do nothing.", "https://d/e", [{"line": 1}])
    assert error.request_id == "req_42"
    assert len(server.requests) == 1


def test_a_busy_server_is_asked_again_when_it_said(server: Server) -> None:
    answers = iter(
        [refuse(429, "Slow down.", "rate_limited", headers={"retry_after_ms": "10"}), reply({"object": "x"})]
    )
    server.routes["GET", "/v1/whoami"] = lambda: next(answers)
    waits: list[float] = []
    with Client(server.url, KEY, on_retry=lambda _, wait_s: waits.append(wait_s)) as client:
        assert client.whoami() == {"object": "x"}
    assert waits == [0.01]


@pytest.mark.parametrize("headers", [{"x_should_retry": "false"}, {"retry_after": "3600"}])
def test_a_server_that_says_no_is_not_asked_again(server: Server, client: Client, headers: dict[str, str]) -> None:
    server.routes["GET", "/v1/whoami"] = lambda: refuse(429, "No quota.", "insufficient_quota", headers=headers)
    with pytest.raises(RateLimited):
        client.whoami()
    assert len(server.requests) == 1


def test_a_repeated_post_carries_the_same_key(server: Server, client: Client) -> None:
    answers = iter([refuse(500, "Oops.", "internal_error", headers={"retry_after": "0"}), reply(job())])
    server.routes["POST", "/v1/fine_tuning/jobs"] = lambda: next(answers)
    client.create_job({"model": "m", "training_file": "file-1"})
    first, second = (headers["idempotency-key"] for headers, _ in server.sent("POST", "/v1/fine_tuning/jobs"))
    assert first == second


def test_pages_are_fetched_as_they_are_needed(server: Server, client: Client) -> None:
    server.jobs = [job(f"ftjob-{number}") for number in range(7)]
    rows = client.jobs(page_size=3)
    assert next(rows)["id"] == "ftjob-0"
    assert len(server.requests) == 1
    assert [row["id"] for row in rows] == [f"ftjob-{number}" for number in range(1, 7)]
    assert len(server.requests) == 3


UPLOAD = """
import resource, sys
from pathlib import Path
from tunery.client import Client
client, seen = Client(sys.argv[1], sys.argv[2]), []
client.whoami()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
client.upload_file(Path(sys.argv[3]), on_bytes=lambda done, total: seen.append((done, total)))
grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(grown_kib, len(seen), *seen[-1])
"""


def test_an_upload_is_never_whole_in_memory(server: Server, tmp_path: Path) -> None:
    path, size = tmp_path / "rows.jsonl", 64 * 1024 * 1024
    with path.open("wb") as out:
        out.truncate(size)
    server.routes["POST", "/v1/files"] = lambda: _forget(server)
    words = [sys.executable, "-c", UPLOAD, server.url, KEY, str(path)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    grown_kib, calls, sent, total = (int(word) for word in done.stdout.split())
    assert grown_kib < 16 * 1024
    assert calls > 100
    assert (sent, total) == (size, size)


def _forget(server: Server) -> Answer:
    server.requests.clear()
    return reply({"id": "file-1"})


def test_a_damaged_download_leaves_nothing(server: Server, client: Client, tmp_path: Path) -> None:
    server.adapters = [adapter()]
    entry = next(file for file in adapter()["versions"][0]["files"] if file["name"].endswith("safetensors"))
    target = tmp_path / "adapter_model.safetensors"
    with pytest.raises(CorruptDownload):
        client.download_adapter_file("capitals", 1, entry | {"sha256": "0" * 64}, target)
    assert list(tmp_path.iterdir()) == []
    client.download_adapter_file("capitals", 1, entry, target)
    assert target.read_bytes() == WEIGHTS
    assert [path.name for path in tmp_path.iterdir()] == [target.name]


def test_a_download_that_breaks_off_begins_again(server: Server, client: Client, tmp_path: Path) -> None:
    whole = (200, {"content-type": "application/octet-stream"}, b"12345678")
    cut = (200, {"content-type": "application/octet-stream", "content-length": "8", "connection": "close"}, b"123")
    answers = iter([cut, whole])
    server.routes["GET", "/v1/files/file-1/content"] = lambda: next(answers)
    client.download_file({"id": "file-1", "bytes": 8}, tmp_path / "rows")
    assert (tmp_path / "rows").read_bytes() == b"12345678"


def test_ids_are_quoted_into_one_path_segment(server: Server, client: Client) -> None:
    with pytest.raises(NotFound):
        client.model("acme/../../v1/whoami?x=1")
    assert server.requests[-1][1] == "/v1/models/acme/../../v1/whoami?x=1"


def test_nobody_there_and_nobody_well(server: Server) -> None:
    with pytest.raises(Unreachable), Client("http://127.0.0.1:9", KEY, max_retries=0) as client:
        client.whoami()
    server.routes["GET", "/v1/whoami"] = lambda: (502, {"content-type": "text/html"}, b"<html>bad gateway</html>")
    with pytest.raises(ServerError) as caught, Client(server.url, KEY, max_retries=0) as client:
        client.whoami()
    assert isinstance(caught.value, APIError)
    assert json.dumps(caught.value.message) == '"HTTP 502"'
