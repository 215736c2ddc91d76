"""`tunery doctor` on servers given by URL, and on limits of the host."""

import resource
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from redis import Redis

from tests import servers as session_servers
from tunery import bootstrap
from tunery.embedded import doctor, given, ports
from tunery.embedded.checks import Level
from tunery.embedded.home import Home
from tunery.embedded.servers import External


@pytest.fixture
def home() -> Iterator[Home]:
    made = session_servers.temporary_home()
    yield made
    made.purge()


@pytest.fixture(scope="module")
def external() -> External:
    """The session's servers, as if they were somebody's own."""
    servers = session_servers.servers()
    root = servers.s3_root
    return External(
        database_url=servers.admin_url,
        redis_url=servers.redis_url,
        s3_endpoint_url=root.endpoint_url,
        s3_access_key_id=root.access_key_id,
        s3_secret_access_key=root.secret_access_key,
    )


def test_servers_that_will_do(home: Home, external: External) -> None:
    checks = given.examine(home, external)
    assert [(one.name, one.level) for one in checks] == [(name, Level.OK) for name in ("postgres", "valkey", "s3")]
    postgres, valkey, s3 = (one.detail for one in checks)
    assert "PostgreSQL 1" in postgres and "version " in valkey and "bucket tunery" in s3
    assert not [
        name for name in ("postgres", "valkey", "s3") if name in {one.name for one in doctor._servers(external)}
    ]


@pytest.mark.parametrize(
    ("change", "name", "said"),
    [
        ("database_url", "postgres", "check user and password"),
        ("redis_url", "valkey", "TUNERY_REDIS_URL=redis://"),
        ("s3_secret_access_key", "s3", "TUNERY_S3_SECRET_ACCESS_KEY"),
        ("s3_bucket", "s3", "make it"),
    ],
)
def test_server_that_will_not_do_is_named_with_its_fix(
    home: Home, external: External, change: str, name: str, said: str
) -> None:
    urls = {
        "database_url": bootstrap.url_for(external.database_url or "", "postgres", "a-wrong-one"),
        "redis_url": (external.redis_url or "").replace("redis://:", "redis://:a-wrong-one"),
    }
    broken = replace(external, **{change: urls.get(change, "a-wrong-one")})
    bad = [one for one in given.examine(home, broken) if one.level is not Level.OK]
    assert [(one.name, one.level) for one in bad] == [(name, Level.FAIL)]
    assert said in (bad[0].fix or "")
    assert change == "s3_bucket" or "a-wrong-one" not in bad[0].detail


def test_servers_that_do_not_answer(home: Home) -> None:
    port = ports.choose(set())
    nowhere = External(
        database_url=f"postgresql://a:hidden@127.0.0.1:{port}/x",
        redis_url=f"redis://:hidden@127.0.0.1:{port}",
        s3_endpoint_url=f"http://127.0.0.1:{port}",
        s3_access_key_id="a",
        s3_secret_access_key="hidden",
    )
    checks = given.examine(home, nowhere)
    assert [one.level for one in checks] == [Level.FAIL] * 3
    assert all(f"127.0.0.1:{port}" in (one.fix or "") for one in checks)
    assert "hidden" not in str(checks)


def test_own_role_is_used_once_it_is_known(home: Home, external: External) -> None:
    """After the first start the URL's own login does not count."""
    session_servers.migrated()
    home.secrets().put("role_tunery_migrate", session_servers.passwords()["tunery_migrate"])
    no_login = bootstrap.url_for(external.database_url or "", "nobody", "wrong", bootstrap.DATABASE)
    assert given.examine(home, External(database_url=no_login))[0].level is Level.OK


def test_valkey_that_evicts_is_a_warning(home: Home, external: External) -> None:
    client = Redis.from_url(external.redis_url or "")
    client.config_set("maxmemory-policy", "allkeys-lru")
    try:
        (check,) = given.examine(home, External(redis_url=external.redis_url))
    finally:
        client.config_set("maxmemory-policy", "noeviction")
        client.close()
    assert check.level is Level.WARN and "allkeys-lru" in check.detail


def test_limits_of_the_host(home: Home, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 256))
    (limit := tmp_path / "memory.max").write_text(str(doctor.GIB))
    monkeypatch.setattr(doctor, "_CGROUP_FILES", (str(tmp_path / "none"), str(limit)))
    found = {one.name: one for one in doctor.examine(home, External(), ports.choose(set()))}
    assert found["open files"].level is Level.WARN and "ulimit" in (found["open files"].fix or "")
    assert found["memory"].level is Level.WARN and "1.0 GiB" in found["memory"].detail
    assert all(one.fix for one in found.values() if one.level is Level.FAIL)
