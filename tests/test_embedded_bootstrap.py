"""Roles, schema and first key: made once, repaired when repeated, and narrow."""

import secrets
from collections.abc import Iterator

import psycopg
import pytest

from tests import servers as session_servers
from tunery import bootstrap
from tunery.embedded import database
from tunery.embedded.home import Home
from tunery.embedded.problems import Refused
from tunery.embedded.servers import External, Servers


@pytest.fixture
def fresh_database() -> Iterator[str]:
    """The name of a database that does not exist yet, on the session's server."""
    name = f"bootstrap_{secrets.token_hex(4)}"
    yield name
    with psycopg.connect(session_servers.servers().admin_url, autocommit=True) as connection:
        connection.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)'.encode())


@pytest.fixture
def other_home() -> Iterator[Home]:
    made = session_servers.temporary_home()
    yield made
    made.purge()


def admin(database_name: str | None = None) -> psycopg.Connection:
    url = bootstrap.url_for(session_servers.servers().admin_url, database=database_name)
    return psycopg.connect(url, autocommit=True)


def test_no_role_is_superuser_or_passes_by_row_level_security() -> None:
    session_servers.migrated()
    query = """
        SELECT rolname, rolcanlogin, rolsuper OR rolbypassrls OR rolcreatedb OR rolreplication, rolcreaterole
        FROM pg_roles WHERE rolname LIKE 'tunery\\_%' AND rolname !~ '^tunery_node_' ORDER BY rolname
    """
    with admin() as connection:
        found = connection.execute(query).fetchall()
    nobodys = (bootstrap.OWNER, bootstrap.LOGIN_MAKER)
    everybody = sorted([*nobodys, *bootstrap.LOGIN_ROLES])
    expected = [(role, role not in nobodys, False, role == bootstrap.LOGIN_MAKER) for role in everybody]
    assert found == expected


def test_only_the_migrating_role_may_become_the_owner() -> None:
    name = session_servers.migrated()
    with admin(name) as connection:
        owner = connection.execute(
            "SELECT pg_get_userbyid(datdba) FROM pg_database WHERE datname = %s", [name]
        ).fetchone()
        may = [
            role
            for role in bootstrap.LOGIN_ROLES
            if connection.execute("SELECT pg_has_role(%s, %s, 'MEMBER')", [role, bootstrap.OWNER]).fetchone() == (True,)
        ]
    assert owner == (bootstrap.OWNER,)
    assert may == ["tunery_migrate"]


def test_everybody_else_is_shut_out(fresh_database: str) -> None:
    bootstrap.create_roles(session_servers.servers().admin_url, session_servers.passwords(), fresh_database)
    with admin() as connection:
        connection.execute("DROP ROLE IF EXISTS stranger")
        connection.execute("CREATE ROLE stranger LOGIN PASSWORD 'stranger'")
    url = bootstrap.url_for(session_servers.servers().admin_url, "stranger", "stranger", fresh_database)
    try:
        with pytest.raises(psycopg.OperationalError, match="permission denied for database"):
            psycopg.connect(url)
    finally:
        with admin() as connection:
            connection.execute("DROP ROLE stranger")
    for role in bootstrap.LOGIN_ROLES:
        with (
            psycopg.connect(session_servers.database_url(role, fresh_database)) as connection,
            pytest.raises(psycopg.errors.InsufficientPrivilege),
        ):
            connection.execute("CREATE TABLE mine (id int)")


def test_repeating_repairs_a_password_and_changes_nothing_else(fresh_database: str) -> None:
    admin_url, passwords = session_servers.servers().admin_url, session_servers.passwords()
    bootstrap.create_roles(admin_url, passwords, fresh_database)
    with admin() as connection:
        connection.execute("ALTER ROLE tunery_notifier PASSWORD 'changed'")
    bootstrap.create_roles(admin_url, passwords, fresh_database)
    psycopg.connect(session_servers.database_url("tunery_notifier", fresh_database)).close()


def test_first_run_makes_one_key_and_keeps_it(fresh_database: str) -> None:
    bootstrap.create_roles(session_servers.servers().admin_url, session_servers.passwords(), fresh_database)
    url = session_servers.database_url("tunery_migrate", fresh_database)
    assert bootstrap.schema_version(url) is None
    bootstrap.migrate(url)
    bootstrap.migrate(url)
    assert bootstrap.schema_version(url)
    key = bootstrap.first_run(url, "pepper")
    assert key and key.startswith("ftk_live_")
    assert bootstrap.first_run(url, "pepper", key) is None
    assert bootstrap.first_run(url, "another pepper", key)
    with psycopg.connect(url) as connection:
        connection.execute("SET ROLE tunery_owner")
        counts = "SELECT (SELECT count(*) FROM organizations), (SELECT count(*) FROM projects)"
        assert connection.execute(counts).fetchone() == (1, 1)


def test_role_that_may_not_create_roles_is_told_so() -> None:
    session_servers.migrated()
    with pytest.raises(bootstrap.Unsuitable, match="role 'tunery_api': permission denied"):
        bootstrap.create_roles(session_servers.database_url("tunery_api"), session_servers.passwords())


def test_server_of_ones_own_needs_its_admin_once(fresh_database: str, other_home: Home) -> None:
    """The first time an admin's URL; afterwards any URL of that server will do, its login is not used."""
    admin_url = bootstrap.url_for(session_servers.servers().admin_url, database=fresh_database)
    try:
        first = database.prepare(other_home, servers_at(other_home, admin_url))
        key = other_home.secrets().get("admin_key")
        no_login = bootstrap.url_for(admin_url, "nobody", "wrong")
        again = database.prepare(other_home, servers_at(other_home, no_login))
        assert first == again
        assert other_home.secrets().get("admin_key") == key
        psycopg.connect(again["tunery_api"]).close()
    finally:  # the roles are the server's, and other tests know other passwords
        bootstrap.create_roles(session_servers.servers().admin_url, session_servers.passwords())


def test_server_of_ones_own_without_an_admin_is_refused(other_home: Home) -> None:
    url = bootstrap.url_for(session_servers.servers().admin_url, "nobody", "wrong", "tunery")
    with pytest.raises(Refused, match="could not be prepared") as refused:
        database.prepare(other_home, servers_at(other_home, url))
    assert "wrong" not in refused.value.text()


def servers_at(home: Home, database_url: str) -> Servers:
    external = External(
        database_url=database_url, redis_url="redis://127.0.0.1:1/0", s3_endpoint_url="http://127.0.0.1:1"
    )
    return Servers(home, external)
