"""Backups of a deployment at work, and what becomes of one in a new home and on servers given by URL."""

import hashlib
import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import httpx
import psycopg
import pytest
from pydantic import SecretStr
from sqlalchemy import text

from tests import factories
from tests import servers as embedded
from tests.factories import Database, FleetNode, Tenant
from tests.fleet import CARD, CLOCKS, ROWS
from tunery import bootstrap
from tunery.backup import make
from tunery.backup.folder import Entry, Folder, is_whole
from tunery.contracts.events import FileEntry
from tunery.embedded import ports
from tunery.embedded.servers import Servers
from tunery.references import Reference
from tunery.settings import StorageSettings
from tunery.storage import Storage

ROOT = Path(__file__).parent.parent


def run(*arguments: str | Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    """`tunery ...` with nothing of the caller's own deployment."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("TUNERY_")}
    return subprocess.run(
        [sys.executable, "-m", "tunery.cli", *map(str, arguments)],
        env=clean | {"PYTHONPATH": str(ROOT)} | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


def eventually(check: Callable[[], Any], timeout_s: float = 60) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (found := check()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return found


# ---- a whole deployment, moved to another home --------------------------------------------------------------------


class Deployment:
    """`tunery up` with a trainer that needs no torch."""

    def __init__(self) -> None:
        self.home = embedded.temporary_home()
        clocks = {f"TUNERY_{name}": value for name, value in CLOCKS.items()}
        self.environment = clocks | {
            "TUNERY_HOME": str(self.home.root),
            "TUNERY_TRAINER_MODULE": "tests.fake_trainer",
            "TUNERY_API_PORT": str(ports.choose(set())),
        }

    def tunery(self, *arguments: str | Path, code: int = 0) -> str:
        done = run(*arguments, **self.environment)
        assert done.returncode == code, done.stderr
        return done.stdout + done.stderr if code else done.stdout

    def up(self) -> httpx.Client:
        self.tunery("up", "-d")
        profile = json.loads(self.home.profile.read_text())
        return self.client(profile["api_key"])

    def client(self, key: str) -> httpx.Client:
        url = json.loads(self.home.profile.read_text())["api_url"]
        return httpx.Client(base_url=url, headers={"authorization": f"Bearer {key}"}, timeout=20, trust_env=False)

    def add_base_model(self) -> None:
        """Without an import: the trainer here reads no model."""
        state, secrets = self.home.state(), self.home.secrets()
        url = f"postgresql://127.0.0.1:{state['ports']['postgres']}/{bootstrap.DATABASE}"
        migrate = bootstrap.url_for(url, "tunery_migrate", secrets.get("role_tunery_migrate"))
        with psycopg.connect(migrate) as connection:
            connection.execute("SET ROLE tunery_owner")
            connection.execute(
                "INSERT INTO base_models (id, name, state, request, card, object_prefix, hub_id, revision, source,"
                " license, parameters) VALUES (%s, 'tiny', 'ready', '{}', %s, 'a/base/x/1', 'example/tiny', %s,"
                " 'test', 'apache-2.0', 1000)",
                [uuid.uuid4(), json.dumps(CARD), "0" * 40],
            )

    def remove(self) -> None:
        run("down", "--purge", "--yes", **self.environment)


@pytest.fixture
def deployment() -> Iterator[Callable[[], Deployment]]:
    made: list[Deployment] = []

    def make() -> Deployment:
        made.append(Deployment())
        return made[-1]

    yield make
    for each in made:
        each.remove()


def submit(client: httpx.Client, suffix: str, steps: int) -> str:
    file = client.post("/v1/files", files={"file": ("r.jsonl", ROWS)}, data={"purpose": "fine-tune"}).json()["id"]
    extension = {"training": {"max_steps": steps, "save_steps": 10}}
    body = {"model": "tiny", "training_file": file, "suffix": suffix, "tunery": extension}
    return client.post("/v1/fine_tuning/jobs", json=body).json()["id"]


def job(client: httpx.Client, job_id: str) -> dict[str, Any]:
    return client.get(f"/v1/fine_tuning/jobs/{job_id}").json()


def weights(client: httpx.Client, name: str) -> str:
    answer = client.get(f"/v1/adapters/{name}/versions/1/files/adapter_model.safetensors")
    assert answer.status_code == 200, answer.text
    return hashlib.sha256(answer.content).hexdigest()


@pytest.mark.slow
def test_a_deployment_at_work_goes_on_in_another_home(deployment: Callable[[], Deployment], tmp_path: Path) -> None:
    """A finished job keeps its adapter, a running one goes on from its checkpoint, and the key opens both."""
    old = deployment()
    client = old.up()
    old.add_base_model()
    finished = submit(client, "ok", 20)
    eventually(lambda: job(client, finished)["status"] == "succeeded")
    running = submit(client, "slow", 150)
    eventually(lambda: client.get(f"/v1/fine_tuning/jobs/{running}/checkpoints").json()["data"])
    old.tunery("backup", tmp_path / "b", "--include-secrets")
    before, key = weights(client, "ok"), client.headers["authorization"].removeprefix("Bearer ")
    assert "is running here" in old.tunery("restore", tmp_path / "b", code=1)
    old.remove()
    assert not old.home.root.exists()

    new = deployment()
    new.tunery("restore", tmp_path / "b")
    new.up()
    client = new.client(key)
    assert weights(client, "ok") == before and job(client, finished)["status"] == "succeeded"
    done = eventually(lambda: found if (found := job(client, running))["status"] == "succeeded" else None)
    first, *others = done["tunery"]["attempts"]
    assert first["state"] == "lost" and others and min(each["start_step"] for each in others) >= 10
    assert weights(client, "slow")
    new.tunery("down")
    assert "not empty" in new.tunery("restore", tmp_path / "b", code=1)
    assert new.tunery("backup", tmp_path / "again").strip() == str(tmp_path / "again")  # of one that does not run


# ---- servers given by URL -----------------------------------------------------------------------------------------


class Elsewhere:
    """The session's servers as somebody else's: a database, a bucket, and the file of `tunery db init`."""

    def __init__(self, servers: Servers, database: str, folder: Path) -> None:
        self.servers, self.database, self.folder = servers, database, folder
        self.bucket = f"b-{uuid.uuid4().hex[:12]}"
        s3 = servers.s3_root
        self._root = boto3.client(
            "s3",
            endpoint_url=s3.endpoint_url,
            region_name=s3.region,
            aws_access_key_id=s3.access_key_id,
            aws_secret_access_key=s3.secret_access_key,
        )
        self._root.create_bucket(Bucket=self.bucket)
        self.storage = Storage(
            StorageSettings(
                s3_endpoint_url=s3.endpoint_url,
                s3_bucket=self.bucket,
                s3_access_key_id=SecretStr(s3.access_key_id),
                s3_secret_access_key=SecretStr(s3.secret_access_key),
            )
        )
        self.env_file = folder / f"{database}.env"
        # the session's own passwords: another test's roles must not change under it
        own = {f"{role.upper()}_PASSWORD": password for role, password in embedded.passwords().items()}
        self.env_file.write_text("".join(f"{name}='{value}'\n" for name, value in own.items()))

    def environment(self) -> dict[str, str]:
        admin = bootstrap.url_for(self.servers.admin_url, database=self.database)
        return {
            **self.servers.s3_root.environment(),
            "TUNERY_S3_BUCKET": self.bucket,
            "TUNERY_BACKUP_DATABASE_URL": embedded.database_url("tunery_backup", self.database),
            "TUNERY_ADMIN_DATABASE_URL": admin,
        }

    def backup(self, *options: str, **more: str) -> "subprocess.CompletedProcess[str]":
        return run("backup", self.folder / "b", *options, **self.environment(), **more)

    def restore(self, folder: Path, **more: str) -> "subprocess.CompletedProcess[str]":
        return run("restore", folder, "--env-file", self.env_file, **self.environment(), **more)

    def rows(self, query: str) -> list[Any]:
        with psycopg.connect(bootstrap.url_for(self.servers.admin_url, database=self.database)) as connection:
            return connection.execute(query.encode()).fetchall()


@pytest.fixture
def elsewhere(servers: Servers, tmp_path: Path) -> Iterator[Callable[..., Elsewhere]]:
    made: list[str] = []

    def make(database: str | None = None) -> Elsewhere:
        if database is None:
            made.append(database := f"t_{uuid.uuid4().hex[:12]}")
        return Elsewhere(servers, database, tmp_path)

    yield make
    for database in made:
        with psycopg.connect(servers.admin_url, autocommit=True) as connection:
            connection.execute(f"DROP DATABASE IF EXISTS {database} WITH (FORCE)".encode())


def stored(storage: Storage, key: str, data: bytes) -> FileEntry:
    storage.put_bytes(key, data)
    return FileEntry(name=key.rsplit("/", 1)[-1], bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def fill(storage: Storage, project: Tenant, node: FleetNode) -> factories.Work:
    """Rows whose objects are all there, and one object that no row knows; a job that has published."""
    work = factories.running(project, node)
    output = f"a/{project.project_id}/{work.attempt_id}/output"
    factories.publish(work, [stored(storage, f"{output}/adapter_model.safetensors", b"weights")])
    stored(storage, f"a/{project.project_id}/{work.attempt_id}/output/stray", b"?")
    for digit in (0, 5):
        stored(storage, f"a/{project.project_id}/{work.attempt_id}/logs/{digit:012d}", b"12345")
    with factories.owner(project.database) as session, session.begin():
        session.execute(text("UPDATE attempts SET log_bytes = 10 WHERE id = :id"), {"id": work.attempt_id})
    fill_missing(storage, project)
    return work


def test_a_backup_restores_to_other_servers_row_for_row(
    database: Database, project: Tenant, base_model: str, elsewhere: Callable[..., Elsewhere]
) -> None:
    old, new = elsewhere(database.name), elsewhere()
    work = fill(old.storage, project, factories.node(database))
    running = factories.running(project, factories.node(database))
    cancelling = factories.cancelling(project, factories.node(database))
    fill_missing(old.storage, project)

    done = old.backup(TUNERY_KEY_PEPPER="p")
    assert done.returncode == 0, done.stderr
    folder = old.folder / "b"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert folder.stat().st_mode & 0o777 == 0o700 and not (folder / "secrets.json").exists()
    assert not [key for key in manifest["objects"] if key.endswith("stray")]
    assert len([key for key in manifest["objects"] if "/logs/" in key]) == 2
    assert old.rows("SELECT count(*) FROM deletion_holds") == [(0,)]

    # again into the same folder: what is there and whole stays as it is, what is not is mended
    keys = sorted(manifest["objects"])
    (folder / "objects" / keys[0]).write_bytes(b"damaged")
    untouched = (folder / "objects" / keys[1]).stat().st_mtime_ns
    assert "damaged" in new.restore(folder, TUNERY_KEY_PEPPER="p").stderr
    assert old.backup(TUNERY_KEY_PEPPER="p").returncode == 0
    assert (folder / "objects" / keys[1]).stat().st_mtime_ns == untouched
    assert len(list(folder.glob("database-*"))) == 1

    assert "not the one of this backup" in new.restore(folder, TUNERY_KEY_PEPPER="q").stderr
    fence_before = old.rows("SELECT last_value FROM fence_seq")[0][0]
    done = new.restore(folder, TUNERY_KEY_PEPPER="p")
    assert done.returncode == 0, done.stderr
    assert "TUNERY_KEY_PEPPER='p'" in new.env_file.read_text()
    for table in ("organizations", "api_keys", "files", "datasets", "adapter_versions", "checkpoints", "metric_chunks"):
        query = f"SELECT to_jsonb(t) FROM {table} t ORDER BY t::text"
        found = new.rows(query)
        assert [row for row in old.rows(query) if row not in found] == [], table
    for key, entry in manifest["objects"].items():
        assert hashlib.sha256(new.storage.get_bytes(key) or b"").hexdigest() == entry["sha256"], key

    states = dict(new.rows("SELECT id, state FROM jobs"))
    assert [states[each.job_id] for each in (work, running, cancelling)] == ["succeeded", "queued", "cancelled"]
    assert new.rows("SELECT DISTINCT state FROM attempts WHERE ended_at IS NULL") == []
    assert new.rows("SELECT count(*) FROM nodes WHERE removed_at IS NULL") == [(0,)]
    assert new.rows("SELECT count(*) FROM usage") == old.rows("SELECT count(*) FROM usage")
    assert new.rows("SELECT last_value FROM fence_seq")[0][0] >= fence_before + 1_000_000
    assert new.rows("SELECT count(*) FROM gpus WHERE reserved_bytes > 0") == [(0,)]
    policies = "SELECT tablename, policyname, qual FROM pg_policies ORDER BY 1, 2"
    owners = "SELECT proname, pg_get_userbyid(proowner) FROM pg_proc WHERE pronamespace = 'public'::regnamespace"
    assert new.rows(policies) == old.rows(policies) and sorted(new.rows(owners)) == sorted(old.rows(owners))
    assert "not empty" in new.restore(folder, TUNERY_KEY_PEPPER="p").stderr


def fill_missing(storage: Storage, project: Tenant) -> None:
    """Objects of rows that tests make without any."""
    with factories.owner(project.database) as session, session.begin():
        session.execute(text("UPDATE base_models SET card = jsonb_set(card, '{files}', '[]')"))
        for table in ("files", "datasets"):
            for row in session.execute(text(f"SELECT id, object_key FROM {table}")).all():
                made = stored(storage, row.object_key, row.object_key.encode())
                values = {"id": row.id, "bytes": made.bytes, "sha": made.sha256}
                session.execute(text(f"UPDATE {table} SET bytes = :bytes, sha256 = :sha WHERE id = :id"), values)


def test_what_the_store_has_lost_is_named_and_the_rest_is_kept(
    database: Database, project: Tenant, base_model: str, elsewhere: Callable[..., Elsewhere]
) -> None:
    old = elsewhere(database.name)
    work = fill(old.storage, project, factories.node(database))
    lost = f"a/{project.project_id}/{work.attempt_id}/output/adapter_model.safetensors"
    old.storage.delete(lost)
    done = old.backup()
    assert done.returncode == 1 and f"lost {lost}" in done.stderr
    assert json.loads((old.folder / "b/manifest.json").read_text())["lost"].count(lost) == 1


def test_what_is_no_backup_is_refused(elsewhere: Callable[..., Elsewhere], tmp_path: Path, database: Database) -> None:
    new, folder = elsewhere(), tmp_path / "f"
    assert "holds no backup" in new.restore(folder).stderr
    folder.mkdir()
    (folder / "manifest.json").write_text("{")
    assert "is damaged" in new.restore(folder).stderr
    (folder / "manifest.json").write_text('{"format": 9, "tunery": "7.0"}')
    assert "another release" in new.restore(folder).stderr
    known = {"format": 1, "id": "x", "created_at": "", "tunery": "7.0", "postgres": 18, "dump": "d", "dump_sha256": ""}
    (folder / "manifest.json").write_text(json.dumps(known | {"schema": "zz", "counts": {}, "objects": {}}))
    assert "newer release" in new.restore(folder).stderr
    mine = tmp_path / "b"
    mine.mkdir()
    (mine / "photo.jpg").touch()
    refused = elsewhere(database.name).backup()
    assert refused.returncode == 1 and "holds other things" in refused.stderr


def test_a_size_that_a_row_has_wrong_damages_no_backup(storage: Storage, tmp_path: Path) -> None:
    """A trainer named it; restoring would otherwise refuse everybody's data."""
    key, folder = "a/of/a/liar", Folder(tmp_path)
    said = stored(storage, key, b"weights")
    for _ in range(2):
        found, lost = make._copy(storage, folder, Reference(key, 10**9, said.sha256))
        assert (found, lost) == ({key: Entry(7, said.sha256)}, [])
        assert is_whole(folder.place(key), found[key])
