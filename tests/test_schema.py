"""What the schema promises by itself: isolation on every table, honest roles, states that all lead to an end."""

import re
from pathlib import Path

import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError

from tests import factories
from tests.factories import Database, FleetNode, Tenant
from tunery import bootstrap, states
from tunery.db import Base, PrivilegedRole, make_engine, refuse_privileged_role
from tunery.embedded.servers import Servers
from tunery.states import ATTEMPT_MOVES, LIVE_ATTEMPT, MOVES, OPENAI_STATUS, POLICY, TERMINAL, FailureCode, JobState

ROOT = Path(__file__).parent.parent
PROGRAM_ROLES = ("tunery_api", "tunery_scheduler", "tunery_worker", "tunery_notifier")


def rows(database: Database, query: str, **values: object) -> list[tuple[object, ...]]:
    with factories.owner(database) as session:
        return [tuple(row) for row in session.execute(text(query), values)]


# ---- isolation ----------------------------------------------------------------------------------------------------


def test_every_table_of_the_models_is_in_the_database_and_no_other(database: Database) -> None:
    found = {name for (name,) in rows(database, "SELECT tablename FROM pg_tables WHERE schemaname = 'public'")}
    assert found == set(Base.metadata.tables) | {"alembic_version"}


def test_row_level_security_is_on_and_forced_everywhere(database: Database) -> None:
    query = """
        SELECT relname, relrowsecurity, relforcerowsecurity FROM pg_class
        WHERE relkind IN ('r', 'p') AND relnamespace = 'public'::regnamespace AND relname <> 'alembic_version'"""
    flags = {name: (enabled, forced) for name, enabled, forced in rows(database, query)}
    assert flags and all(flag == (True, True) for flag in flags.values()), flags


def test_every_table_with_a_project_has_a_policy_that_checks_writes(database: Database) -> None:
    query = "SELECT tablename, policyname, qual, with_check FROM pg_policies WHERE policyname = 'tunery_api'"
    policies = {table: (qual, check) for table, _, qual, check in rows(database, query)}
    tenant = {name for name, table in Base.metadata.tables.items() if "project_id" in table.columns}
    assert len(tenant) > 10
    for table in tenant:
        qual, check = policies[table]
        assert "app_project()" in str(qual) and "app_project()" in str(check), table


def test_no_policy_is_for_everybody(database: Database) -> None:
    query = "SELECT tablename, policyname FROM pg_policies WHERE 'public' = ANY(roles)"
    assert rows(database, query) == []
    grants = """
        SELECT table_name FROM information_schema.role_table_grants
        WHERE grantee = 'PUBLIC' AND table_schema = 'public'"""
    assert rows(database, grants) == []


def test_a_foreign_key_cannot_leave_its_project(database: Database) -> None:
    """Row-level security does not filter plain ones: between tenant tables each must carry `project_id`."""
    tenant = {name for name, table in Base.metadata.tables.items() if "project_id" in table.columns}
    for name in tenant:
        for key in Base.metadata.tables[name].foreign_key_constraints:
            if key.referred_table.name in tenant:
                assert "project_id" in key.column_keys, f"{name}: {key.column_keys}"


def test_functions_that_act_as_their_owner_pin_their_path(database: Database) -> None:
    query = """
        SELECT proname, proconfig FROM pg_proc
        WHERE prosecdef AND pronamespace = 'public'::regnamespace"""
    functions = dict(rows(database, query))
    assert {"find_api_key", "release_attempt"} <= functions.keys()
    for name, config in functions.items():
        assert any(str(setting).startswith("search_path=pg_catalog") for setting in config or []), name  # type: ignore[union-attr]


def test_no_function_that_acts_as_its_owner_is_for_everybody(database: Database) -> None:
    query = """
        SELECT proname FROM pg_proc WHERE prosecdef AND pronamespace = 'public'::regnamespace
        AND prorettype <> 'trigger'::regtype AND has_function_privilege('public', oid, 'EXECUTE')"""
    assert rows(database, query) == []


# ---- roles --------------------------------------------------------------------------------------------------------


def test_roles_are_what_they_say(database: Database) -> None:
    query = """
        SELECT rolname, rolsuper, rolbypassrls, rolcreaterole, rolcreatedb, rolcanlogin FROM pg_roles
        WHERE rolname LIKE 'tunery\\_%' AND rolname !~ '^tunery_node_'"""
    found = {str(name): flags for name, *flags in rows(database, query)}
    assert found.keys() == {*bootstrap.LOGIN_ROLES, bootstrap.OWNER, bootstrap.LOGIN_MAKER}
    assert found.pop(bootstrap.LOGIN_MAKER) == [False, False, True, False, False]
    for role, (*powers, may_log_in) in found.items():
        assert not any(powers), role
        assert may_log_in == (role != bootstrap.OWNER)


@pytest.mark.parametrize("role", PROGRAM_ROLES)
def test_a_programs_role_may_start(database: Database, role: str) -> None:
    refuse_privileged_role(database.engine(role))


def test_roles_that_see_everything_may_not_start(database: Database, servers: Servers) -> None:
    for url in (servers.admin_url, database.url("tunery_migrate")):
        engine = make_engine(url)
        with pytest.raises(PrivilegedRole):
            refuse_privileged_role(engine)
        engine.dispose()


@pytest.mark.parametrize("role", PROGRAM_ROLES)
def test_no_program_may_empty_or_change_a_table(database: Database, role: str) -> None:
    query = """
        SELECT table_name, privilege_type FROM information_schema.role_table_grants
        WHERE grantee = :role AND privilege_type IN ('TRUNCATE', 'TRIGGER', 'REFERENCES', 'DELETE')"""
    swept = (
        {"outbox", "datasets", "object_deletions", "holds", "queue_questions"} if role == "tunery_scheduler" else set()
    )
    assert set(rows(database, query, role=role)) == {(table, "DELETE") for table in swept}


def test_a_backup_reads_every_row_and_every_sequence_and_writes_nothing(database: Database) -> None:
    unread = """
        SELECT c.relname FROM pg_class c WHERE c.relnamespace = 'public'::regnamespace
          AND (c.relkind IN ('r', 'p') AND NOT has_table_privilege('tunery_backup', c.oid, 'SELECT')
            OR c.relkind = 'S' AND NOT has_sequence_privilege('tunery_backup', c.oid, 'SELECT'))"""
    assert rows(database, unread) == []
    seen = rows(database, "SELECT tablename FROM pg_policies WHERE policyname = 'backup' AND qual = 'true'")
    assert {table for (table,) in seen} == set(Base.metadata.tables)
    query = """
        SELECT table_name FROM information_schema.role_table_grants
        WHERE grantee = 'tunery_backup' AND privilege_type <> 'SELECT'"""
    assert rows(database, query) == []


def test_the_api_cannot_read_a_keys_hash(project: Tenant) -> None:
    with pytest.raises(Exception, match="permission denied"), project.transaction() as session:
        session.execute(text("SELECT secret_hmac FROM api_keys"))


# ---- states -------------------------------------------------------------------------------------------------------


def test_every_state_of_a_job_reaches_an_end_and_can_be_reached() -> None:
    for moves, ends, first in (
        (MOVES, TERMINAL, JobState.VALIDATING),
        (ATTEMPT_MOVES, states.ENDED_ATTEMPT, states.AttemptState.ASSIGNED),
    ):
        everything = set(moves) | set(ends)
        assert {target for targets in moves.values() for target in targets} | {first} == everything
        for state in moves:
            seen, todo = set(), [state]
            while todo:
                seen.add(now := todo.pop())
                todo += [target for target in moves.get(now, ()) if target not in seen]  # type: ignore[call-overload]
            assert seen & set(ends), f"{state} never ends"


def test_every_live_attempt_may_be_lost() -> None:
    assert all(states.AttemptState.LOST in ATTEMPT_MOVES[state] for state in LIVE_ATTEMPT)


def test_every_state_and_every_failure_has_its_word() -> None:
    assert OPENAI_STATUS.keys() == set(JobState) and POLICY.keys() == set(FailureCode)
    words = {"validating_files", "queued", "running", "succeeded", "failed", "cancelled"}
    assert set(OPENAI_STATUS.values()) == words  # OpenAI's strict client knows no others
    assert all(policy.fix.endswith(".") for policy in POLICY.values())


def test_only_leases_write_the_state_of_jobs_and_attempts() -> None:
    """A second writer would be a second opinion about what may follow what."""
    writes = re.compile(
        r"\b(?:job|attempt|held\.job|held\.attempt)\.state\s*=(?!=)"
        r"|update\((?:Job|Attempt)\)[^\n]*state="
        r"|UPDATE\s+(?:jobs|attempts)\s+SET[^\"]*\bstate\b\s*=",
        re.IGNORECASE,
    )
    found = {
        path.relative_to(ROOT).as_posix()
        for folder in ("api", "tunery", "scheduler", "worker", "trainer")
        for path in (ROOT / folder).rglob("*.py")
        if writes.search(path.read_text())
    }
    assert found == {"tunery/leases/holding.py", "tunery/leases/moves.py"}


@pytest.mark.parametrize(
    "change",
    [
        "state = 'resting'",
        "state = 'succeeded'",
        "finished_at = now()",
        "state = 'failed', finished_at = now()",
        "gpus = 0",
    ],
)
def test_the_schema_refuses_impossible_jobs(
    project: Tenant, node: FleetNode, base_model: str, database: Database, change: str
) -> None:
    work = factories.queued(project, node)
    with factories.owner(database) as session, pytest.raises(IntegrityError):
        session.execute(text(f"UPDATE jobs SET {change} WHERE id = :id"), {"id": work.job_id})


@pytest.mark.parametrize("change", ["lease_expires_at = NULL", "ended_at = now()", "state = 'failed'"])
def test_the_schema_refuses_impossible_attempts(
    project: Tenant, node: FleetNode, base_model: str, database: Database, change: str
) -> None:
    work = factories.running(project, node)
    with factories.owner(database) as session, pytest.raises(IntegrityError):
        session.execute(text(f"UPDATE attempts SET {change} WHERE id = :id"), {"id": work.attempt_id})


def test_models_and_migrations_agree(database: Database) -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    with database.engine("owner").connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []
