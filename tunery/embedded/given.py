"""Servers given by URL: reachable, new enough, usable. Asked side by side, and none waits longer than two seconds."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit

from tunery.embedded.checks import Check, Level
from tunery.embedded.home import Home
from tunery.embedded.servers import External

_TIMEOUT_S = 2  # libpq knows no shorter one
_MOST_SKEW_S = 300
_OLDEST_REDIS = (6, 2)


def examine(home: Home, external: External) -> list[Check]:
    """A check for each server that a URL names."""
    asked: list[Callable[[], Check]] = []
    if external.database_url:
        asked.append(lambda: _postgres(home, external))
    if external.redis_url:
        asked.append(lambda: _redis(external.redis_url or ""))
    if external.s3_endpoint_url:
        asked.append(lambda: _s3(external))
    with ThreadPoolExecutor(max_workers=3) as pool:
        return list(pool.map(lambda ask: ask(), asked))


def _postgres(home: Home, external: External) -> Check:
    """Through our own role where one is known: the URL's login is then not used any more."""
    from tunery import bootstrap

    url = external.database_url or ""
    role = "role_tunery_migrate"
    password = external.database_secrets.get(role) or home.secrets().get(role)
    if password:
        url = bootstrap.url_for(url, "tunery_migrate", password, bootstrap.database_of(url))
    try:
        with bootstrap.connect(url, _TIMEOUT_S) as connection:
            version, number = bootstrap.server_version(connection), connection.info.server_version
    except bootstrap.NoEntry as error:
        if password and home.secrets().get("admin_key") is None:  # db init made it elsewhere, or not at all
            return Check("postgres", Level.FAIL, str(error), "source the file of `tunery db init`, or run that again")
        return Check("postgres", Level.FAIL, str(error), error.fix)
    except bootstrap.Unsuitable as error:
        return Check("postgres", Level.FAIL, str(error).replace("\n", " "), error.fix)
    place = f"yours, at {_place(url)}, PostgreSQL {version}"
    if number < bootstrap.OLDEST_POSTGRES * 10000:
        return Check("postgres", Level.FAIL, place, f"PostgreSQL {bootstrap.OLDEST_POSTGRES} or later is needed")
    return Check("postgres", Level.OK, place)


def _redis(url: str) -> Check:
    import redis

    try:
        with redis.Redis.from_url(url, socket_connect_timeout=_TIMEOUT_S, socket_timeout=_TIMEOUT_S) as client:
            found = client.info()
    except redis.AuthenticationError as error:
        return Check("valkey", Level.FAIL, str(error), "TUNERY_REDIS_URL=redis://USER:PASSWORD@host:6379/0")
    except (redis.RedisError, ValueError) as error:
        fix = f"check TUNERY_REDIS_URL, that the server runs at {_place(url)}, and the firewall between"
        return Check("valkey", Level.FAIL, str(error), fix)
    assert isinstance(found, dict)
    version = str(found.get("valkey_version") or found.get("redis_version"))
    detail = f"yours, at {_place(url)}, version {version}"
    if tuple(map(int, version.split(".")[:2])) < _OLDEST_REDIS:
        return Check("valkey", Level.FAIL, detail, "Redis 6.2 or later, or Valkey, is needed")
    if (policy := found.get("maxmemory_policy", "noeviction")) != "noeviction":
        fix = "maxmemory-policy noeviction; what is evicted has to be found by polling"
        return Check("valkey", Level.WARN, f"{detail}; it may evict keys ({policy})", fix)
    return Check("valkey", Level.OK, detail)


def _s3(external: External) -> Check:
    from tunery.embedded import objects

    endpoint, bucket = external.s3_endpoint_url or "", external.s3_bucket
    key = objects.Key(external.s3_access_key_id or "", external.s3_secret_access_key or "")
    try:
        status, date = objects.signed("HEAD", endpoint, key, bucket, external.s3_region, _TIMEOUT_S)
    except (OSError, ValueError) as error:
        fix = f"check TUNERY_S3_ENDPOINT_URL, that the store runs at {_place(endpoint)}, and the firewall between"
        return Check("s3", Level.FAIL, f"no answer: {error}", fix)
    detail = f"yours, at {_place(endpoint)}, bucket {bucket}"
    if date and (skew := abs(parsedate_to_datetime(date).timestamp() - time.time())) > _MOST_SKEW_S:
        fix = "set this machine's clock: the store refuses signatures that are 15 min off"
        return Check("s3", Level.FAIL, f"{detail}; its clock and ours differ by {skew:.0f} s", fix)
    if status == 200:
        return Check("s3", Level.OK, detail)
    if status == 404:
        return Check("s3", Level.FAIL, f"{detail} does not exist", "make it; Tunery needs a bucket of its own")
    fix = "check TUNERY_S3_ACCESS_KEY_ID, TUNERY_S3_SECRET_ACCESS_KEY and TUNERY_S3_REGION, and the key's policy"
    return Check("s3", Level.FAIL, f"{detail} answers {status} to this key", fix)


def _place(url: str) -> str:
    """Host and port, never the login."""
    return urlsplit(url).netloc.rpartition("@")[2]
