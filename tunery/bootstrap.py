"""Roles, schema and first key on a fresh database: `python -m tunery.bootstrap`, and the same steps for `tunery up`.

Every step may be repeated. It is the only program that is given a role which may create roles.
"""

import argparse
import contextlib
import os
import secrets
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import quote, urlsplit, urlunsplit

import psycopg
from psycopg import sql

from tunery import node_logins

OWNER = "tunery_owner"
LOGIN_ROLES = ("tunery_migrate", "tunery_api", "tunery_scheduler", "tunery_worker", "tunery_notifier", "tunery_backup")
"""None is superuser, none has BYPASSRLS. `tunery_backup` neither: the migrations give it SELECT and a policy on each
table, and it dumps with `pg_dump --enable-row-security`, so a stolen backup password can read but change nothing."""
LOGIN_MAKER = "tunery_logins"
"""Nobody logs in as it. It owns the functions that make and end the logins of nodes that joined, and may hand on one
role only: `tunery_worker`, to be used and not to be become."""
DATABASE = "tunery"
OLDEST_POSTGRES = 15
OLDEST_TO_JOIN = 16
"""Before 16 whoever is a member of a role may become it, and change its password."""
ORGANIZATION, PROJECT, KEY = "local", "default", "admin"
_LOCK = 7_206_542
_ROOT = Path(__file__).resolve().parents[1]


class Unsuitable(RuntimeError):
    """The server or its role cannot do this; the message says what would help."""


def create_roles(admin_url: str, passwords: Mapping[str, str], database: str | None = None) -> str:
    """Make or repair roles, database and grants; the database's name.

    `database` defaults to the URL's own, or to `tunery` where that is only `postgres`.
    """
    database = database or database_of(admin_url)
    with _admin(admin_url) as connection:
        _check_server(connection)
        connection.execute("SELECT pg_advisory_lock(%s)", [_LOCK])  # freed with the connection
        _ensure_role(connection, OWNER, sql.SQL("NOLOGIN"))
        for role in LOGIN_ROLES:
            # NOINHERIT: the migrating role owns nothing until it says SET ROLE.
            _ensure_role(connection, role, sql.SQL("LOGIN NOINHERIT"), passwords[role])
        _run(connection, "GRANT {} TO tunery_migrate", OWNER)
        _ensure_role(connection, LOGIN_MAKER, sql.SQL("NOLOGIN CREATEROLE"))
        if connection.info.server_version >= OLDEST_TO_JOIN * 10000:
            _run(connection, "GRANT tunery_worker TO {} WITH ADMIN TRUE, INHERIT FALSE, SET FALSE", LOGIN_MAKER)
        if not _is_superuser(connection):
            for role in (OWNER, LOGIN_MAKER):  # whoever makes a database or a function for another role must be it
                _run(connection, "GRANT {} TO CURRENT_USER", role)
        _ensure_database(connection, database)
    with _admin(url_for(admin_url, database=database)) as connection:
        _grant_database(connection, database)
        node_logins.install(connection)
    return database


def migrate(url: str, patience_s: float = 120) -> None:
    """To the newest schema, as `tunery_migrate`, which becomes the owner for it. `migrations/env.py` takes the lock.

    A table that somebody uses is waited for in short tries, so that its writers never queue up behind us.

    Raises:
        Unsuitable: it was in use for `patience_s`. What has been migrated so far stays; repeat it later.
    """
    from alembic import command
    from alembic.config import Config
    from sqlalchemy.exc import OperationalError

    config = Config(toml_file=str(_ROOT / "pyproject.toml"))
    config.set_main_option("script_location", str(_ROOT / "migrations"))
    config.attributes["url"] = url
    deadline, pause = time.monotonic() + patience_s, 0.25
    while True:
        try:
            command.upgrade(config, "head")
            return
        except OperationalError as error:
            if not isinstance(error.orig, psycopg.errors.LockNotAvailable):
                raise
            if time.monotonic() > deadline:
                raise Unsuitable(
                    f"a migration could not get a table for {patience_s:.0f} s: {error.orig}. End what uses it "
                    "(pg_stat_activity shows it), then start again."
                ) from error
        time.sleep(pause)
        pause = min(pause * 2, 5)


def first_run(url: str, pepper: str, known_key: str | None = None) -> str | None:
    """The first organization, project and admin key; the key's text, or None where `known_key` opens the door already.

    `url` is that of `tunery_migrate`.
    """
    from sqlalchemy import NullPool, create_engine, select, text
    from sqlalchemy.orm import Session

    from tunery import tenancy
    from tunery.db import driver_url
    from tunery.errors import Unauthenticated
    from tunery.models import Organization, Project

    engine = create_engine(driver_url(url), poolclass=NullPool)
    with Session(engine) as session, session.begin():
        session.execute(text(f"SET LOCAL ROLE {OWNER}"))
        session.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
        if known_key:
            with contextlib.suppress(Unauthenticated):
                tenancy.authenticate(session, known_key, pepper)
                return None
        organization = session.scalar(select(Organization).where(Organization.name == ORGANIZATION))
        organization = organization or tenancy.create_organization(session, ORGANIZATION)
        own = select(Project).where(Project.organization_id == organization.id, Project.name == PROJECT)
        project = session.scalar(own) or tenancy.create_project(session, organization.id, PROJECT)
        _, plaintext = tenancy.create_key(session, project.id, KEY, ["admin"], pepper)
        return plaintext


def schema_version(url: str) -> str | None:
    """The migration a database is at, asked as `tunery_migrate`. None: no database, no such role, or no schema yet."""
    try:
        with psycopg.connect(url, connect_timeout=5) as connection:
            _run(connection, "SET ROLE {}", OWNER)
            row = connection.execute("SELECT version_num FROM alembic_version").fetchone()
    except (psycopg.OperationalError, psycopg.ProgrammingError):
        return None
    return row[0] if row else None


def is_prepared(url: str) -> bool:
    """Does the database have what only an admin can make? An older release made less. Asked as `tunery_migrate`."""
    with psycopg.connect(url, connect_timeout=5) as connection:
        return connection.execute("SELECT 1 FROM pg_proc WHERE proname = 'drop_node_login'").fetchone() is not None


def url_for(url: str, role: str | None = None, password: str | None = None, database: str | None = None) -> str:
    """The same server, through another role or to another database."""
    parts = urlsplit(url)
    login, _, place = parts.netloc.rpartition("@")
    if role is not None:
        login = f"{quote(role, safe='')}:{quote(password or '', safe='')}"
    path = f"/{quote(database, safe='')}" if database else parts.path
    netloc = f"{login}@{place}" if login else place
    return urlunsplit(("postgresql", netloc, path, parts.query, ""))


def database_of(url: str) -> str:
    named = urlsplit(url).path.strip("/")
    return DATABASE if named in ("", "postgres") else named


@contextlib.contextmanager
def _admin(url: str) -> Iterator[psycopg.Connection]:
    with _connect(url) as connection:
        try:
            yield connection
        except psycopg.errors.InsufficientPrivilege as error:
            raise Unsuitable(
                f"{error}. The admin URL needs a role that may create roles and databases "
                "(superuser, or CREATEROLE and CREATEDB)."
            ) from error


def _connect(url: str) -> psycopg.Connection:
    """To the URL's database, or to `postgres` where that one is still to be made."""
    try:
        return psycopg.connect(url_for(url), autocommit=True, connect_timeout=10)
    except psycopg.OperationalError as error:
        with contextlib.suppress(psycopg.OperationalError):
            return psycopg.connect(url_for(url, database="postgres"), autocommit=True, connect_timeout=10)
        raise Unsuitable(f"the database server did not let us in: {error}") from error


def _check_server(connection: psycopg.Connection) -> None:
    if connection.info.server_version < OLDEST_POSTGRES * 10000:
        raise Unsuitable(
            f"PostgreSQL {OLDEST_POSTGRES} or later is needed; this server says {connection.info.server_version}"
        )


def _ensure_role(connection: psycopg.Connection, role: str, options: sql.SQL, password: str | None = None) -> None:
    known = connection.execute("SELECT 1 FROM pg_roles WHERE rolname = %s", [role]).fetchone()
    verb = sql.SQL("ALTER") if known else sql.SQL("CREATE")
    statement = sql.SQL("{} ROLE {} WITH {}").format(verb, sql.Identifier(role), options)
    if password is not None:
        # The verifier, made here: a statement that fails is logged by the server with all its text.
        verifier = connection.pgconn.encrypt_password(password.encode(), role.encode(), b"scram-sha-256").decode()
        statement += sql.SQL(" PASSWORD {}").format(sql.Literal(verifier))
    connection.execute(statement)


def _ensure_database(connection: psycopg.Connection, database: str) -> None:
    if not connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", [database]).fetchone():
        statement = sql.SQL("CREATE DATABASE {} OWNER {} ENCODING 'UTF8' TEMPLATE template0")
        connection.execute(statement.format(sql.Identifier(database), sql.Identifier(OWNER)))


def _grant_database(connection: psycopg.Connection, database: str) -> None:
    """Default-deny: nobody connects or creates by being PUBLIC."""
    everybody = sql.SQL(", ").join(map(sql.Identifier, LOGIN_ROLES))
    names = {"database": sql.Identifier(database), "owner": sql.Identifier(OWNER), "roles": everybody}
    for statement in (
        "GRANT CONNECT ON DATABASE {database} TO CURRENT_USER, {owner}, {roles}",
        "REVOKE ALL ON DATABASE {database} FROM PUBLIC",
        "REVOKE ALL ON SCHEMA public FROM PUBLIC",
        "GRANT USAGE, CREATE ON SCHEMA public TO {owner}",
        "GRANT USAGE ON SCHEMA public TO {roles}",
    ):
        connection.execute(sql.SQL(statement).format(**names))


def _is_superuser(connection: psycopg.Connection) -> bool:
    return connection.info.parameter_status("is_superuser") == "on"


def _run(connection: psycopg.Connection, statement: str, role: str) -> None:
    connection.execute(sql.SQL(statement).format(sql.Identifier(role)))  # pyright: ignore[reportArgumentType]


def _read_env(path: Path) -> dict[str, str]:
    if not path.exists():
        return {}
    pairs = (line.partition("=") for line in path.read_text().splitlines() if "=" in line and line[0] != "#")
    return {name.strip(): value.strip() for name, _, value in pairs}


def _write_env(path: Path, values: Mapping[str, str]) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.writelines(f"{name}={value}\n" for name, value in values.items())


def main(arguments: list[str] | None = None) -> int:
    """Prepare a server of your own. The admin URL comes by environment: argv is readable by everybody."""
    parser = argparse.ArgumentParser(prog="python -m tunery.bootstrap", description=main.__doc__)
    parser.add_argument("--env-file", type=Path, required=True, help="kept 0600; passwords in it are used again")
    options = parser.parse_args(arguments)
    admin_url = os.environ.get("TUNERY_ADMIN_DATABASE_URL")
    if not admin_url:
        parser.error("set TUNERY_ADMIN_DATABASE_URL=postgresql://admin:...@host/database")
    known = _read_env(options.env_file)
    passwords = {role: known.get(f"{role.upper()}_PASSWORD") or secrets.token_urlsafe(32) for role in LOGIN_ROLES}
    pepper = os.environ.get("TUNERY_KEY_PEPPER") or known.get("TUNERY_KEY_PEPPER") or secrets.token_urlsafe(32)
    values = {f"{role.upper()}_PASSWORD": password for role, password in passwords.items()}
    values["TUNERY_KEY_PEPPER"] = pepper
    _write_env(options.env_file, known | values)  # first: a password must not be lost once a role has it
    try:
        database = create_roles(admin_url, passwords)
    except Unsuitable as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    urls = {role: url_for(admin_url, role, passwords[role], database) for role in LOGIN_ROLES}
    migrate(urls["tunery_migrate"])
    values |= {f"{role.upper()}_DATABASE_URL": url for role, url in urls.items()}
    if key := first_run(urls["tunery_migrate"], pepper, known.get("TUNERY_API_KEY")):
        values["TUNERY_API_KEY"] = key
    _write_env(options.env_file, known | values)
    sys.stderr.write(f"database {database!r} is ready; passwords, URLs and the admin key are in {options.env_file}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
