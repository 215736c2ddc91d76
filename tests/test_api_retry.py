"""F15: a request whose transaction lost a race is run again, and its caller does not notice."""

import threading
import time
from collections.abc import Callable, Iterator

import httpx
import psycopg
import pytest

from tests import factories
from tests.factories import Database, FleetNode, Tenant
from tunery import ids
from tunery.embedded.servers import Servers


@pytest.fixture(autouse=True)
def _catalogue(base_model: str) -> None:
    """Every job here is on this model."""


@pytest.fixture
def root(servers: Servers, database: Database) -> Iterator[psycopg.Connection]:
    url = servers.admin_url.rpartition("/")[0] + f"/{database.name}"
    with psycopg.connect(url, autocommit=True) as connection:
        yield connection


@pytest.fixture
def losing(root: psycopg.Connection) -> Iterator[Callable[[int, str], None]]:
    """The next so many new jobs are refused by Postgres with this SQLSTATE, after everything else was written."""

    def lose(times: int, state: str) -> None:
        root.execute(f"CREATE SEQUENCE races MAXVALUE 1000 START {1000 - times}")  # a rollback does not undo it
        root.execute("GRANT USAGE ON SEQUENCE races TO tunery_api")
        root.execute(
            "CREATE FUNCTION lose() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN IF nextval('races') < 1000 THEN "
            f"RAISE 'lost' USING ERRCODE = '{state}'; END IF; RETURN NULL; END $$"
        )
        root.execute(
            "CREATE CONSTRAINT TRIGGER lose AFTER INSERT ON jobs DEFERRABLE INITIALLY DEFERRED "
            "FOR EACH ROW EXECUTE FUNCTION lose()"
        )

    yield lose
    root.execute("DROP FUNCTION lose() CASCADE")
    root.execute("DROP SEQUENCE races")


def new_job(client: httpx.Client, project: Tenant) -> httpx.Response:
    return client.post("/v1/fine_tuning/jobs", json={"model": "tiny", "training_file": factories.file(project)})


@pytest.mark.parametrize("state", ["40001", "40P01"])
def test_a_commit_that_lost_three_races_is_not_noticed(
    losing: Callable[[int, str], None], client: httpx.Client, project: Tenant, state: str
) -> None:
    losing(3, state)
    made = new_job(client, project)
    assert made.status_code == 200, made.text
    assert [job["id"] for job in client.get("/v1/fine_tuning/jobs").json()["data"]] == [made.json()["id"]]


@pytest.mark.parametrize(("times", "state"), [(4, "40001"), (1, "55P03")])
def test_four_lost_races_and_any_other_trouble_are_a_503(
    losing: Callable[[int, str], None], client: httpx.Client, project: Tenant, times: int, state: str
) -> None:
    losing(times, state)
    refused = new_job(client, project)
    assert refused.status_code == 503 and "retry-after" in refused.headers
    assert refused.headers["x-request-id"] == refused.json()["error"]["request_id"]
    assert client.get("/v1/fine_tuning/jobs").json()["data"] == []


def test_a_cancel_that_lost_a_deadlock_cancels(
    root: psycopg.Connection, client: httpx.Client, project: Tenant, node: FleetNode
) -> None:
    """Somebody locks the attempt before its job, the wrong way round, and is too patient to be the one who loses."""
    work = factories.running(project, node)
    root.execute("SET deadlock_timeout = '30s'")
    before = deadlocks(root)
    answers: list[httpx.Response] = []
    path = f"/v1/fine_tuning/jobs/{ids.encode(ids.JOB, work.job_id)}/cancel"
    request = threading.Thread(target=lambda: answers.append(client.post(path)))
    with root.transaction():
        root.execute("SELECT 1 FROM attempts WHERE id = %s FOR UPDATE", [work.attempt_id])
        request.start()
        while not waiting(root):
            time.sleep(0.01)
        root.execute("SELECT 1 FROM jobs WHERE id = %s FOR UPDATE", [work.job_id])
    request.join(20)
    assert [answer.status_code for answer in answers] == [200], answers[0].text
    assert factories.look(work).state == "cancelling"
    deadline = time.monotonic() + 10
    while deadlocks(root) == before and time.monotonic() < deadline:
        time.sleep(0.1)
    assert deadlocks(root) == before + 1


def waiting(root: psycopg.Connection) -> bool:
    query = "SELECT count(*) FROM pg_locks l JOIN pg_stat_activity a USING (pid) WHERE NOT granted AND usename = %s"
    return root.execute(query, ["tunery_api"]).fetchone() != (0,)


def deadlocks(root: psycopg.Connection) -> int:
    query = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
    return root.execute(query).fetchone()[0]  # type: ignore[index]
