"""The api dies in the middle of a request: nothing half-done counts, and nothing done is lost."""

from pathlib import Path

import httpx
import pytest
from sqlalchemy import func, select

from tests.chaos.faults import drop_reply_to, reset_upload
from tests.chaos.proxy import Proxy
from tests.chaos.support import failing
from tests.fleet import Fleet, Via, fleet
from tunery.embedded.servers import Servers
from tunery.models import File, Job, Project

pytestmark = pytest.mark.chaos
ROW = b'{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}\n'


def upload(client: httpx.Client, size: int = 5000) -> httpx.Response:
    rows = ROW * (size // len(ROW) + 1)
    return client.post("/v1/files", files={"file": ("rows.jsonl", rows)}, data={"purpose": "fine-tune"})


@pytest.mark.parametrize("point", ["store.part:kill:nth=40:once", "upload.stored:kill:once"])
def test_a_file_is_recorded_whole_or_not_at_all(tmp_path: Path, point: str) -> None:
    """F1: killed between the parts of an upload, and between the object store and the database."""
    with fleet() as running:
        running.serve_api(**failing(point, tmp_path))
        with running.client() as client:
            with pytest.raises(httpx.TransportError):
                upload(client, 40 << 20)
            assert _count(running, File) == 0
            running.serve_api()
            sent = upload(client, 1 << 20)
            assert sent.status_code == 200
            assert client.get(f"/v1/files/{sent.json()['id']}/content").content.startswith(ROW)


def test_a_job_whose_answer_was_lost_exists_and_can_be_found(tmp_path: Path) -> None:
    """F2, as far as it goes: without an Idempotency-Key a caller must look before asking again."""
    with fleet() as running:
        running.serve_api()
        with running.client() as client:
            file_id = upload(client).json()["id"]
            running.processes[-1].kill()
            running.processes[-1].wait()
            running.serve_api(**failing("request.committed:kill:once", tmp_path))
            body = {"model": "tiny", "training_file": file_id, "suffix": "once"}
            with pytest.raises(httpx.TransportError):
                client.post("/v1/fine_tuning/jobs", json=body)
            running.serve_api()
            found = client.get("/v1/fine_tuning/jobs").json()["data"]
            assert [job["training_file"] for job in found] == [file_id]


def test_a_commit_whose_reply_is_lost_is_a_503_and_what_it_wrote_is_whole(servers: Servers) -> None:
    """F13: the object of a file that was recorded after all is not thrown away with the error."""
    with Proxy.of(servers.admin_url) as postgres, fleet(via=Via(postgres=postgres)) as running:
        running.serve_api()
        with running.client() as client:
            postgres.set(drop_reply_to("COMMIT", times=2))  # of the key's own look-up, then of the file
            codes = [upload(client).status_code for _ in range(3)]
            assert codes[-1] == 200
            assert 503 in codes
            for file in client.get("/v1/files").json()["data"]:
                assert client.get(f"/v1/files/{file['id']}/content").content.startswith(ROW)


def test_a_broken_upload_to_the_store_is_sent_again(servers: Servers) -> None:
    """F16: the caller sees nothing of it."""
    with Proxy.of(servers.s3_root.endpoint_url, http=True) as s3, fleet(via=Via(s3=s3)) as running:
        running.serve_api()
        s3.set(reset_upload(100_000, on="^(PUT|POST)", times=2))
        with running.client() as client:
            sent = upload(client, 1 << 20)
            assert sent.status_code == 200, sent.text
            assert len(client.get(f"/v1/files/{sent.json()['id']}/content").content) == sent.json()["bytes"]
        assert s3.did["resets"] == 2


def _count(running: Fleet, what: type[File | Job]) -> int:
    with running.look() as session:
        return session.scalar(select(func.count()).select_from(what)) or 0


def test_whatever_runs_in_a_project_that_is_archived_is_stopped_and_its_keys_are_refused(running: Fleet) -> None:
    """F32: what trains, what waits, and nothing of anybody else."""
    running.node("a")
    running.serve_api()
    with running.client() as client:
        trains = running.submit("slow", steps=600)
        running.until(lambda: running.step(trains) > 1)
        (attempt,) = running.attempts(trains)
        waits, other = running.submit("ok"), running.submit("ok", steps=3, project_id=running.project("other"))
        assert client.get("/v1/whoami").status_code == 200
        with running.look() as session:
            session.get_one(Project, running.project_id).status = "archived"
        assert client.get("/v1/whoami").status_code == 401
    assert (running.ends(trains), running.ends(waits), running.ends(other)) == ("cancelled", "cancelled", "succeeded")
    assert "The job's project was archived" in running.messages(trains)
    assert not running.trainer_pids(attempt.id)
    running.until(running.nothing_held, 20)
