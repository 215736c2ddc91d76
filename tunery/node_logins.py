"""The database logins of nodes that joined: functions that may create roles, and that do only that.

The api cannot create a role. It calls `admit_node` (a migration's), which uses up a join token and then calls
`create_node_login`, which belongs to `tunery_logins`: a role without a login that may hand on `tunery_worker` alone. No
password passes through SQL: the function takes a SCRAM verifier and refuses anything else.
"""

import uuid

import psycopg

PREFIX = "tunery_node_"
"""`app_node()` takes what follows for the node's id."""

_FUNCTIONS = """
CREATE OR REPLACE FUNCTION node_login(node uuid) RETURNS text LANGUAGE sql IMMUTABLE
  RETURN 'tunery_node_' || replace(node::text, '-', '');

CREATE OR REPLACE FUNCTION create_node_login(node uuid, verifier text) RETURNS void LANGUAGE plpgsql SECURITY DEFINER
  SET search_path = pg_catalog, public, pg_temp AS $$
BEGIN
  IF verifier !~ '^SCRAM-SHA-256\\$[0-9]+:[A-Za-z0-9+/=]+\\$[A-Za-z0-9+/=]+:[A-Za-z0-9+/=]+$' THEN
    RAISE EXCEPTION 'a SCRAM verifier is needed, not a password';
  END IF;
  IF current_setting('server_version_num')::int < 160000 THEN
    RAISE feature_not_supported USING MESSAGE = 'a node can join on PostgreSQL 16 or later only';
  END IF;
  EXECUTE format('CREATE ROLE %I LOGIN INHERIT PASSWORD %L', node_login(node), verifier);
  EXECUTE format('GRANT tunery_worker TO %I WITH INHERIT TRUE, SET FALSE, ADMIN FALSE', node_login(node));
END $$;

CREATE OR REPLACE FUNCTION close_node_login(node uuid) RETURNS void LANGUAGE plpgsql SECURITY DEFINER
  SET search_path = pg_catalog, public, pg_temp AS $$
BEGIN
  IF EXISTS (SELECT FROM pg_roles WHERE rolname = node_login(node)) THEN
    EXECUTE format('ALTER ROLE %I NOLOGIN PASSWORD NULL', node_login(node));
    EXECUTE format('REVOKE tunery_worker FROM %I', node_login(node));
  END IF;
END $$;

-- Being a member of it is what allows to end its sessions, and to drop what it may have made to stay.
CREATE OR REPLACE FUNCTION drop_node_login(node uuid) RETURNS void LANGUAGE plpgsql SECURITY DEFINER
  SET search_path = pg_catalog, public, pg_temp AS $$
BEGIN
  IF EXISTS (SELECT FROM pg_roles WHERE rolname = node_login(node)) THEN
    EXECUTE format('GRANT %I TO tunery_logins', node_login(node));
    PERFORM pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = node_login(node);
    EXECUTE format('DROP OWNED BY %I', node_login(node));
    EXECUTE format('DROP ROLE %I', node_login(node));
  END IF;
END $$;
"""
_NAMES = ("create_node_login(uuid, text)", "close_node_login(uuid)", "drop_node_login(uuid)")


def login_of(node_id: uuid.UUID) -> str:
    return f"{PREFIX}{node_id.hex}"


def install(connection: psycopg.Connection) -> None:
    """Make or repair the functions in this database, as a role that is or may become `tunery_logins`."""
    with connection.transaction():
        # an owner needs CREATE only at the moment when it becomes one
        connection.execute("GRANT USAGE, CREATE ON SCHEMA public TO tunery_logins")
        connection.execute(_FUNCTIONS)
        for name in ("node_login(uuid)", *_NAMES):
            connection.execute(f"ALTER FUNCTION {name} OWNER TO tunery_logins".encode())
        connection.execute(f"REVOKE ALL ON FUNCTION {', '.join(_NAMES)} FROM PUBLIC".encode())
        connection.execute(f"GRANT EXECUTE ON FUNCTION {', '.join(_NAMES)} TO tunery_owner".encode())
        connection.execute("REVOKE CREATE ON SCHEMA public FROM tunery_logins")
