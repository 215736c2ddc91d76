"""Nodes that join with a one-time token and log in as a role of their own; nodes that are removed."""

import sqlalchemy as sa
from alembic import op

revision = "joined_nodes"
down_revision = "0001"
branch_labels = None
depends_on = None

# A joined node's login is `tunery_node_<its id>`: who it is follows from who logged in, so setting app.node_id gains it
# nothing. `session_user` stays what it was through SET ROLE and inside SECURITY DEFINER functions.
IDENTITY = """
CREATE OR REPLACE FUNCTION app_project() RETURNS uuid LANGUAGE sql STABLE PARALLEL SAFE
  RETURN CASE WHEN left(session_user, 12) = 'tunery_node_' THEN NULL
    ELSE nullif(current_setting('app.project_id', true), '')::uuid END;
CREATE OR REPLACE FUNCTION app_node() RETURNS uuid LANGUAGE sql STABLE PARALLEL SAFE
  RETURN CASE WHEN left(session_user, 12) = 'tunery_node_' THEN substr(session_user, 13)::uuid
    ELSE nullif(current_setting('app.node_id', true), '')::uuid END;
"""
IDENTITY_BEFORE = """
CREATE OR REPLACE FUNCTION app_project() RETURNS uuid LANGUAGE sql STABLE PARALLEL SAFE
  RETURN nullif(current_setting('app.project_id', true), '')::uuid;
CREATE OR REPLACE FUNCTION app_node() RETURNS uuid LANGUAGE sql STABLE PARALLEL SAFE
  RETURN nullif(current_setting('app.node_id', true), '')::uuid;
"""

# The api may call these and nothing below them: it cannot make a login without a token that it was shown. The functions
# that touch roles (`create_node_login` ...) are made by `tunery.bootstrap`, and belong to a role that may create roles.
FUNCTIONS = """
CREATE FUNCTION find_join_token(digest bytea) RETURNS text LANGUAGE sql STABLE SECURITY DEFINER
  SET search_path = pg_catalog, public AS $$
  SELECT CASE WHEN used_at IS NOT NULL THEN 'used' WHEN expires_at <= now() THEN 'expired' ELSE 'good' END
    FROM join_tokens WHERE token_hmac = digest $$;

CREATE FUNCTION admit_node(digest bytea, new_id uuid, new_name text, verifier text, redis_digest text)
  RETURNS boolean LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, public AS $$
BEGIN
  PERFORM 1 FROM join_tokens WHERE token_hmac = digest AND used_at IS NULL AND expires_at > now() FOR UPDATE;
  IF NOT FOUND THEN
    RETURN false;
  END IF;
  INSERT INTO nodes (id, name, boot_id, state, task_slots, version, info)
    VALUES (new_id, new_name, gen_random_uuid(), 'down', 0, '', '{}');
  INSERT INTO node_credentials (node_id, redis_sha256) VALUES (new_id, redis_digest);
  UPDATE join_tokens SET used_at = now(), node_id = new_id WHERE token_hmac = digest;
  PERFORM create_node_login(new_id, verifier);
  RETURN true;
END $$;

-- A node with the deployment's shared login cannot be shut out alone: it has to be down, or silent, first.
CREATE FUNCTION remove_node(target uuid, silent_s double precision) RETURNS text LANGUAGE plpgsql SECURITY DEFINER
  SET search_path = pg_catalog, public AS $$
DECLARE
  joined boolean := EXISTS (SELECT FROM node_credentials WHERE node_id = target);
BEGIN
  PERFORM 1 FROM nodes WHERE id = target AND removed_at IS NULL FOR UPDATE;
  IF NOT FOUND THEN
    RETURN 'absent';
  END IF;
  IF NOT joined AND EXISTS (SELECT FROM nodes WHERE id = target AND state <> 'down'
                              AND last_seen_at > now() - make_interval(secs => silent_s)) THEN
    RETURN 'alive';
  END IF;
  UPDATE nodes SET state = 'down', removed_at = now() WHERE id = target;
  IF joined THEN
    UPDATE node_credentials SET revoked_at = now() WHERE node_id = target;
    PERFORM close_node_login(target);
  END IF;
  RETURN 'removed';
END $$;

-- In a transaction after that one: nobody can log in any more, so whoever is still connected is the last.
CREATE FUNCTION cut_off_node(target uuid) RETURNS boolean LANGUAGE plpgsql SECURITY DEFINER
  SET search_path = pg_catalog, public AS $$
BEGIN
  IF NOT EXISTS (SELECT FROM node_credentials WHERE node_id = target AND revoked_at IS NOT NULL) THEN
    RETURN false;
  END IF;
  PERFORM drop_node_login(target);
  RETURN true;
END $$;

REVOKE ALL ON FUNCTION find_join_token(bytea), admit_node(bytea, uuid, text, text, text),
  remove_node(uuid, double precision), cut_off_node(uuid) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION find_join_token(bytea), admit_node(bytea, uuid, text, text, text),
  remove_node(uuid, double precision), cut_off_node(uuid) TO tunery_api;
"""

TABLES = ("join_tokens", "node_credentials")
GRANTS = {
    ("tunery_api", "join_tokens"): "SELECT (id, created_by, created_at, expires_at, used_at, node_id), INSERT",
    ("tunery_api", "node_credentials"): "SELECT (node_id, created_at, revoked_at)",
    ("tunery_scheduler", "node_credentials"): "SELECT",
}
NODES = "id = app_node()"


def upgrade() -> None:
    op.add_column("nodes", sa.Column("removed_at", sa.DateTime(timezone=True), nullable=True))
    op.drop_constraint(op.f("uq_nodes_name"), "nodes")
    op.create_index(
        "ix_nodes_name_in_use", "nodes", ["name"], unique=True, postgresql_where=sa.text("removed_at IS NULL")
    )
    op.create_table(
        "node_credentials",
        sa.Column("node_id", sa.Uuid(), nullable=False),
        sa.Column("redis_sha256", sa.String(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("revoked_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(["node_id"], ["nodes.id"], name=op.f("fk_node_credentials_node_id")),
        sa.PrimaryKeyConstraint("node_id", name=op.f("pk_node_credentials")),
    )
    op.create_table(
        "join_tokens",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("token_hmac", sa.LargeBinary(), nullable=False),
        sa.Column("created_by", sa.Uuid(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("used_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("node_id", sa.Uuid(), nullable=True),
        sa.CheckConstraint("(used_at IS NULL) = (node_id IS NULL)", name=op.f("ck_join_tokens_used_by_a_node")),
        sa.ForeignKeyConstraint(["created_by"], ["api_keys.id"], name=op.f("fk_join_tokens_created_by")),
        sa.ForeignKeyConstraint(["node_id"], ["nodes.id"], name=op.f("fk_join_tokens_node_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_join_tokens")),
        sa.UniqueConstraint("token_hmac", name=op.f("uq_join_tokens_token_hmac")),
    )
    op.execute(IDENTITY)
    op.execute(FUNCTIONS)
    for table in TABLES:
        op.execute(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY")
        op.execute(f"ALTER TABLE {table} FORCE ROW LEVEL SECURITY")
        op.execute(f"CREATE POLICY owner ON {table} TO tunery_owner USING (true) WITH CHECK (true)")
        op.execute(f"CREATE POLICY backup ON {table} FOR SELECT TO tunery_backup USING (true)")
        op.execute(f"GRANT SELECT ON {table} TO tunery_backup")
    for (role, table), privileges in GRANTS.items():
        op.execute(f"CREATE POLICY {role} ON {table} TO {role} USING (true) WITH CHECK (true)")
        op.execute(f"GRANT {privileges} ON {table} TO {role}")
    # A removed node is not there for its own process: its heartbeat finds nothing, and it cannot register anew.
    present = f"{NODES} AND removed_at IS NULL"
    op.execute(f"ALTER POLICY tunery_worker ON nodes USING ({present}) WITH CHECK ({present})")


def downgrade() -> None:
    op.execute(f"ALTER POLICY tunery_worker ON nodes USING ({NODES}) WITH CHECK ({NODES})")
    op.execute(
        "DROP FUNCTION find_join_token(bytea), admit_node(bytea, uuid, text, text, text), "
        "remove_node(uuid, double precision), cut_off_node(uuid)"
    )
    op.execute(IDENTITY_BEFORE)
    op.drop_table("join_tokens")
    op.drop_table("node_credentials")
    op.drop_index("ix_nodes_name_in_use", table_name="nodes")
    op.execute("UPDATE nodes SET name = name || ' ' || id WHERE removed_at IS NOT NULL")
    op.create_unique_constraint(op.f("uq_nodes_name"), "nodes", ["name"])
    op.drop_column("nodes", "removed_at")
