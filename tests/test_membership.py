"""Machines that join: one-time tokens, credentials that open one node's rows and queue, and removal at once."""

import hashlib
import socket
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
import structlog.testing
from pydantic import SecretStr
from redis import Redis
from redis.exceptions import AuthenticationError, NoPermissionError, ResponseError
from sqlalchemy import text

from api.main import create_app
from tests import factories
from tests.conftest import settings_of
from tests.factories import Database, FleetNode, Tenant
from tunery import __version__, ids, membership, node_logins, redis_acl
from tunery.db import transaction
from tunery.dispatch import Doorbell, queue_name
from tunery.dispatch import connect as redis_at
from tunery.embedded.servers import Servers
from tunery.settings import ApiSettings
from tunery.storage import Storage

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def settings(servers: Servers, database: Database) -> ApiSettings:
    node = servers.s3_node
    return settings_of(
        servers,
        database.url("tunery_api"),
        node_s3_access_key_id=SecretStr(node.access_key_id),
        node_s3_secret_access_key=SecretStr(node.secret_access_key),
    )


@pytest.fixture(scope="module")
def redis(servers: Servers) -> Redis:
    return redis_at(servers.redis_url)


@pytest.fixture
def token(client: httpx.Client) -> str:
    return make_token(client)


def make_token(client: httpx.Client) -> str:
    made = client.post("/v1/nodes/tokens", json={})
    assert made.status_code == 201, made.text
    return made.json()["token"]


def join(client: httpx.Client, token: str, name: str = "", **more: Any) -> httpx.Response:
    body = {"name": name or f"n-{uuid.uuid4().hex[:8]}", "version": __version__} | more
    return client.post("/v1/nodes/join", json=body, headers={"authorization": f"Bearer {token}"})


class Joined:
    def __init__(self, client: httpx.Client, token: str) -> None:
        answer = join(client, token)
        assert answer.status_code == 200, answer.text
        self.wire_id, self.name = answer.json()["id"], answer.json()["name"]
        self.environment: dict[str, str] = answer.json()["environment"]
        self.id = ids.decode(ids.NODE, self.wire_id)

    def database(self) -> psycopg.Connection:
        return psycopg.connect(self.environment["TUNERY_DATABASE_URL"], autocommit=True)

    def redis(self) -> Redis:
        return redis_at(self.environment["TUNERY_REDIS_URL"])


@pytest.fixture
def joined(client: httpx.Client, token: str) -> Joined:
    return Joined(client, token)


# ---- tokens -------------------------------------------------------------------------------------------------------


def refused(answer: httpx.Response, status: int, code: str, words: str) -> None:
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (status, code) and words in error["message"] and error["fix"]


def test_a_token_admits_one_node_once(client: httpx.Client, token: str) -> None:
    assert join(client, token, dry_run=True).json()["environment"] == {}
    assert join(client, token).status_code == 200
    refused(join(client, token), 401, "invalid_join_token", "has been used")


def test_of_two_machines_with_one_token_one_gets_in(client: httpx.Client, token: str) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(6) as pool:
        answers = sorted(pool.map(lambda _: join(client, token).status_code, range(6)))
    assert answers == [200, 401, 401, 401, 401, 401]


def test_an_expired_token_is_told_so(client: httpx.Client, token: str, database: Database) -> None:
    with factories.owner(database) as session, session.begin():
        session.execute(text("UPDATE join_tokens SET expires_at = now() WHERE used_at IS NULL"))
    refused(join(client, token), 401, "invalid_join_token", "has expired")


@pytest.mark.parametrize("presented", ["nonsense", "tunery_join_" + "x" * 43, "tunery_join_"])
def test_what_is_no_token_opens_nothing(client: httpx.Client, project: Tenant, presented: str) -> None:
    answer = join(client, presented)
    assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_join_token"
    assert join(client, project.key).status_code == 401  # an API key is not a join token


def test_a_tokens_text_is_kept_nowhere(client: httpx.Client, token: str, database: Database) -> None:
    with factories.owner(database) as session:
        stored = session.execute(text("SELECT token_hmac FROM join_tokens")).scalars().all()
    assert stored and not any(token.encode() in bytes(one) for one in stored)
    assert all(len(bytes(one)) == 32 for one in stored)


def test_only_an_admin_makes_tokens_and_sees_nodes(
    connect: Callable[[Tenant | None], httpx.Client], tenants: Callable[..., Tenant]
) -> None:
    other = connect(tenants("jobs:write", "jobs:read", "models:read"))
    for method, path in (
        ("POST", "/v1/nodes/tokens"),
        ("GET", "/v1/nodes"),
        ("GET", "/v1/nodes/x"),
        ("DELETE", "/v1/nodes/x"),
    ):
        answer = other.request(method, path, json={} if method == "POST" else None)
        assert answer.status_code == 403, (method, path)


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"name": ""}, 400, "invalid_request"),
        ({"name": "a b"}, 400, "invalid_request"),
        ({"name": "../x"}, 400, "invalid_request"),
        ({"name": "x" * 64}, 400, "invalid_request"),
        ({"version": "9.9.9"}, 409, "version_mismatch"),
        ({"version": "x"}, 409, "version_mismatch"),
        ({"surprise": 1}, 400, "invalid_request"),
    ],
)
def test_a_request_that_cannot_be_carried_out_leaves_the_token_good(
    client: httpx.Client, token: str, body: dict[str, Any], status: int, code: str
) -> None:
    answer = client.post(
        "/v1/nodes/join",
        json={"name": "x", "version": __version__} | body,
        headers={"authorization": f"Bearer {token}"},
    )
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert join(client, token).status_code == 200


def test_a_name_is_one_nodes_until_it_is_removed(client: httpx.Client, joined: Joined) -> None:
    again = make_token(client)
    refused(join(client, again, joined.name), 409, "conflict", joined.name)
    assert client.delete(f"/v1/nodes/{joined.name}").status_code == 200
    assert join(client, again, joined.name).status_code == 200


def test_loopback_servers_are_not_told_to_another_machine(settings: ApiSettings) -> None:
    places = membership.places(settings)
    membership.refuse_unreachable(places, from_elsewhere=False)
    with pytest.raises(membership.Conflict) as refusal:
        membership.refuse_unreachable(places, from_elsewhere=True)
    assert "TUNERY_NODE_DATABASE_URL" in (refusal.value.fix or "")
    reachable = settings.model_copy(
        update={
            "node_database_url": SecretStr("postgresql://db.example:5433/tunery?sslmode=require"),
            "node_redis_url": SecretStr("rediss://cache.example"),
            "node_s3_endpoint_url": "https://s3.example",
        }
    )
    membership.refuse_unreachable(membership.places(reachable), from_elsewhere=True)
    assert [place.address for place in membership.places(reachable)] == [
        "db.example:5433", "cache.example:6379", "s3.example:443",
    ]  # fmt: skip


def test_without_an_identity_for_nodes_the_root_key_is_not_handed_out(
    database: Database, storage: Storage, servers: Servers, project: Tenant
) -> None:
    from fastapi.testclient import TestClient

    bare = create_app(database.sessions("tunery_api"), storage, settings_of(servers, database.url("tunery_api")))
    client = TestClient(bare, headers={"authorization": f"Bearer {project.key}"}, client=("127.0.0.1", 1))
    token = make_token(client)  # type: ignore[arg-type]
    refused(join(client, token), 409, "join_not_prepared", "object store identity")  # type: ignore[arg-type]


# ---- what a node's database login opens ---------------------------------------------------------------------------


@pytest.fixture
def theirs(project: Tenant, node: FleetNode, base_model: str) -> factories.Work:
    """A running attempt of another node."""
    return factories.running(project, node)


def test_the_login_is_of_this_node_whatever_it_says(
    joined: Joined, theirs: factories.Work, node: FleetNode, project: Tenant
) -> None:
    with joined.database() as connection:
        for setting, value in (("app.node_id", node.id), ("app.project_id", project.project_id)):
            connection.execute("SELECT set_config(%s, %s, false)", [setting, str(value)])
        assert connection.execute("SELECT app_node(), app_project()").fetchone() == (joined.id, None)
        for table in ("attempts", "jobs", "files", "datasets", "events", "checkpoints", "allocations", "gpus", "slots"):
            assert connection.execute(f"SELECT count(*) FROM {table}".encode()).fetchone() == (0,), table
        assert connection.execute("SELECT id FROM nodes").fetchall() == [(joined.id,)]
        assert connection.execute("SELECT release_attempt(%s)", [theirs.attempt_id]).fetchone() == (False,)
        assert connection.execute("UPDATE attempts SET state = 'failed'").rowcount == 0


def test_a_node_changes_only_base_models_that_it_imports(joined: Joined, database: Database, base_model: str) -> None:
    name = base_model
    change = "UPDATE base_models SET object_prefix = object_prefix WHERE name = %s"
    with joined.database() as connection:
        assert connection.execute("SELECT 1 FROM base_models WHERE name = %s", [name]).rowcount == 1
        assert connection.execute(change, [name]).rowcount == 0
        with factories.owner(database) as session, session.begin():
            task = (
                "INSERT INTO tasks (id, project_id, kind, payload, base_model_id, state, fence, tries, node_id, "
                "lease_expires_at) SELECT gen_random_uuid(), p.id, 'import_base', '{}', b.id, 'leased', 1, 1, :node, "
                "now() FROM base_models b, (SELECT id FROM projects LIMIT 1) p WHERE b.name = :name"
            )
            session.execute(text(task), {"node": joined.id, "name": name})
        assert connection.execute(change, [name]).rowcount == 1


def test_the_shared_login_would_see_those_rows(database: Database, theirs: factories.Work, node: FleetNode) -> None:
    """The test above can fail: a login that is trusted with `app.node_id` does see them."""
    with psycopg.connect(database.url("tunery_worker")) as connection:
        connection.execute("SELECT set_config('app.node_id', %s, false)", [str(node.id)])
        assert connection.execute("SELECT count(*) FROM attempts WHERE id = %s", [theirs.attempt_id]).fetchone() == (1,)


@pytest.mark.parametrize(
    "statement",
    [
        "SELECT * FROM api_keys",
        "SELECT * FROM join_tokens",
        "SELECT * FROM node_credentials",
        "SELECT * FROM projects",
        "SELECT rolpassword FROM pg_authid",
        "SET ROLE tunery_worker",
        "SET SESSION AUTHORIZATION tunery_worker",
        "ALTER ROLE tunery_worker PASSWORD 'x'",
        "GRANT tunery_worker TO tunery_notifier",
        "CREATE TABLE mine (id int)",
        "SELECT create_node_login(gen_random_uuid(), 'x')",
        "SELECT admit_node('', gen_random_uuid(), 'x', 'x', NULL)",
        "SELECT remove_node(gen_random_uuid(), 0)",
        "SELECT find_api_key('x')",
        "DELETE FROM nodes",
        "COPY nodes TO PROGRAM 'id'",
    ],
)
def test_the_login_may_not(joined: Joined, statement: str) -> None:
    with joined.database() as connection, pytest.raises(psycopg.errors.InsufficientPrivilege):
        connection.execute(statement.encode())


def test_the_api_itself_makes_no_login_without_a_token(database: Database) -> None:
    with psycopg.connect(database.url("tunery_api"), autocommit=True) as connection:
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute("SELECT create_node_login(gen_random_uuid(), 'x')")
        made = connection.execute("SELECT admit_node('', gen_random_uuid(), 'x', 'SCRAM', NULL)").fetchone()
        assert made == (False,)


def test_no_password_reaches_sql(database: Database) -> None:
    with psycopg.connect(database.url("tunery_migrate"), autocommit=True) as connection:
        connection.execute("SET ROLE tunery_owner")
        with pytest.raises(psycopg.errors.RaiseException, match="SCRAM verifier"):
            connection.execute("SELECT create_node_login(gen_random_uuid(), 'password')")


# ---- what its Redis user opens ------------------------------------------------------------------------------------


def test_the_ring_worker_needs_no_more_than_its_user_may(joined: Joined, redis: Redis, servers: Servers) -> None:
    """The real RQ worker, rung through the real doorbell; the server's own log of refusals stays empty."""
    import os

    redis.acl_log_reset()
    with tempfile.TemporaryDirectory(prefix="tunery-ring-") as folder:
        bell = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        bell.bind(f"{folder}/bell")
        bell.settimeout(20)
        own = {
            "TUNERY_REDIS_URL": joined.environment["TUNERY_REDIS_URL"],
            "TUNERY_NODE_ID": str(joined.id),
            "TUNERY_NODE_SOCKET": f"{folder}/bell",
            "TUNERY_NODE_PID": str(os.getpid()),
        }
        ring = subprocess.Popen([sys.executable, "-m", "worker.ring"], env=os.environ | own, cwd=ROOT)
        try:
            for what in ("one", "two"):
                Doorbell(redis).ring(joined.id, what)
                assert bell.recv(100) == what.encode()
            assert ring.poll() is None
        finally:
            ring.terminate()
            ring.wait(10)
            bell.close()
    denied = [entry for entry in redis.acl_log() if entry["username"] == redis_acl.user_of(joined.id)]
    assert denied == []


@pytest.mark.parametrize(
    "command",
    [
        ("LPUSH", "{other}", "x"),
        ("LRANGE", "{other}", "0", "-1"),
        ("BLMOVE", "{other}", "{own}", "LEFT", "RIGHT", "1"),
        ("RPUSH", "{own}", "x"),
        ("HGETALL", "rq:job:11111111-1111-7111-8111-111111111111-aa"),
        ("GET", "anything"),
        ("SET", "rq:suspended", "1"),
        ("DEL", "rq:workers"),
        ("SMEMBERS", "rq:workers"),
        ("PUBLISH", "training:done:x", "{{}}"),
        ("SUBSCRIBE", "training:done:x"),
        ("KEYS", "*"),
        ("SCAN", "0"),
        ("FLUSHALL",),
        ("CONFIG", "GET", "*"),
        ("ACL", "LIST"),
        ("EVAL", "return 1", "0"),
        ("MONITOR",),
        ("CLIENT", "LIST"),
        ("SHUTDOWN", "NOSAVE"),
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_its_redis_user_may_not(joined: Joined, command: tuple[str, ...]) -> None:
    names = {"own": f"rq:queue:{queue_name(joined.id)}", "other": f"rq:queue:{queue_name(uuid.uuid4())}"}
    with pytest.raises(NoPermissionError):
        joined.redis().execute_command(*(word.format(**names) for word in command))


def test_a_redis_that_forgot_its_users_is_told_again(joined: Joined, redis: Redis, database: Database) -> None:
    redis_acl.remove(redis, joined.id)
    with pytest.raises(AuthenticationError):
        joined.redis().ping()
    with transaction(database.sessions("tunery_scheduler")) as session:
        wanted, gone = membership.redis_users(session)
    assert joined.id in Doorbell(redis).keep_users(wanted, gone)
    assert joined.redis().ping()
    assert Doorbell(redis).keep_users(wanted, gone) == []


def test_other_peoples_users_stay(redis: Redis) -> None:
    stranger = uuid.uuid4()
    redis_acl.admit(redis, stranger, hashlib.sha256(b"x").hexdigest())
    assert redis_acl.restore(redis, {}, []) == []
    redis_acl.remove(redis, stranger)


# ---- looking and removal ------------------------------------------------------------------------------------------


def test_nodes_are_listed_with_their_devices(client: httpx.Client, joined: Joined, node: FleetNode) -> None:
    page = client.get("/v1/nodes", params={"limit": 1}).json()
    seen = [*page["data"]]
    while page["has_more"]:
        page = client.get("/v1/nodes", params={"limit": 1, "after": page["last_id"]}).json()
        seen += page["data"]
    found = {one["id"]: one for one in seen}
    assert len(found) == len(seen)
    old = found[ids.encode(ids.NODE, node.id)]
    assert (old["joined"], old["state"], len(old["devices"])) == (False, "up", 1)
    assert found[joined.wire_id]["joined"] and found[joined.wire_id]["state"] == "down"
    assert client.get(f"/v1/nodes/{joined.name}").json() == client.get(f"/v1/nodes/{joined.wire_id}").json()
    assert client.get("/v1/nodes/nobody").status_code == 404


def test_a_removed_node_is_cut_off_at_once(client: httpx.Client, joined: Joined, database: Database) -> None:
    connection, redis = joined.database(), joined.redis()
    connection.execute("SELECT 1 FROM nodes")
    connection.execute("SELECT lo_create(0)")  # whatever it made does not keep its role alive
    assert redis.ping()
    assert client.delete(f"/v1/nodes/{joined.wire_id}").json()["deleted"] is True
    with pytest.raises(psycopg.OperationalError):
        connection.execute("SELECT 1 FROM nodes")
    with pytest.raises(psycopg.OperationalError, match="authentication failed"):
        joined.database()
    with pytest.raises((AuthenticationError, ResponseError, ConnectionError)):
        redis.ping()
    assert client.get(f"/v1/nodes/{joined.wire_id}").status_code == 404
    assert client.delete(f"/v1/nodes/{joined.wire_id}").status_code == 404
    with psycopg.connect(database.url("tunery_migrate")) as admin:
        query = "SELECT count(*) FROM pg_roles WHERE rolname = %s"
        assert admin.execute(query, [node_logins.login_of(joined.id)]).fetchone() == (0,)


def test_the_first_half_of_a_removal_is_enough(joined: Joined, database: Database) -> None:
    """Were the second transaction never to come, a session that is open still sees nothing more."""
    with joined.database() as connection:
        connection.execute("SELECT 1 FROM nodes")
        with transaction(database.sessions("tunery_api")) as session:
            asked = {"id": joined.id, "silent": 45}
            assert session.scalar(text("SELECT remove_node(:id, :silent)"), asked) == "removed"
        with pytest.raises(psycopg.Error):
            connection.execute("SELECT 1 FROM public.nodes")


def test_a_node_with_the_shared_login_is_not_removed_while_it_lives(client: httpx.Client, database: Database) -> None:
    node = factories.node(database)
    path = f"/v1/nodes/{ids.encode(ids.NODE, node.id)}"
    refused(client.delete(path), 409, "conflict", "share")  # its login cannot be taken from it alone
    with factories.owner(database) as session, session.begin():
        session.execute(
            text("UPDATE nodes SET last_seen_at = now() - interval '1 hour' WHERE id = :id"), {"id": node.id}
        )
    assert client.get(path).json()["state"] == "silent"
    assert client.delete(path).status_code == 200
    with psycopg.connect(database.url("tunery_worker"), autocommit=True) as late:
        late.execute("SELECT set_config('app.node_id', %s, false)", [str(node.id)])
        assert late.execute("UPDATE nodes SET last_seen_at = now()").rowcount == 0  # so its process leaves


def test_joining_and_removing_leave_their_words_in_the_log(client: httpx.Client, token: str) -> None:
    with structlog.testing.capture_logs() as lines:
        joined = Joined(client, token)
        client.delete(f"/v1/nodes/{joined.name}")
    told = {line["event"]: line for line in lines}
    assert told["node joined"]["node"] == told["node removed"]["node"] == str(joined.id)
    assert told["node removed"]["key"]
    secret = joined.environment["TUNERY_DATABASE_URL"].split(":")[2].split("@")[0]
    for hidden in (token, secret, joined.environment["TUNERY_S3_SECRET_ACCESS_KEY"]):
        assert hidden not in str(lines)
