"""A long queue and a long ledger are read by what they amount to, not row by row."""

import sqlalchemy as sa
from alembic import op

revision = "scale"
down_revision = "forecasts"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index(
        "ix_jobs_waiting",
        "jobs",
        ["project_id", sa.text("urgent DESC"), sa.text("priority DESC"), "queued_at", "id"],
        postgresql_where=sa.text("state = 'queued'"),
    )
    op.create_index(
        "ix_jobs_waiting_class", "jobs", ["gpu_class", "project_id"], postgresql_where=sa.text("state = 'queued'")
    )
    op.create_table(
        "usage_totals",
        sa.Column("project_id", sa.Uuid(), nullable=False),
        sa.Column("month", sa.Date(), nullable=False),
        sa.Column("charged_s", sa.Float(), server_default="0", nullable=False),
        sa.Column("amount", sa.Numeric(), server_default="0", nullable=False),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_usage_totals_project_id")),
        sa.PrimaryKeyConstraint("project_id", "month", name=op.f("pk_usage_totals")),
    )
    op.execute("ALTER TABLE usage_totals ENABLE ROW LEVEL SECURITY")
    op.execute("ALTER TABLE usage_totals FORCE ROW LEVEL SECURITY")
    op.execute("CREATE POLICY owner ON usage_totals TO tunery_owner USING (true) WITH CHECK (true)")
    op.execute("CREATE POLICY backup ON usage_totals FOR SELECT TO tunery_backup USING (true)")
    op.execute(GRANTS)
    op.execute("LOCK usage IN SHARE ROW EXCLUSIVE MODE")  # what is written from here on is added by the triggers
    op.execute(TOTALS)
    op.execute(COUNTS.replace("= app_project()", "= (SELECT app_project())"))  # asked once, not for each row


def downgrade() -> None:
    op.execute(COUNTS)
    op.execute("DROP TRIGGER add_usage ON usage")
    op.execute("DROP TRIGGER change_usage ON usage")
    op.execute("DROP TRIGGER remove_usage ON usage")
    op.execute("DROP FUNCTION total_usage()")
    op.drop_table("usage_totals")
    op.drop_index("ix_jobs_waiting_class", table_name="jobs")
    op.drop_index("ix_jobs_waiting", table_name="jobs")


GRANTS = """
GRANT SELECT ON usage_totals TO tunery_backup;
CREATE POLICY tunery_api ON usage_totals TO tunery_api
  USING (project_id = app_project()) WITH CHECK (project_id = app_project());
CREATE POLICY tunery_scheduler ON usage_totals TO tunery_scheduler USING (true) WITH CHECK (true);
GRANT SELECT ON usage_totals TO tunery_api, tunery_scheduler;
"""

TOTALS = """
-- Keeps `usage_totals` the sum of `usage`, by project and month (UTC), whoever writes there. Rows are locked in their
-- order; a project's own row of `projects` is locked after it, as everywhere.
CREATE FUNCTION total_usage() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER
  SET search_path = pg_catalog, public SET timezone = 'UTC' AS $$
BEGIN
  IF TG_OP <> 'INSERT' THEN
    UPDATE usage_totals t SET charged_s = t.charged_s - s.charged_s, amount = t.amount - s.amount FROM (
      SELECT project_id, date_trunc('month', created_at)::date AS month,
        sum((gpu_seconds - platform_fault_s) * share) AS charged_s,
        coalesce(sum(((gpu_seconds - platform_fault_s) * share)::numeric / 3600 * price_per_hour), 0) AS amount
      FROM gone GROUP BY 1, 2) s
    WHERE t.project_id = s.project_id AND t.month = s.month;
  END IF;
  IF TG_OP <> 'DELETE' THEN
    INSERT INTO usage_totals AS t (project_id, month, charged_s, amount)
      SELECT project_id, date_trunc('month', created_at)::date,
        sum((gpu_seconds - platform_fault_s) * share),
        coalesce(sum(((gpu_seconds - platform_fault_s) * share)::numeric / 3600 * price_per_hour), 0)
      FROM come GROUP BY 1, 2 ORDER BY 1, 2
      ON CONFLICT (project_id, month) DO UPDATE SET charged_s = t.charged_s + excluded.charged_s,
        amount = t.amount + excluded.amount;
  END IF;
  RETURN NULL;
END $$;
REVOKE ALL ON FUNCTION total_usage() FROM PUBLIC;
CREATE TRIGGER add_usage AFTER INSERT ON usage
  REFERENCING NEW TABLE AS come FOR EACH STATEMENT EXECUTE FUNCTION total_usage();
CREATE TRIGGER change_usage AFTER UPDATE ON usage
  REFERENCING OLD TABLE AS gone NEW TABLE AS come FOR EACH STATEMENT EXECUTE FUNCTION total_usage();
CREATE TRIGGER remove_usage AFTER DELETE ON usage
  REFERENCING OLD TABLE AS gone FOR EACH STATEMENT EXECUTE FUNCTION total_usage();
SET LOCAL timezone = 'UTC';
INSERT INTO usage_totals (project_id, month, charged_s, amount)
  SELECT project_id, date_trunc('month', created_at)::date, sum((gpu_seconds - platform_fault_s) * share),
    coalesce(sum(((gpu_seconds - platform_fault_s) * share)::numeric / 3600 * price_per_hour), 0)
  FROM usage GROUP BY 1, 2;
"""

COUNTS = """
CREATE OR REPLACE FUNCTION queue_counts() RETURNS TABLE (what text, gpu_class text, everybody bigint, own bigint)
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
"""
