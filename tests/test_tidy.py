"""What is given up and what never is: as the scheduler, with its own identity in a real store."""

import random
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import boto3
import psycopg
import pytest
from pydantic import SecretStr
from sqlalchemy import event, func, select, text, update

from scheduler.tidy import Tidy
from tests import factories
from tests.factories import Database, FleetNode, Tenant, Work
from tunery import files, ids, jobs, leases, orphans, progress, queue, trash
from tunery.contracts.events import Checkpoint as CheckpointSaid
from tunery.contracts.events import FileEntry
from tunery.db import Sessions, transaction
from tunery.embedded.servers import Servers
from tunery.errors import Conflict, Unavailable
from tunery.models import Attempt, Checkpoint, Dataset, File, Job, ObjectDeletion, Task
from tunery.queue import Deposed
from tunery.settings import Retention, StorageSettings
from tunery.states import FailureCode
from tunery.storage import Storage

PARTS = ("adapter_config.json", "adapter_model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json")
RESULT = list(PARTS[:2])


@pytest.fixture(autouse=True)
def _catalogue(base_model: str) -> None:
    """Every job here is for the module's one base model."""


@pytest.fixture(scope="module")
def scheduler(database: Database) -> Sessions:
    return database.sessions("tunery_scheduler")


@pytest.fixture(scope="module")
def epoch(scheduler: Sessions) -> int:
    with transaction(scheduler) as session:
        return queue.lead(session, "a test", 3600) or 0


@pytest.fixture(scope="module")
def broom(servers: Servers) -> Storage:
    """The store with the scheduler's identity."""
    s3 = servers.s3_tidy
    return Storage(
        StorageSettings(
            s3_endpoint_url=s3.endpoint_url,
            s3_bucket=s3.bucket,
            s3_access_key_id=SecretStr(s3.access_key_id),
            s3_secret_access_key=SecretStr(s3.secret_access_key),
        )
    )


@pytest.fixture
def tidy(scheduler: Sessions, broom: Storage, epoch: int) -> Callable[..., None]:
    """One look around with these rules."""

    def run(**rules: float) -> None:
        Tidy(scheduler, broom, Retention(**rules)).run(epoch)  # type: ignore[arg-type]

    return run


def save(work: Work, storage: Storage, step: int) -> None:
    """A checkpoint, with its objects."""
    prefix = f"a/{work.tenant.project_id}/{work.attempt_id}/checkpoints/step-{step}"
    for name in PARTS:
        storage.put_bytes(f"{prefix}/{name}", b"x" * 10)
    stored = [FileEntry(name=name, bytes=10, sha256=factories.SHA) for name in PARTS]
    with work.node.transaction() as session:
        said = CheckpointSaid(step=step, path="/tmp", files=[])
        progress.store_checkpoint(session, work.attempt_id, work.fence, said, prefix, stored)


def left(storage: Storage, work: Work) -> dict[int, list[str]]:
    """Step and names of the objects of its checkpoints."""
    found: dict[int, list[str]] = {}
    for attempt in {view.attempt.id for view in _attempts(work)}:
        prefix = f"a/{work.tenant.project_id}/{attempt}/checkpoints/step-"
        for key in storage.keys(prefix):
            step, name = key.removeprefix(prefix).split("/")
            found.setdefault(int(step), []).append(name)
    return found


def _attempts(work: Work) -> list[jobs.AttemptView]:
    with work.tenant.transaction() as session:
        return jobs.attempts(session, work.tenant.project_id, work.job_id)


def age(database: Database, work: Work, days: float) -> None:
    with factories.owner(database) as session, session.begin():
        past = func.now() - timedelta(days=days)
        session.execute(update(Job).where(Job.id == work.job_id).values(finished_at=past))
        session.execute(update(Attempt).where(Attempt.job_id == work.job_id).values(ended_at=past))


# ---- optimizer states ---------------------------------------------------------------------------------------------


def test_a_running_job_keeps_its_newest_states_and_every_adapter(
    project: Tenant, node: FleetNode, storage: Storage, tidy: Any
) -> None:
    work = factories.running(project, node)
    for step in (10, 20, 30, 40):
        save(work, storage, step)
    tidy(keep_checkpoints=2)
    assert left(storage, work) == {10: RESULT, 20: RESULT, 30: list(PARTS), 40: list(PARTS)}
    with project.transaction() as session:
        rows, _ = progress.checkpoints(session, project.project_id, work.job_id, after=None, limit=10)
    assert [(row.step, row.bytes) for row in rows] == [(40, 50), (30, 50), (20, 20), (10, 20)]


def test_an_ended_job_keeps_its_states_for_a_week(
    project: Tenant, node: FleetNode, storage: Storage, tidy: Any, database: Database
) -> None:
    work = factories.running(project, node)
    save(work, storage, 10)
    factories.publish(work)
    age(database, work, 6.9)
    tidy()
    assert left(storage, work) == {10: list(PARTS)}
    age(database, work, 7.1)
    tidy()
    assert left(storage, work) == {10: RESULT}


@pytest.mark.parametrize("seed", range(3))
def test_no_order_of_events_takes_what_a_job_can_continue_from(
    project: Tenant, database: Database, storage: Storage, tidy: Any, scheduler: Sessions, seed: int
) -> None:
    """Saves, faults, damaged checkpoints, assignments and tidying, at random. After each: what a live attempt continues
    from is whole in the store, and so is the newest state that the next one would."""
    chance = random.Random(seed)
    work = factories.running(project, factories.node(database))
    step = 0
    for _ in range(14):
        match chance.choice(["save", "save", "tidy", "fault", "damage"]):
            case "save":
                save(work, storage, step := step + 10)
            case "tidy":
                tidy(keep_checkpoints=chance.choice([1, 2]), orphan_age_s=0)
            case move:
                with work.node.transaction() as session:
                    held = leases.hold(session, work.attempt_id, work.fence)
                    code = FailureCode.CORRUPT_CHECKPOINT if move == "damage" else FailureCode.TRAINER_CRASHED
                    if move == "damage":
                        progress.discard_checkpoint(session, held)
                    held.job.faults_without_progress = 0
                    leases.fail(session, held, code, "chance")
                if chance.random() < 0.5:
                    tidy(keep_checkpoints=1, orphan_age_s=0)
                work = factories.assign(work)
                if chance.random() < 0.5:
                    tidy(keep_checkpoints=1, orphan_age_s=0)
                work = factories.tell(factories.claim(work), factories.started())
        with factories.owner(database) as session:
            resume = session.scalar(select(Attempt.resume_checkpoint_id).where(Attempt.id == work.attempt_id))
            needed = list(session.scalars(select(Checkpoint).where(Checkpoint.id == resume)))
            newest = select(Checkpoint).where(Checkpoint.job_id == work.job_id, Checkpoint.state_deleted_at.is_(None))
            newest = newest.where(Checkpoint.deleted_at.is_(None)).order_by(Checkpoint.step.desc()).limit(1)
            needed += session.scalars(newest)
        for row in needed:
            if row.deleted_at is None:
                assert [file["name"] for file in row.files] == list(PARTS)
                assert [name for name in PARTS if storage.get_bytes(f"{row.object_prefix}/{name}") is None] == []


# ---- files, rows, logs --------------------------------------------------------------------------------------------


def uploaded(tenant: Tenant, storage: Storage) -> tuple[str, str]:
    """A file with its object; id and key."""
    file_id = factories.file(tenant)
    key = files.object_key(tenant.project_id, ids.decode(ids.FILE, file_id))
    storage.put_bytes(key, b"{}")
    return file_id, key


def test_a_deleted_files_object_and_its_rows_go(
    project: Tenant, node: FleetNode, storage: Storage, tidy: Any, database: Database
) -> None:
    file_id, key = uploaded(project, storage)
    work = factories.queued(project, node, training_file=file_id)
    with factories.owner(database) as session:
        dataset = session.get_one(Dataset, session.get_one(Job, work.job_id).train_dataset_id)
    storage.put_bytes(dataset.object_key, b"rows")
    with project.transaction() as session, pytest.raises(Conflict, match=work.id):
        files.delete(session, project.project_id, file_id)
    factories.cancel(work)
    with project.transaction() as session:
        files.delete(session, project.project_id, file_id)
    tidy()
    assert storage.get_bytes(key) is None
    assert storage.get_bytes(dataset.object_key) == b"rows"  # the job that read them is still there
    with project.transaction() as session:
        jobs.delete(session, project.project_id, work.job_id)
    tidy()
    assert storage.get_bytes(dataset.object_key) == b"rows"  # too young to tell from rows on their way to a job
    with factories.owner(database) as session, session.begin():
        session.execute(update(Dataset).values(created_at=func.now() - timedelta(hours=2)))
    tidy()
    assert storage.get_bytes(dataset.object_key) is None


def test_a_file_whose_time_is_over_goes_unless_a_job_needs_it(
    project: Tenant, node: FleetNode, storage: Storage, tidy: Any, database: Database
) -> None:
    free, used = uploaded(project, storage), uploaded(project, storage)
    factories.submitted(project, node, training_file=used[0])
    with factories.owner(database) as session, session.begin():
        mine = File.project_id == project.project_id
        session.execute(update(File).where(mine).values(expires_at=func.now() - timedelta(seconds=1)))
    tidy()
    assert (storage.get_bytes(free[1]), storage.get_bytes(used[1])) == (None, b"{}")


def test_old_logs_go_and_the_api_says_so(
    project: Tenant, node: FleetNode, storage: Storage, tidy: Any, database: Database, client: Any
) -> None:
    work = factories.succeeded(project, node)
    key = f"a/{project.project_id}/{work.attempt_id}/logs/{0:012d}"
    storage.put_bytes(key, b"hello")
    with factories.owner(database) as session, session.begin():
        session.execute(update(Attempt).where(Attempt.id == work.attempt_id).values(log_bytes=5))
    path = f"/v1/fine_tuning/jobs/{work.id}/logs"
    assert client.get(path).json()["text"] == "hello"
    age(database, work, 31)
    tidy()
    assert storage.get_bytes(key) is None
    assert "was deleted on" in client.get(path).json()["error"]["message"]


# ---- jobs ---------------------------------------------------------------------------------------------------------


def test_a_deleted_job_leaves_what_it_published_and_nothing_else(
    project: Tenant, node: FleetNode, storage: Storage, tidy: Any, client: Any, database: Database
) -> None:
    work = factories.running(project, node, metadata={"team": "nlp"})
    path = f"/v1/fine_tuning/jobs/{work.id}"
    refused = client.delete(path)
    assert refused.status_code == 409 and "running" in refused.json()["error"]["message"]
    save(work, storage, 10)
    factories.tell(work, factories.metrics(2, 10))
    output, log = (f"a/{project.project_id}/{work.attempt_id}/{name}" for name in ("output/w", "logs/000000000000"))
    for key in (output, log):
        storage.put_bytes(key, b"x")
    factories.publish(work, [FileEntry(name="w", bytes=1, sha256=factories.SHA), *_weights()])
    name = client.get(path).json()["fine_tuned_model"]
    assert client.delete(path).json() == {"id": work.id, "object": "fine_tuning.job", "deleted": True}
    tidy(orphan_age_s=0)
    for each in (path, f"{path}/events", f"{path}/checkpoints", f"{path}/logs"):
        assert client.get(each).status_code == 404, each
    assert client.delete(path).status_code == 404 and client.get("/v1/fine_tuning/jobs").json()["data"] == []
    assert list(storage.keys(f"a/{project.project_id}/{work.attempt_id}/")) == [output]
    with factories.owner(database) as session:
        for table in ("events", "metric_series"):
            assert not session.execute(text(f"SELECT 1 FROM {table} WHERE job_id = :id"), {"id": work.job_id}).first()
        assert session.execute(text("SELECT 1 FROM usage WHERE job_id = :id"), {"id": work.job_id}).first()
    assert client.get(f"/v1/models/{name}").status_code == 200
    assert client.delete(f"/v1/models/{name}").json() == {"id": name, "object": "model", "deleted": True}
    tidy()
    assert list(storage.keys(f"a/{project.project_id}/")) == []
    assert client.get(f"/v1/models/{name}").status_code == 404 and client.get("/v1/adapters").json()["data"] == []


def _weights() -> list[FileEntry]:
    return [FileEntry(name="adapter_model.safetensors", bytes=10, sha256=factories.SHA)]


def test_a_base_model_is_not_a_projects_to_delete(client: Any, base_model: str) -> None:
    refused = client.delete(f"/v1/models/{base_model}")
    assert refused.status_code == 404 and refused.json()["error"]["code"] == "model_not_found"


# ---- orphans ------------------------------------------------------------------------------------------------------


def test_objects_without_a_row_go_once_they_are_old(
    project: Tenant, node: FleetNode, storage: Storage, tidy: Any
) -> None:
    work, live = factories.succeeded(project, node), None
    live = factories.running(project, factories.node(node.database))
    _, kept_file = uploaded(project, storage)
    mine = f"a/{project.project_id}"
    orphans = [
        f"u/{project.project_id}/{uuid.uuid4()}",
        f"{mine}/{work.attempt_id}/output/never_recorded",
        f"{mine}/{work.attempt_id}/checkpoints/step-10/optimizer.safetensors",
        f"{mine}/{uuid.uuid4()}/logs/000000000000",
        f"{mine}/{uuid.uuid4()}/datasets/{factories.SHA}",
    ]
    kept = [
        kept_file,
        f"{mine}/{work.attempt_id}/output/adapter_model.safetensors",
        f"{mine}/{work.attempt_id}/logs/000000000000",
        f"{mine}/{live.attempt_id}/checkpoints/step-10/optimizer.safetensors",
        f"{mine}/{live.attempt_id}/output/adapter_model.safetensors",
        f"{mine}/cache/of/somebody",
        f"u/{uuid.uuid4()}/{uuid.uuid4()}",  # of a project that is not in this database
        f"a/base/{uuid.uuid4()}/7/model.safetensors",
        "a/strange",
    ]
    for key in orphans + kept:
        storage.put_bytes(key, b"x")
    everything = lambda: {key for prefix in ("u/", "a/") for key in storage.keys(prefix)}  # noqa: E731
    tidy()
    assert everything() >= {*orphans, *kept}
    tidy(orphan_age_s=0)
    assert everything() & set(orphans) == set()
    assert everything() >= set(kept)
    storage.delete_all(kept)


def test_an_upload_in_parts_that_nobody_finished_is_ended(project: Tenant, servers: Servers, tidy: Any) -> None:
    s3 = servers.s3_root
    client = boto3.client(
        "s3",
        endpoint_url=s3.endpoint_url,
        region_name=s3.region,
        aws_access_key_id=s3.access_key_id,
        aws_secret_access_key=s3.secret_access_key,
    )
    key = f"u/{project.project_id}/{uuid.uuid4()}"
    begun = client.create_multipart_upload(Bucket=s3.bucket, Key=key)["UploadId"]
    client.upload_part(Bucket=s3.bucket, Key=key, UploadId=begun, PartNumber=1, Body=b"x" * 1000)

    def open_uploads() -> list[str]:
        return [one["UploadId"] for one in client.list_multipart_uploads(Bucket=s3.bucket).get("Uploads", [])]

    tidy()
    assert begun in open_uploads()
    tidy(orphan_age_s=0)
    assert begun not in open_uploads()


# ---- who may, and when --------------------------------------------------------------------------------------------


def test_the_brooms_identity_is_not_root(broom: Storage) -> None:
    with pytest.raises(Unavailable):
        broom.put_bytes("elsewhere", b"forged")


def test_a_deposed_scheduler_deletes_nothing(
    project: Tenant, storage: Storage, scheduler: Sessions, broom: Storage, epoch: int
) -> None:
    file_id, key = uploaded(project, storage)
    with project.transaction() as session:
        files.delete(session, project.project_id, file_id)
    with pytest.raises(Deposed):
        Tidy(scheduler, broom, Retention()).run(epoch + 1)
    assert storage.get_bytes(key) == b"{}"


@pytest.fixture
def backup(database: Database) -> Iterator[psycopg.Connection]:
    with psycopg.connect(database.url("tunery_backup"), autocommit=True) as connection:
        yield connection
        connection.execute("SELECT release_deletions('b')")


def test_while_a_backup_runs_nothing_is_deleted_from_the_store(
    project: Tenant, storage: Storage, tidy: Any, backup: psycopg.Connection
) -> None:
    file_id, key = uploaded(project, storage)
    storage.put_bytes(orphan := f"u/{project.project_id}/{uuid.uuid4()}", b"x")
    assert backup.execute("SELECT hold_deletions('b', 60)").fetchone() == (True,)
    with project.transaction() as session:
        files.delete(session, project.project_id, file_id)
    tidy(orphan_age_s=0)
    assert storage.get_bytes(key) and storage.get_bytes(orphan)
    backup.execute("SELECT release_deletions('b')")
    tidy(orphan_age_s=0)
    assert not storage.get_bytes(key) and not storage.get_bytes(orphan)


def test_a_hold_that_ran_out_holds_nothing_and_is_known_to_have_been_broken(
    scheduler: Sessions, backup: psycopg.Connection
) -> None:
    backup.execute("SELECT hold_deletions('b', 0.05)")
    backup.execute("SELECT pg_sleep(0.1)")
    with transaction(scheduler) as session:
        assert not trash.held(session)
    assert backup.execute("SELECT hold_deletions('b', 60)").fetchone() == (False,)
    assert backup.execute("SELECT hold_deletions('b', 60)").fetchone() == (True,)
    with transaction(scheduler) as session:
        assert trash.held(session)
        held_until = session.execute(text("SELECT max(expires_at) FROM deletion_holds")).scalar_one()
    assert held_until < datetime.now(UTC) + timedelta(hours=1)


def test_what_a_hold_comes_too_late_for_is_not_read_twice(scheduler: Sessions, project: Tenant) -> None:
    with project.transaction() as session:
        trash.add(session, project.project_id, ["u/x", "a/y/"])
    with transaction(scheduler) as session:
        mine = [entry for entry in trash.batch(session, 1000) if entry[1] in ("u/x", "a/y/")]
        assert [key for _, key in mine] == ["u/x", "a/y/"]
        trash.done(session, [number for number, _ in mine])
    with transaction(scheduler) as session:
        assert not set(session.scalars(select(ObjectDeletion.key))) & {"u/x", "a/y/"}


def test_rows_recorded_while_the_sweep_asks_are_kept(project: Tenant, node: FleetNode, scheduler: Sessions) -> None:
    """A data check that ends between the sweep's two questions has recorded its dataset by then."""
    work = factories.submitted(project, node)
    key = ""

    def finish(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        nonlocal key
        if key and ("FROM datasets" in statement or "FROM tasks" in statement):
            done, key = key, ""
            with factories.owner(project.database) as session, session.begin():
                session.add(
                    Dataset(
                        project_id=project.project_id, source_sha256="s", checker="1", sha256=factories.SHA,
                        object_key=done, bytes=1, rows=1, shape="messages", max_row_bytes=1,
                    )
                )  # fmt: skip
                ended = {"state": "succeeded", "lease_expires_at": None}
                session.execute(update(Task).where(Task.job_id == work.job_id).values(ended))

    with factories.owner(project.database) as session:
        task = session.scalars(select(Task.id).where(Task.job_id == work.job_id)).one()
    asked = key = f"a/{project.project_id}/{task}/datasets/{factories.SHA}"
    engine = scheduler.kw["bind"]
    event.listen(engine, "after_cursor_execute", finish)
    try:
        with transaction(scheduler) as session:
            assert orphans.unreferenced(session, [asked]) == []
    finally:
        event.remove(engine, "after_cursor_execute", finish)
    assert key == ""
