"""Real Postgres, Valkey and S3 for tests: the servers of `tunery up`, once per session, in a throw-away home.

    from tests.servers import servers
    servers().admin_url, .redis_url, .s3_root, .s3_node
    migrated(); database_url("tunery_api")

They start at the first call (about a second) and stop with the interpreter. `pytest_sessionfinish` may call `stop()`.
"""

import atexit
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from tunery import bootstrap
from tunery.embedded.home import Home
from tunery.embedded.identity import run_as
from tunery.embedded.servers import External, Servers

FAST_POSTGRES = ("fsync=off", "full_page_writes=off")
"""A power cut may lose everything, a killed process nothing: tests kill processes, so commits stay synchronous."""


def temporary_home() -> Home:
    """Below the system's temporary folder itself: pytest's own folders are closed to the servers' user."""
    root = Path(tempfile.mkdtemp(prefix="tunery-test-"))
    home = Home(root, run_as(os.environ.get("TUNERY_RUN_AS")))
    home.create()
    return home


@cache
def servers() -> Servers:
    """The session's servers. URLs of your own count only as `TUNERY_TEST_*`, so no test meets a real database."""
    started = Servers(temporary_home(), _external(), FAST_POSTGRES)
    atexit.register(stop)
    started.start()
    return started


def stop() -> None:
    """Idempotent. Data are thrown away, so nobody waits for a clean shutdown."""
    if not servers.cache_info().currsize:
        return
    running = servers()
    servers.cache_clear()
    throw_away(running)


def throw_away(running: Servers) -> None:
    for name, child in running.children.items():
        if name == "postgres":
            child.stop()  # a killed postmaster leaves its shared memory behind
        else:
            child.kill()
    shutil.rmtree(running.home.data, ignore_errors=True)
    shutil.rmtree(running.home.root, ignore_errors=True)


@contextmanager
def private_servers(options: tuple[str, ...] = FAST_POSTGRES, home: Home | None = None) -> Iterator[Servers]:
    """Servers of one test's own, for what would disturb the others: to be killed, stopped and started anew."""
    started = Servers(home or temporary_home(), External(), options)
    try:
        started.start()
        yield started
    finally:
        throw_away(started)


def _external() -> External:
    prefix = "TUNERY_TEST_"
    given = {f"TUNERY_{key.removeprefix(prefix)}": value for key, value in os.environ.items() if key.startswith(prefix)}
    return External.from_environment(given)


@cache
def passwords() -> dict[str, str]:
    """Of the login roles, made up once per session."""
    return {role: secrets.token_urlsafe(16) for role in bootstrap.LOGIN_ROLES}


@cache
def migrated() -> str:
    """Roles and the newest schema in database `tunery` of the session's Postgres; the database's name."""
    database = bootstrap.create_roles(servers().admin_url, passwords(), bootstrap.DATABASE)
    bootstrap.migrate(database_url("tunery_migrate"))
    return database


def database_url(role: str, database: str = bootstrap.DATABASE, on: Servers | None = None) -> str:
    """For one of the login roles, as its program would be given it."""
    return bootstrap.url_for((on or servers()).admin_url, role, passwords()[role], database)
