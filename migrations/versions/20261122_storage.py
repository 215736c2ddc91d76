"""What is kept and for how long: tombstones, objects to delete, holds while a backup runs, a limit a project."""

import sqlalchemy as sa
from alembic import op

revision = "storage"
down_revision = "joined_nodes"
branch_labels = None
depends_on = None

TABLES = ("object_deletions", "deletion_holds")


def upgrade() -> None:
    for table in ("jobs", "adapter_versions"):
        op.add_column(table, sa.Column("deleted_at", sa.DateTime(timezone=True)))
    op.add_column("checkpoints", sa.Column("state_deleted_at", sa.DateTime(timezone=True)))
    op.add_column("attempts", sa.Column("logs_deleted_at", sa.DateTime(timezone=True)))
    op.add_column("projects", sa.Column("max_storage_bytes", sa.BigInteger()))
    op.create_check_constraint("storage_positive", "projects", "max_storage_bytes >= 0")
    op.create_table(
        "object_deletions",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("project_id", sa.Uuid(), nullable=False),
        sa.Column("key", sa.String(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_object_deletions_project_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_object_deletions")),
    )
    op.create_table(
        "deletion_holds",
        sa.Column("holder", sa.String(), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("holder", name=op.f("pk_deletion_holds")),
    )
    op.execute(FUNCTIONS)
    for table in TABLES:
        op.execute(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY")
        op.execute(f"ALTER TABLE {table} FORCE ROW LEVEL SECURITY")
        op.execute(f"CREATE POLICY owner ON {table} TO tunery_owner USING (true) WITH CHECK (true)")
        op.execute(f"CREATE POLICY backup ON {table} FOR SELECT TO tunery_backup USING (true)")
    op.execute(GRANTS)


def downgrade() -> None:
    op.execute(REVOKES)
    op.execute("DROP FUNCTION hold_deletions(text, float8), release_deletions(text), forget_job(uuid)")
    for table in TABLES:
        op.drop_table(table)
    op.drop_constraint(op.f("ck_projects_storage_positive"), "projects")
    for table, column in (
        ("projects", "max_storage_bytes"),
        ("attempts", "logs_deleted_at"),
        ("checkpoints", "state_deleted_at"),
        ("adapter_versions", "deleted_at"),
        ("jobs", "deleted_at"),
    ):
        op.drop_column(table, column)


FUNCTIONS = """
-- The one thing that a backup may change: nothing is deleted from the store while it copies. An hour at most at a time.
CREATE FUNCTION hold_deletions(who text, seconds float8) RETURNS boolean LANGUAGE plpgsql SECURITY DEFINER
  SET search_path = pg_catalog, public AS $$
DECLARE unbroken boolean;
BEGIN
  SELECT expires_at > now() INTO unbroken FROM deletion_holds WHERE holder = who;
  INSERT INTO deletion_holds (holder, expires_at)
    VALUES (who, now() + make_interval(secs => least(seconds, 3600)))
    ON CONFLICT (holder) DO UPDATE SET expires_at = excluded.expires_at;
  RETURN coalesce(unbroken, true);
END $$;
CREATE FUNCTION release_deletions(who text) RETURNS void LANGUAGE sql SECURITY DEFINER
  SET search_path = pg_catalog, public AS $$ DELETE FROM deletion_holds WHERE holder = who $$;

-- An ended job and all it left behind, except what it published and what it cost.
CREATE FUNCTION forget_job(target uuid) RETURNS boolean LANGUAGE plpgsql SECURITY DEFINER
  SET search_path = pg_catalog, public AS $$
BEGIN
  PERFORM 1 FROM jobs WHERE id = target AND project_id = app_project() AND deleted_at IS NULL
    AND state IN ('succeeded', 'failed', 'cancelled') FOR UPDATE;
  IF NOT FOUND THEN
    RETURN false;
  END IF;
  INSERT INTO object_deletions (project_id, key)
    SELECT c.project_id, c.object_prefix || '/' || (f ->> 'name')
    FROM checkpoints c CROSS JOIN jsonb_array_elements(c.files) f
    WHERE c.job_id = target AND c.deleted_at IS NULL
      AND NOT EXISTS (SELECT FROM adapter_versions v WHERE v.object_prefix = c.object_prefix AND v.deleted_at IS NULL)
    UNION ALL
    SELECT a.project_id, 'a/' || a.project_id || '/' || a.id || '/logs/' FROM attempts a
    WHERE a.job_id = target AND a.logs_deleted_at IS NULL;
  UPDATE checkpoints SET deleted_at = now(), metrics = '{}' WHERE job_id = target AND deleted_at IS NULL;
  DELETE FROM metric_chunks c USING metric_series s WHERE s.id = c.series_id AND s.job_id = target;
  DELETE FROM metric_series WHERE job_id = target;
  DELETE FROM events WHERE job_id = target;
  UPDATE tasks SET error = NULL WHERE job_id = target;
  UPDATE attempts SET logs_deleted_at = coalesce(logs_deleted_at, now()), failure_message = NULL, details = NULL
    WHERE job_id = target;
  UPDATE jobs SET deleted_at = now(), user_metadata = NULL, progress = NULL, error_message = NULL,
    train_dataset_id = NULL, validation_dataset_id = NULL WHERE id = target;
  RETURN true;
END $$;

REVOKE ALL ON FUNCTION hold_deletions(text, float8), release_deletions(text), forget_job(uuid) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION hold_deletions(text, float8), release_deletions(text) TO tunery_backup;
GRANT EXECUTE ON FUNCTION forget_job(uuid) TO tunery_api;
"""

GRANTS = """
CREATE POLICY tunery_api ON object_deletions TO tunery_api
  USING (project_id = app_project()) WITH CHECK (project_id = app_project());
GRANT SELECT, INSERT ON object_deletions TO tunery_api;
GRANT UPDATE (deleted_at) ON adapter_versions TO tunery_api;

CREATE POLICY tunery_scheduler ON object_deletions TO tunery_scheduler USING (true) WITH CHECK (true);
CREATE POLICY tunery_scheduler ON deletion_holds TO tunery_scheduler USING (true) WITH CHECK (true);
CREATE POLICY tunery_scheduler ON files TO tunery_scheduler USING (true) WITH CHECK (true);
CREATE POLICY tunery_scheduler ON datasets TO tunery_scheduler USING (true) WITH CHECK (true);
CREATE POLICY tunery_scheduler ON adapter_versions TO tunery_scheduler USING (true) WITH CHECK (true);
GRANT SELECT, INSERT, DELETE ON object_deletions TO tunery_scheduler;
GRANT SELECT ON deletion_holds TO tunery_scheduler;
GRANT SELECT, UPDATE (deleted_at) ON files TO tunery_scheduler;
GRANT SELECT, DELETE ON datasets TO tunery_scheduler;
GRANT SELECT ON adapter_versions TO tunery_scheduler;
GRANT UPDATE (files, bytes, deleted_at, state_deleted_at) ON checkpoints TO tunery_scheduler;
GRANT UPDATE (logs_deleted_at) ON attempts TO tunery_scheduler;

-- A dump reads the sequences and the schema's version too; what later migrations add is readable from the start.
GRANT SELECT ON ALL TABLES IN SCHEMA public TO tunery_backup;
GRANT SELECT ON ALL SEQUENCES IN SCHEMA public TO tunery_backup;
ALTER DEFAULT PRIVILEGES IN SCHEMA public GRANT SELECT ON TABLES TO tunery_backup;
ALTER DEFAULT PRIVILEGES IN SCHEMA public GRANT SELECT ON SEQUENCES TO tunery_backup;
"""

REVOKES = """
ALTER DEFAULT PRIVILEGES IN SCHEMA public REVOKE SELECT ON TABLES FROM tunery_backup;
ALTER DEFAULT PRIVILEGES IN SCHEMA public REVOKE SELECT ON SEQUENCES FROM tunery_backup;
REVOKE SELECT ON ALL SEQUENCES IN SCHEMA public FROM tunery_backup;
REVOKE SELECT ON alembic_version FROM tunery_backup;
REVOKE UPDATE (deleted_at) ON adapter_versions FROM tunery_api;
REVOKE SELECT, UPDATE (deleted_at) ON files FROM tunery_scheduler;
REVOKE SELECT, DELETE ON datasets FROM tunery_scheduler;
REVOKE SELECT ON adapter_versions FROM tunery_scheduler;
REVOKE UPDATE (files, bytes, deleted_at, state_deleted_at) ON checkpoints FROM tunery_scheduler;
REVOKE UPDATE (logs_deleted_at) ON attempts FROM tunery_scheduler;
DROP POLICY tunery_scheduler ON files;
DROP POLICY tunery_scheduler ON datasets;
DROP POLICY tunery_scheduler ON adapter_versions;
"""
