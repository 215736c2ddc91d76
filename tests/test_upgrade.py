"""From the last release to this tree: its filled database migrates, and its node works on the new schema.

The order of an upgrade is `docs/upgrade.md`: schema first, then api and scheduler, then the nodes, one by one.
"""

import json
import os
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
from alembic.config import Config
from alembic.script import ScriptDirectory
from psycopg import sql

from api.main import create_app
from tests import releases
from tests.conftest import PEPPER, serving, settings_of
from tests.fleet import Fleet, fleet
from tests.servers import database_url, passwords, servers
from tunery import adapters, bootstrap, leases
from tunery.contracts.spec import Recipe
from tunery.db import for_project, make_engine, make_sessions, transaction
from tunery.models import Node
from tunery.storage import Storage

ROOT = Path(__file__).parents[1]
NEVER_FILLED = {"engines", "members"}
"""Tables that no service of the last release writes."""


@dataclass
class Filled:
    """A database of the last release with two projects, and what the owner saw in it before it was migrated."""

    name: str
    projects: list[dict[str, Any]]
    before: dict[str, tuple[int, str]] = field(default_factory=dict)
    columns: dict[str, list[str]] = field(default_factory=dict)

    def url(self, role: str) -> str:
        return database_url(role, self.name)

    def as_owner(self) -> psycopg.Connection:
        connection = psycopg.connect(self.url("tunery_migrate"), autocommit=True)
        connection.execute("SET ROLE tunery_owner")
        return connection

    def tables(self) -> dict[str, list[str]]:
        """Every table's columns, in order."""
        query = (
            "SELECT table_name, array_agg(column_name::text ORDER BY ordinal_position) FROM information_schema.columns "
            "JOIN information_schema.tables USING (table_schema, table_name) "
            "WHERE table_schema = 'public' AND table_type = 'BASE TABLE' AND table_name <> 'alembic_version' GROUP BY 1"
        )
        with self.as_owner() as connection:
            return dict(connection.execute(query).fetchall())

    def digest(self, table: str, columns: list[str]) -> tuple[int, str]:
        """Rows, and a hash of all that these columns hold."""
        named = sql.SQL(", ").join(map(sql.Identifier, columns))
        query = sql.SQL("SELECT count(*), md5(string_agg(r::text, '|' ORDER BY r::text)) FROM (SELECT {} FROM {}) r")
        with self.as_owner() as connection:
            row = connection.execute(query.format(named, sql.Identifier(table))).fetchone()
        assert row
        return row[0], row[1]


@pytest.fixture(scope="module")
def release() -> releases.Release:
    return releases.newest()


@pytest.fixture(scope="module")
def old_tree(release: releases.Release, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return releases.extract(release, tmp_path_factory.mktemp("release"))


def run_old(old_tree: Path, *arguments: str, stdin: str = "") -> str:
    """A program of this tree on the last release's modules."""
    done = subprocess.run(
        [sys.executable, "-P", *arguments],
        input=stdin,
        env={**os.environ, "PYTHONPATH": str(old_tree)},
        cwd=old_tree,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def filled(old_tree: Path) -> Iterator[Filled]:
    """Still at the last release's schema."""
    name = f"up_{uuid.uuid4().hex[:12]}"
    given = {"admin_url": servers().admin_url, "passwords": passwords(), "database": name, "pepper": PEPPER}
    said = run_old(old_tree, str(ROOT / "tests/upgrade_fill.py"), str(ROOT), stdin=json.dumps(given))
    made = Filled(name, json.loads(said))
    made.columns = made.tables()
    made.before = {table: made.digest(table, columns) for table, columns in made.columns.items()}
    yield made
    _drop(name)


@pytest.fixture(scope="module")
def copy(filled: Filled) -> Iterator[Filled]:
    """Another database at the last release's schema; asked for before `upgraded` is."""
    name = f"{filled.name}_copy"
    with psycopg.connect(servers().admin_url, autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(*map(sql.Identifier, (name, filled.name))))
    bootstrap.create_roles(servers().admin_url, passwords(), name)
    yield Filled(name, filled.projects)
    _drop(name)


@pytest.fixture(scope="module")
def upgraded(copy: Filled, filled: Filled) -> Filled:
    """As `tunery up` and `tunery db init` do it: roles and grants again, then migrations as `tunery_migrate`."""
    bootstrap.create_roles(servers().admin_url, passwords(), filled.name)
    bootstrap.migrate(filled.url("tunery_migrate"))
    return filled


def _drop(name: str) -> None:
    with psycopg.connect(servers().admin_url, autocommit=True) as connection:
        connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


def head() -> str:
    config = Config()
    config.set_main_option("script_location", str(ROOT / "migrations"))
    return ScriptDirectory.from_config(config).get_current_head() or ""


# ---- the schema ------------------------------------------------------------------------------------------------------


def test_every_table_of_the_last_release_was_filled(filled: Filled) -> None:
    empty = {table for table, (rows, _) in filled.before.items() if not rows}
    assert empty == NEVER_FILLED


def test_every_row_of_the_last_release_is_still_there_as_it_was(upgraded: Filled) -> None:
    assert bootstrap.schema_version(upgraded.url("tunery_migrate")) == head()
    now = {table: upgraded.digest(table, columns) for table, columns in upgraded.columns.items()}
    assert now == upgraded.before


def test_migrations_need_no_power_over_the_server(upgraded: Filled) -> None:
    query = "SELECT rolsuper, rolbypassrls, rolcreaterole, rolcreatedb FROM pg_roles WHERE rolname = ANY(%s)"
    with upgraded.as_owner() as connection:
        powers = connection.execute(query, [["tunery_migrate", "tunery_owner"]]).fetchall()
    assert powers == [(False, False, False, False)] * 2


def test_every_constraint_holds_for_the_old_rows_too(upgraded: Filled) -> None:
    """What a migration adds NOT VALID, it validates in a later step."""
    with upgraded.as_owner() as connection:
        open_ends = connection.execute("SELECT conname FROM pg_constraint WHERE NOT convalidated").fetchall()
        broken = connection.execute("SELECT indexrelid::regclass FROM pg_index WHERE NOT indisvalid").fetchall()
    assert (open_ends, broken) == ([], [])


def test_a_migration_waits_for_a_busy_table_and_holds_up_no_writer(copy: Filled) -> None:
    """Something reads all night. The migration lets go again and again; whoever writes meanwhile gets through."""
    reader = copy.as_owner()
    reader.execute("BEGIN")
    tables = [*copy.tables(), "alembic_version"]
    reader.execute(sql.SQL("LOCK TABLE {} IN ROW SHARE MODE").format(sql.SQL(", ").join(map(sql.Identifier, tables))))
    reader.execute("LOCK TABLE alembic_version IN ACCESS EXCLUSIVE MODE")  # so that every migration has to wait
    failed: list[BaseException] = []

    def migrate() -> None:
        try:
            bootstrap.migrate(copy.url("tunery_migrate"))
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=migrate)
    thread.start()
    with copy.as_owner() as writer:
        writer.execute("SET lock_timeout = '3s'")
        for _ in range(25):
            writer.execute("UPDATE nodes SET last_seen_at = now()")
            writer.execute("UPDATE jobs SET event_seq = event_seq")
            thread.join(0.06)
    assert thread.is_alive(), "it must not get past the reader"
    reader.execute("COMMIT")
    reader.close()
    thread.join(60)
    assert not failed
    assert bootstrap.schema_version(copy.url("tunery_migrate")) == head()


# ---- the rows, through the new programs ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def api(upgraded: Filled) -> Iterator[str]:
    settings = settings_of(servers(), upgraded.url("tunery_api"))
    engine = make_engine(upgraded.url("tunery_api"))
    with serving(create_app(make_sessions(engine), Storage(settings), settings)) as url:
        yield url
    engine.dispose()


def client_of(api: str, project: dict[str, Any]) -> httpx.Client:
    headers = {"authorization": f"Bearer {project['key']}"}
    return httpx.Client(base_url=f"{api}/v1", headers=headers, timeout=20, trust_env=False)


def test_an_old_key_reads_all_its_old_jobs_and_no_one_elses(upgraded: Filled, api: str) -> None:
    mine, other = upgraded.projects
    with client_of(api, mine) as client:
        listed = client.get("/fine_tuning/jobs", params={"limit": 100}).json()["data"]
        assert {job["id"]: job["tunery"]["state"] for job in listed} == {
            id_: state for state, id_ in mine["jobs"].items()
        }
        kept = mine["jobs"]["succeeded"]
        events = client.get(f"/fine_tuning/jobs/{kept}/events", params={"limit": 100}).json()["data"]
        assert sum(event["type"] == "metrics" for event in events) == 10
        assert client.get(f"/fine_tuning/jobs/{kept}/checkpoints").json()["data"][0]["step_number"] == 10
        assert len(client.get("/files", params={"limit": 100}).json()["data"]) == len(mine["jobs"])
        assert [adapter["name"] for adapter in client.get("/adapters").json()["data"]].count("kept") == 1
        assert client.get(f"/fine_tuning/jobs/{other['jobs']['succeeded']}").status_code == 404


def test_old_jobs_that_have_not_ended_can_be_cancelled(upgraded: Filled, api: str) -> None:
    ends = {"validating": "cancelled", "queued": "cancelled", "paused": "cancelled"}
    ends |= dict.fromkeys(("starting", "running", "pausing", "cancelling"), "cancelling")
    jobs = upgraded.projects[1]["jobs"]
    with client_of(api, upgraded.projects[1]) as client:
        after = {state: client.post(f"/fine_tuning/jobs/{jobs[state]}/cancel").json() for state in ends}
        assert {state: job["tunery"]["state"] for state, job in after.items()} == ends
        assert client.post(f"/fine_tuning/jobs/{jobs['succeeded']}/cancel").status_code == 409


# ---- an old node on the new schema -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rolling(old_tree: Path) -> Iterator[Fleet]:
    """Schema, api service and scheduler are new; the node, its supervisors and its trainer are the last release's."""
    with fleet() as started:
        started.scheduler()
        started.node(tree=old_tree)
        yield started


def test_the_last_releases_node_finishes_a_job_on_this_schema(rolling: Fleet, release: releases.Release) -> None:
    job_id = rolling.submit("ok")
    assert rolling.ends(job_id) == "succeeded"
    (version,) = rolling.versions(job_id)
    stored = rolling.storage.get_bytes(f"{version.object_prefix}/{adapters.WEIGHTS}") or b""
    assert stored.startswith(b"weights of ftjob-")
    assert rolling.steps_trained(job_id) == [(1, list(range(1, 21)))]
    with rolling.look() as session:
        assert session.query(Node).one().version == release.version
    rolling.until(rolling.nothing_held, 5)
    rolling.until(rolling.nothing_left, 5)


def test_the_last_releases_node_resumes_and_obeys_on_this_schema(rolling: Fleet) -> None:
    crashed, cancelled = rolling.submit("crash-25", steps=30), rolling.submit("slow", steps=1000)
    assert rolling.ends(crashed) == "succeeded"
    assert [attempt.start_step for attempt in rolling.attempts(crashed)] == [0, 20]
    rolling.until(lambda: rolling.step(cancelled) > 1)
    with transaction(lambda: for_project(rolling.api, rolling.project_id)) as session:
        leases.cancel(session, rolling.project_id, cancelled)
    assert rolling.ends(cancelled, 15) == "cancelled"
    rolling.until(rolling.nothing_held, 5)


def test_a_trainer_of_another_release_is_refused_by_name() -> None:
    """A node whose files were exchanged under it starts the new trainer from the old process."""
    with fleet() as running:
        running.scheduler()
        running.node()
        job_id = running.submit("other-release")
        assert running.ends(job_id) == "failed"
        assert len(running.attempts(job_id)) == 3, "it is the platform's fault, so it is tried again"
        said = running.attempts(job_id)[0].failure_message or ""
        assert "speaks version 2 of the protocol, this node version 1" in said


def test_the_last_releases_node_reads_the_recipes_that_a_new_one_writes(old_tree: Path) -> None:
    """Any node may check a job's rows and resolve its recipe, and any other then trains it."""
    read = "import sys; from tunery.contracts.spec import Recipe; print(Recipe.model_validate_json(sys.stdin.read()))"
    assert "lora" in run_old(old_tree, "-c", read, stdin=Recipe().model_dump_json())
