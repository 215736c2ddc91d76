"""Operating a cluster: labels that an operator gave, a record of what admins changed, counts across projects."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "operations"
down_revision = "budgets"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("nodes", sa.Column("operator_labels", JSONB(), server_default="{}", nullable=False))
    op.create_index("ix_attempts_succeeded", "attempts", ["ended_at"], postgresql_where=sa.text("state = 'succeeded'"))
    op.create_table(
        "audit_log",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("key_id", sa.Uuid(), nullable=False),
        sa.Column("key_name", sa.String(), nullable=False),
        sa.Column("key_project_id", sa.Uuid(), nullable=False),
        sa.Column("action", sa.String(), nullable=False),
        sa.Column("target", sa.String(), nullable=False),
        sa.Column("before", JSONB(), nullable=True),
        sa.Column("after", JSONB(), nullable=True),
        sa.Column("request_id", sa.String(), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_audit_log")),
    )
    op.execute(FUNCTIONS)
    op.execute("ALTER TABLE audit_log ENABLE ROW LEVEL SECURITY")
    op.execute("ALTER TABLE audit_log FORCE ROW LEVEL SECURITY")
    op.execute("CREATE POLICY owner ON audit_log TO tunery_owner USING (true) WITH CHECK (true)")
    op.execute("CREATE POLICY backup ON audit_log FOR SELECT TO tunery_backup USING (true)")
    op.execute(GRANTS)


def downgrade() -> None:
    op.execute(REVOKES)
    op.execute("DROP FUNCTION deployment_projects(), gpu_occupancy(), node_load(), queue_counts()")
    op.drop_table("audit_log")
    op.drop_index("ix_attempts_succeeded", table_name="attempts")
    op.drop_column("nodes", "operator_labels")


# A project sees its own rows. These tell the api what it may say of the others: how many, never which.
FUNCTIONS = """
-- For keys with the scope admin: whose shares there are.
CREATE FUNCTION deployment_projects()
  RETURNS TABLE (id uuid, name text, status text, organization_id uuid, organization text, guarantee float8)
  LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, public AS $$
  SELECT p.id, p.name, p.status, o.id, o.name, p.guarantee
    FROM projects p JOIN organizations o ON o.id = p.organization_id $$;

-- Of each device that is held: by how many attempts, and by which jobs of the calling project.
CREATE FUNCTION gpu_occupancy() RETURNS TABLE (gpu_id uuid, attempts bigint, own_jobs uuid[])
  LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, public AS $$
  SELECT l.gpu_id, count(l.owner_attempt),
         coalesce(array_agg(a.job_id ORDER BY a.job_id) FILTER (WHERE a.project_id = app_project()), '{}')
    FROM allocations l LEFT JOIN attempts a ON a.id = l.owner_attempt
    WHERE l.released_at IS NULL GROUP BY l.gpu_id $$;

-- Of each node with any: attempts that are live, or have ended and still hold its devices; tasks that it runs.
CREATE FUNCTION node_load() RETURNS TABLE (node_id uuid, attempts bigint, tasks bigint)
  LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, public AS $$
  SELECT each.node_id, count(DISTINCT each.attempt_id), count(DISTINCT each.task_id) FROM (
    SELECT a.node_id, a.id AS attempt_id, NULL::uuid AS task_id FROM attempts a
      WHERE a.state IN ('assigned', 'claimed', 'running', 'stopping', 'publishing')
    UNION ALL
    SELECT a.node_id, a.id, NULL FROM allocations l JOIN attempts a ON a.id = l.owner_attempt
      WHERE l.released_at IS NULL
    UNION ALL
    SELECT t.node_id, NULL, t.id FROM tasks t WHERE t.state = 'leased') each
  GROUP BY each.node_id $$;

-- Jobs by what they wait for (NULL: any class), attempts by the class that they hold or held (NULL: all together).
CREATE FUNCTION queue_counts() RETURNS TABLE (what text, gpu_class text, everybody bigint, own bigint)
  LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, public AS $$
  SELECT 'waiting', j.gpu_class, count(*), count(*) FILTER (WHERE j.project_id = app_project())
    FROM jobs j WHERE j.state = 'queued' GROUP BY j.gpu_class
  UNION ALL
  SELECT 'assigned', j.gpu_class, count(*), count(*) FILTER (WHERE j.project_id = app_project())
    FROM attempts a JOIN jobs j ON j.id = a.job_id
    WHERE a.state = 'assigned' AND j.state = 'queued' GROUP BY j.gpu_class
  UNION ALL
  SELECT 'running', g.gpu_class, count(DISTINCT a.id),
         count(DISTINCT a.id) FILTER (WHERE a.project_id = app_project())
    FROM allocations l JOIN gpus g ON g.id = l.gpu_id JOIN attempts a ON a.id = l.owner_attempt
    WHERE l.released_at IS NULL AND a.state IN ('assigned', 'claimed', 'running', 'stopping', 'publishing')
    GROUP BY GROUPING SETS ((g.gpu_class), ())
  UNION ALL
  SELECT 'completed', u.gpu_class, count(DISTINCT a.id),
         count(DISTINCT a.id) FILTER (WHERE a.project_id = app_project())
    FROM attempts a LEFT JOIN usage u ON u.attempt_id = a.id
    WHERE a.state = 'succeeded' AND a.ended_at > now() - interval '24 hours'
    GROUP BY GROUPING SETS ((u.gpu_class), ()) $$;

REVOKE ALL ON FUNCTION deployment_projects(), gpu_occupancy(), node_load(), queue_counts() FROM PUBLIC;
GRANT EXECUTE ON FUNCTION deployment_projects(), gpu_occupancy(), node_load(), queue_counts() TO tunery_api;
"""

# Append-only: no program may change or delete what was written down.
GRANTS = """
CREATE POLICY tunery_api ON audit_log TO tunery_api USING (true) WITH CHECK (true);
GRANT SELECT, INSERT ON audit_log TO tunery_api;
GRANT SELECT ON audit_log TO tunery_backup;
GRANT UPDATE (state, labels, operator_labels) ON nodes TO tunery_api;
GRANT UPDATE (weight, guarantee, cap, max_running_jobs) ON projects TO tunery_api;
GRANT UPDATE (weight, guarantee, cap) ON organizations TO tunery_api;
"""

REVOKES = """
REVOKE UPDATE (state, labels, operator_labels) ON nodes FROM tunery_api;
REVOKE UPDATE (weight, guarantee, cap, max_running_jobs) ON projects FROM tunery_api;
REVOKE UPDATE (weight, guarantee, cap) ON organizations FROM tunery_api;
"""
