"""The fault proxy itself, before the real servers: each fault shows where it should, and nothing shows without one."""

import threading
import time
import uuid
from collections.abc import Iterator

import httpx
import psycopg
import pytest
import redis
from pydantic import SecretStr

from tests.chaos.faults import (
    INTERNAL,
    SLOW_DOWN,
    blackhole,
    corrupt,
    drop_reply_to,
    hold,
    http_error,
    latency,
    refuse,
    replay,
    reset,
    reset_upload,
    throttle,
    truncate,
)
from tests.chaos.proxy import Proxy
from tunery.dispatch import connect
from tunery.embedded.servers import Servers
from tunery.errors import Unavailable
from tunery.settings import StorageSettings
from tunery.storage import Storage


@pytest.fixture
def postgres(servers: Servers) -> Iterator[Proxy]:
    with Proxy.of(servers.admin_url) as proxy:
        yield proxy


@pytest.fixture
def valkey(servers: Servers) -> Iterator[Proxy]:
    with Proxy.of(servers.redis_url) as proxy:
        yield proxy


@pytest.fixture
def s3(servers: Servers) -> Iterator[Proxy]:
    with Proxy.of(servers.s3_root.endpoint_url, http=True) as proxy:
        yield proxy


@pytest.fixture
def store(servers: Servers, s3: Proxy) -> Storage:
    root = servers.s3_root
    return Storage(
        StorageSettings(
            s3_endpoint_url=s3.reach(root.endpoint_url),
            s3_bucket=root.bucket,
            s3_access_key_id=SecretStr(root.access_key_id),
            s3_secret_access_key=SecretStr(root.secret_access_key),
        )
    )


@pytest.fixture
def key() -> str:
    return f"proxy/{uuid.uuid4()}"


def test_a_signed_request_is_verified_against_the_proxys_own_address(s3: Proxy, store: Storage, key: str) -> None:
    store.put_bytes(key, b"x" * 100_000)
    assert store.get_bytes(key) == b"x" * 100_000
    assert list(store.keys(key)) == [key]
    assert s3.did["requests"] >= 3


def test_http_errors_come_as_often_as_asked_and_the_server_hears_nothing(s3: Proxy, store: Storage, key: str) -> None:
    s3.set(http_error(503, SLOW_DOWN, on="^PUT", times=2))
    store.put_bytes(key, b"here")  # the client's own retries
    assert s3.did["answered"] == 2
    s3.set(http_error(500, INTERNAL, on="^GET"))
    with pytest.raises(Unavailable):
        store.get_bytes(key)
    s3.set()
    assert store.get_bytes(key) == b"here"


def test_one_byte_of_a_body_is_another(s3: Proxy, store: Storage, key: str) -> None:
    store.put_bytes(key, b"abc")
    with s3.fault(corrupt(on="^GET", times=1)):
        assert store.get_bytes(key) == b"`bc"
    assert store.get_bytes(key) == b"abc"


def test_a_reply_is_cut_off_in_order_or_with_a_reset(s3: Proxy, store: Storage, key: str) -> None:
    store.put_bytes(key, b"z" * 500_000)
    for fault, done in ((truncate(300_000), "truncated"), (reset(300_000), "resets")):
        with s3.fault(fault), pytest.raises(Unavailable):
            store.get_bytes(key)
        assert s3.did[done] == 1


def test_an_upload_is_broken_off_in_its_body(s3: Proxy, store: Storage, key: str) -> None:
    s3.set(reset_upload(1000, on="^PUT", times=1))
    store.put_bytes(key, b"y" * 200_000)
    assert s3.did["resets"] == 1
    assert store.get_bytes(key) == b"y" * 200_000


def test_a_request_reaches_the_server_as_often_as_asked(s3: Proxy, store: Storage, key: str) -> None:
    s3.set(replay(3, on="^PUT"))
    store.put_bytes(key, b"again")
    assert s3.did["replayed"] == 2
    assert store.get_bytes(key) == b"again"


def test_the_reply_to_a_commit_is_lost_and_the_commit_is_not(servers: Servers, postgres: Proxy) -> None:
    table = f"t_{uuid.uuid4().hex[:8]}"
    postgres.set(drop_reply_to("COMMIT"))
    with psycopg.connect(postgres.reach(servers.admin_url)) as connection:
        connection.execute(f"CREATE TABLE {table} AS SELECT 1 AS n")
        with pytest.raises(psycopg.OperationalError):
            connection.commit()
    with psycopg.connect(postgres.reach(servers.admin_url), autocommit=True) as connection:
        assert connection.execute(f"SELECT n FROM {table}").fetchone() == (1,)
        connection.execute(f"DROP TABLE {table}")
    assert postgres.did["replies_dropped"] == 1


def test_latency_and_a_narrow_line_make_it_slow_and_lose_nothing(servers: Servers, valkey: Proxy) -> None:
    client = redis.Redis.from_url(valkey.reach(servers.redis_url))
    client.ping()
    for fault, least_s in ((latency(0.1, jitter_s=0.02), 0.16), (throttle(50_000), 0.2)):
        with valkey.fault(fault):
            began = time.monotonic()
            assert client.echo(b"e" * 5000) == b"e" * 5000
            assert time.monotonic() - began >= least_s


def test_nobody_is_there_for_old_and_for_new_connections(servers: Servers, valkey: Proxy) -> None:
    client = connect(valkey.reach(servers.redis_url))
    client.ping()
    with valkey.fault(refuse()), pytest.raises(redis.RedisError):
        client.ping()
    assert client.ping()
    assert valkey.cut() == 1
    assert client.ping()


def test_held_bytes_arrive_when_the_partition_heals(servers: Servers, postgres: Proxy) -> None:
    with psycopg.connect(postgres.reach(servers.admin_url), autocommit=True) as connection:
        postgres.set(hold())
        began = time.monotonic()
        heal = threading.Timer(0.3, postgres.set)
        heal.start()
        assert connection.execute("SELECT 7").fetchone() == (7,)
        assert time.monotonic() - began >= 0.3


@pytest.mark.parametrize("ways", ["both", "requests", "replies"])
def test_a_black_hole_swallows_in_the_ways_it_is_told(servers: Servers, valkey: Proxy, ways: str) -> None:
    name = f"hole:{uuid.uuid4()}"
    client, direct = connect(valkey.reach(servers.redis_url), 0.3), redis.Redis.from_url(servers.redis_url)
    client.ping()
    with valkey.fault(blackhole(ways)), pytest.raises(redis.RedisError):  # type: ignore[arg-type]
        client.set(name, "1", ex=60)
    assert bool(direct.get(name)) == (ways == "replies")
    assert client.ping(), "a connection that lost bytes is reset, and a new one serves"


def test_a_stream_of_replies_passes_as_it_comes(api_url: str) -> None:
    with Proxy.of(api_url, http=True) as proxy:
        assert httpx.get(f"{proxy.reach(api_url)}/healthz", trust_env=False).json() == {"status": "ok"}
        proxy.set(http_error(502, b"no", fraction=0.5))
        codes = [httpx.get(f"{proxy.reach(api_url)}/healthz", trust_env=False).status_code for _ in range(20)]
        assert {200, 502} == set(codes)
