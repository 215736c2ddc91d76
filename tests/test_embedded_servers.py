"""The embedded servers by themselves: start, stop, start again, recover, refuse."""

import http.client
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import psycopg
import pytest
import redis
from botocore.config import Config
from botocore.exceptions import ClientError
from redis.backoff import NoBackoff
from redis.retry import Retry

from tests import servers as session_servers
from tunery.embedded import ports
from tunery.embedded.home import Home
from tunery.embedded.problems import Refused
from tunery.embedded.process import Child
from tunery.embedded.servers import External, S3Identity, Servers

NO_REDIS, NO_S3 = "redis://127.0.0.1:1/0", "http://127.0.0.1:1"
ONLY_POSTGRES = External(redis_url=NO_REDIS, s3_endpoint_url=NO_S3)


@pytest.fixture
def home() -> Iterator[Home]:
    made = session_servers.temporary_home()
    yield made
    made.purge()


@pytest.fixture
def running(home: Home) -> Iterator[Servers]:
    """A Postgres of the test's own."""
    servers = Servers(home, ONLY_POSTGRES, session_servers.FAST_POSTGRES)
    servers.start()
    yield servers
    servers.stop()


def client(identity: S3Identity) -> Any:
    return boto3.client(
        "s3",
        endpoint_url=identity.endpoint_url,
        region_name=identity.region,
        aws_access_key_id=identity.access_key_id,
        aws_secret_access_key=identity.secret_access_key,
        config=Config(retries={"max_attempts": 1}),
    )


def tend_until_ready(servers: Servers, child: Child, deaths: int = 1) -> None:
    deadline = time.monotonic() + 15
    while not (child.is_ready and child.restarts >= deaths):
        servers.tend()
        assert time.monotonic() < deadline, child.last_words()
        time.sleep(0.02)


def test_second_start_finds_the_same_ports_and_data(home: Home) -> None:
    first = Servers(home, postgres_options=session_servers.FAST_POSTGRES)
    first.start()
    with psycopg.connect(first.admin_url) as connection:
        connection.execute("CREATE TABLE kept AS SELECT 1 AS one")
    redis.Redis.from_url(first.redis_url).set("kept", "1")
    client(first.s3_root).put_object(Bucket="tunery", Key="u/kept", Body=b"1")
    first.stop()
    pids = [child.pid for child in first.children.values()]

    second = Servers(home, postgres_options=session_servers.FAST_POSTGRES)
    second.start()
    try:
        assert pids == [None, None, None]
        assert (second.admin_url, second.redis_url, second.s3_root) == (first.admin_url, first.redis_url, first.s3_root)
        with psycopg.connect(second.admin_url) as connection:
            assert connection.execute("SELECT one FROM kept").fetchone() == (1,)
        assert redis.Redis.from_url(second.redis_url).get("kept") == b"1"
        assert client(second.s3_root).get_object(Bucket="tunery", Key="u/kept")["Body"].read() == b"1"
    finally:
        second.stop()


def test_remembered_port_that_is_taken_is_replaced() -> None:
    holder = socket.socket()
    holder.bind((ports.HOST, 0))
    holder.listen()
    taken = holder.getsockname()[1]
    with holder:
        chosen = ports.remembered(["one"], {"one": taken})
    assert chosen["one"] != taken


def test_killed_postmaster_comes_back_with_its_rows(running: Servers) -> None:
    postgres = running.children["postgres"]
    with psycopg.connect(running.admin_url) as connection:
        connection.execute("CREATE TABLE kept AS SELECT generate_series(1, 1000)")
    assert postgres.pid
    os.kill(postgres.pid, signal.SIGKILL)

    tend_until_ready(running, postgres)
    with psycopg.connect(running.admin_url) as connection:
        assert connection.execute("SELECT count(*) FROM kept").fetchone() == (1000,)


def test_pid_file_of_a_stranger_does_not_stop_a_start(home: Home) -> None:
    servers = Servers(home, ONLY_POSTGRES, session_servers.FAST_POSTGRES)
    servers.start()
    servers.stop()
    pid_file = home.data / "pg/postmaster.pid"
    home.owned_file(pid_file, f"{os.getpid()}\n{home.data}/pg\n1\n1\n\n127.0.0.1\n0 0\nready\n")

    servers = Servers(home, ONLY_POSTGRES, session_servers.FAST_POSTGRES)
    servers.start()
    assert not servers.children["postgres"].restarts
    servers.stop()


def test_orphaned_postgres_is_ended_first(home: Home, running: Servers) -> None:
    orphan = running.children["postgres"]
    second = Servers(home, ONLY_POSTGRES, session_servers.FAST_POSTGRES)
    # The first supervisor is gone without having stopped anything: nobody waits for its child but us.
    second.start()
    try:
        assert second.children["postgres"].pid != orphan.pid
        assert orphan.process and orphan.process.wait(5) == 0
    finally:
        second.stop()


def test_data_of_another_major_version_are_refused(home: Home) -> None:
    home.owned_folder("pg")
    home.owned_file(home.data / "pg/PG_VERSION", "14\n")
    with pytest.raises(Refused, match=r"PostgreSQL 14, the installed server is \d+") as refused:
        Servers(home, ONLY_POSTGRES).start()
    assert "pg_dump" in refused.value.fix


def test_servers_given_by_url_are_not_started(home: Home) -> None:
    environment = {
        "TUNERY_DATABASE_URL": "postgresql://somebody@db.example/tunery",
        "TUNERY_REDIS_URL": "redis://cache.example:6379/0",
        "TUNERY_S3_ENDPOINT_URL": "https://s3.example",
        "TUNERY_S3_ACCESS_KEY_ID": "id",
        "TUNERY_S3_SECRET_ACCESS_KEY": "secret",
        "TUNERY_S3_BUCKET": "ours",
    }
    servers = Servers(home, External.from_environment(environment))
    servers.start()
    assert servers.children == {}
    assert servers.admin_url == environment["TUNERY_DATABASE_URL"]
    assert servers.redis_url == environment["TUNERY_REDIS_URL"]
    assert servers.s3_node == servers.s3_root == S3Identity("https://s3.example", "ours", "us-east-1", "id", "secret")


def test_object_store_without_its_key_is_refused() -> None:
    with pytest.raises(Refused, match="its key is not"):
        External.from_environment({"TUNERY_S3_ENDPOINT_URL": "https://s3.example"})


def test_node_may_write_below_a_only() -> None:
    servers = session_servers.servers()
    root, node = client(servers.s3_root), client(servers.s3_node)
    root.put_object(Bucket="tunery", Key="u/project/file", Body=b"rows")
    node.put_object(Bucket="tunery", Key="a/project/attempt/adapter", Body=b"weights")
    assert node.get_object(Bucket="tunery", Key="u/project/file")["Body"].read() == b"rows"
    assert node.get_object(Bucket="tunery", Key="a/project/attempt/adapter")["Body"].read() == b"weights"
    forbidden = (
        lambda: node.put_object(Bucket="tunery", Key="u/project/file", Body=b"forged"),
        lambda: node.delete_object(Bucket="tunery", Key="u/project/file"),
        lambda: node.create_multipart_upload(Bucket="tunery", Key="u/project/file"),
        lambda: node.put_object(Bucket="tunery", Key="a/../u/project/file", Body=b"forged"),
        lambda: node.copy_object(Bucket="tunery", Key="u/project/file", CopySource="tunery/a/project/attempt/adapter"),
        lambda: node.put_object(Bucket="tunery", Key="elsewhere", Body=b"forged"),
        lambda: node.list_objects_v2(Bucket="tunery", Prefix="u/"),
        lambda: node.create_bucket(Bucket="another"),
        lambda: node.delete_bucket(Bucket="tunery"),
    )
    for attempt in forbidden:
        with pytest.raises(ClientError):
            attempt()
    assert root.get_object(Bucket="tunery", Key="u/project/file")["Body"].read() == b"rows"


def test_nothing_is_served_without_credentials() -> None:
    servers = session_servers.servers()
    client(servers.s3_root).put_object(Bucket="tunery", Key="u/project/secret", Body=b"secret")
    assert servers.objects
    assert status_of(servers.objects.ports["s3"], "/tunery/u/project/secret") == 403
    assert status_of(servers.objects.ports["filer"], "/buckets/tunery/u/project/secret") == 401
    assert servers.valkey
    with pytest.raises(redis.AuthenticationError):
        redis.Redis(port=servers.valkey.port, retry=Retry(NoBackoff(), 0)).ping()
    with pytest.raises(psycopg.OperationalError):
        psycopg.connect(servers.admin_url.replace(servers.home.secrets().made("postgres_superuser"), "guess"))


def test_no_secret_stands_in_a_command_line() -> None:
    servers = session_servers.servers()
    secrets = [value.encode() for value in servers.home.secrets().all().values()]
    for child in servers.children.values():
        argv = b"\0".join(os.fsencode(part) for part in child.command.argv)
        log = child.log.read_bytes()
        assert not [secret for secret in secrets if secret in argv or secret in log], child.name


def test_files_are_private() -> None:
    home = session_servers.servers().home
    assert home.root.stat().st_mode & 0o777 == 0o711
    for path in (
        home.secrets_file,
        home.state_file,
        home.data / "valkey/valkey.conf",
        home.data / "s3/identities.json",
    ):
        assert path.stat().st_mode & 0o777 == 0o600, path
    for folder in ("pg", "valkey", "s3"):
        assert (home.data / folder).stat().st_mode & 0o777 == 0o700, folder


@pytest.mark.skipif(os.geteuid() != 0, reason="only root drops to another user")
def test_servers_of_a_root_supervisor_do_not_run_as_root() -> None:
    for child in session_servers.servers().children.values():
        status = Path(f"/proc/{child.pid}/status").read_text()
        uids = next(line for line in status.splitlines() if line.startswith("Uid:")).split()[1:]
        assert set(uids) == {str(session_servers.servers().home.run_as.uid)}, child.name


def status_of(port: int, path: str) -> int:
    connection = http.client.HTTPConnection(ports.HOST, port, timeout=5)
    connection.request("GET", path)
    status = connection.getresponse().status
    connection.close()
    return status
