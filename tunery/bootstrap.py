"""Roles, schema and first key on a fresh database: the steps of `tunery db init`, `tunery up` and the images.

Every step may be repeated. Only `create_roles` is given a role which may create roles.
"""

import contextlib
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, urlsplit, urlunsplit

import psycopg
from psycopg import sql

from tunery import node_logins

if TYPE_CHECKING:
    from alembic.config import Config

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
    """The server or its role cannot do this. The message says why, `fix` what would help; neither holds a password."""

    def __init__(self, why: str, fix: str) -> None:
        super().__init__(why)
        self.fix = fix


class NoEntry(Unsuitable):
    """The server answers, but not to this user with this password."""


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
    from sqlalchemy.exc import OperationalError

    config = _alembic()
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
                    f"a migration could not get a table for {patience_s:.0f} s: {error.orig}",
                    "end what uses it (pg_stat_activity shows it), then start again",
                ) from error
        time.sleep(pause)
        pause = min(pause * 2, 5)


def newest_version() -> str | None:
    """The migration that this release brings a database to."""
    from alembic.script import ScriptDirectory

    return ScriptDirectory.from_config(_alembic()).get_current_head()


def known_versions() -> set[str]:
    """Every migration of this release."""
    from alembic.script import ScriptDirectory

    return {script.revision for script in ScriptDirectory.from_config(_alembic()).walk_revisions()}


def _alembic() -> "Config":
    from alembic.config import Config

    config = Config(toml_file=str(_ROOT / "pyproject.toml"))
    config.set_main_option("script_location", str(_ROOT / "migrations"))
    return config


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
    with connect(url) as connection:
        try:
            yield connection
        except psycopg.errors.InsufficientPrivilege as error:
            diagnosis = " ".join(filter(None, (error.diag.message_primary, error.diag.message_detail)))
            raise Unsuitable(
                f"role '{connection.info.user}': {diagnosis}",
                "use a superuser, or a role with CREATEROLE and CREATEDB; "
                "where Tunery's roles exist already, the one that made them",
            ) from error


def connect(url: str, timeout_s: int = 5) -> psycopg.Connection:
    """To the URL's database, or to `postgres` where that one is still to be made.

    Raises:
        NoEntry: wrong or missing password, or no such user.
        Unsuitable: unreachable, not a URL, or the server does not let this address in.
    """
    try:
        urlsplit(url).port  # noqa: B018 - a ValueError here says more than libpq would
        try:
            return psycopg.connect(url_for(url), autocommit=True, connect_timeout=timeout_s)
        except psycopg.OperationalError as error:
            if "does not exist" not in str(error) or "role" in str(error):
                raise
            return psycopg.connect(url_for(url, database="postgres"), autocommit=True, connect_timeout=timeout_s)
    except (psycopg.OperationalError, psycopg.ProgrammingError, ValueError) as error:
        raise _explained(url, error) from error


def _explained(url: str, error: Exception) -> Unsuitable:
    """libpq gives no code for a connection that failed, only text; a server of another language gets the last line."""
    said = str(error).strip()
    if not isinstance(error, psycopg.OperationalError):
        fix = "postgresql://user@host:5432/database, with special characters percent-encoded"
        return Unsuitable(f"this is not a PostgreSQL URL: {said.splitlines()[0]}", fix)
    if "password authentication failed" in said or "no password supplied" in said:
        return NoEntry(said, "check user and password; TUNERY_ADMIN_DATABASE_URL, PGPASSWORD or ~/.pgpass may bring it")
    if "pg_hba.conf" in said:
        return Unsuitable(said, "allow this host, user and database in the server's pg_hba.conf; or ?sslmode=require")
    place = urlsplit(url).netloc.rpartition("@")[2] or "the default server"
    return Unsuitable(said, f"check that PostgreSQL runs at {place}, that it listens there, and the firewall between")


def _check_server(connection: psycopg.Connection) -> None:
    if connection.info.server_version < OLDEST_POSTGRES * 10000:
        raise Unsuitable(
            f"the server is PostgreSQL {server_version(connection)}; {OLDEST_POSTGRES} or later is needed",
            f"upgrade it, or give another server ({OLDEST_POSTGRES} to 18 are tested)",
        )


def server_version(connection: psycopg.Connection) -> str:
    """Such as 18.6; distributions append their own name to it."""
    return (connection.info.parameter_status("server_version") or "of an unknown version").split()[0]


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
