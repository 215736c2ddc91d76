"""What usage costs: its price and share, monthly budgets, what accepted jobs hold of them, alerts."""

import sqlalchemy as sa
from alembic import op

revision = "budgets"
down_revision = "estimates"
branch_labels = None
depends_on = None

TABLES = ("budgets", "budget_alerts", "usage_holds")


def upgrade() -> None:
    op.add_column("usage", sa.Column("price_per_hour", sa.Numeric(12, 4), nullable=True))
    op.add_column("usage", sa.Column("share", sa.Float(), server_default="1", nullable=False))
    op.create_index("ix_usage_project_created", "usage", ["project_id", "created_at"])
    op.create_index("ix_usage_job", "usage", ["job_id"])
    op.create_table(
        "budgets",
        sa.Column("project_id", sa.Uuid(), nullable=False),
        sa.Column("monthly_gpu_hours", sa.Numeric(14, 4), nullable=True),
        sa.Column("monthly_amount", sa.Numeric(14, 4), nullable=True),
        sa.Column("exhausted_month", sa.Date(), nullable=True),
        sa.Column("updated_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.CheckConstraint(
            "coalesce(monthly_gpu_hours, 0) >= 0 AND coalesce(monthly_amount, 0) >= 0",
            name=op.f("ck_budgets_limits_positive"),
        ),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_budgets_project_id")),
        sa.PrimaryKeyConstraint("project_id", name=op.f("pk_budgets")),
    )
    op.create_table(
        "budget_alerts",
        sa.Column("project_id", sa.Uuid(), nullable=False),
        sa.Column("month", sa.Date(), nullable=False),
        sa.Column("threshold", sa.Integer(), nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("used", sa.Numeric(14, 4), nullable=False),
        sa.Column("budget", sa.Numeric(14, 4), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.CheckConstraint("kind IN ('amount', 'gpu_hours')", name=op.f("ck_budget_alerts_kind_known")),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_budget_alerts_project_id")),
        sa.PrimaryKeyConstraint("project_id", "month", "threshold", name=op.f("pk_budget_alerts")),
    )
    op.create_table(
        "usage_holds",
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("project_id", sa.Uuid(), nullable=False),
        sa.Column("gpu_seconds", sa.Float(), nullable=False),
        sa.Column("price_per_hour", sa.Numeric(12, 4), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.CheckConstraint("gpu_seconds >= 0", name=op.f("ck_usage_holds_positive")),
        sa.ForeignKeyConstraint(
            ["project_id", "job_id"], ["jobs.project_id", "jobs.id"], name=op.f("fk_usage_holds_project_id")
        ),
        sa.PrimaryKeyConstraint("job_id", name=op.f("pk_usage_holds")),
    )
    op.create_index("ix_usage_holds_project", "usage_holds", ["project_id"])
    op.execute(FUNCTIONS)
    for table in TABLES:
        op.execute(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY")
        op.execute(f"ALTER TABLE {table} FORCE ROW LEVEL SECURITY")
        op.execute(f"CREATE POLICY owner ON {table} TO tunery_owner USING (true) WITH CHECK (true)")
        op.execute(f"CREATE POLICY backup ON {table} FOR SELECT TO tunery_backup USING (true)")
    op.execute(GRANTS)


def downgrade() -> None:
    op.execute("DROP TRIGGER settle_hold ON jobs")
    op.execute("DROP FUNCTION settle_hold()")
    op.execute("DROP FUNCTION live_usage(uuid)")
    op.execute(RELEASE_BEFORE)
    op.execute("DROP FUNCTION attempt_split(attempts, timestamptz)")
    for table in reversed(TABLES):
        op.drop_table(table)
    op.drop_index("ix_usage_job", table_name="usage")
    op.drop_index("ix_usage_project_created", table_name="usage")
    op.drop_column("usage", "share")
    op.drop_column("usage", "price_per_hour")


FUNCTIONS = """
-- How the seconds that an attempt had held its GPUs by some moment are split; the last four add up to the first.
-- Work behind the newest checkpoint of an attempt that was pre-empted, lost or ended by our fault is ours.
CREATE FUNCTION attempt_split(a attempts, by timestamptz, OUT held float8, OUT loading float8, OUT productive float8,
                              OUT users float8, OUT ours float8) LANGUAGE plpgsql STABLE
  SET search_path = pg_catalog, public AS $$
DECLARE
  kept timestamptz;
BEGIN
  held := greatest(extract(epoch FROM by - a.assigned_at), 0);
  loading := least(greatest(extract(epoch FROM coalesce(a.first_step_at, a.ended_at, by) - a.assigned_at), 0), held);
  productive := held - loading;
  users := 0;
  ours := 0;
  IF a.state IN ('preempted', 'lost') OR a.fault = 'platform' THEN
    SELECT max(created_at) INTO kept FROM checkpoints WHERE attempt_id = a.id;
    IF kept IS NULL THEN
      loading := 0;
      productive := 0;
    ELSE
      productive := least(productive, greatest(extract(epoch FROM kept - a.assigned_at) - loading, 0));
    END IF;
    ours := held - loading - productive;
  ELSIF a.fault = 'user' THEN
    users := productive;
    productive := 0;
  END IF;
END $$;

-- Frees what an attempt holds, writes down how the time was spent and at which price, and charges it to its project
-- and organization. An attempt that was never claimed is not charged. GPUs are locked in id order, as everywhere;
-- tenants after them.
CREATE OR REPLACE FUNCTION release_attempt(target uuid) RETURNS boolean LANGUAGE plpgsql SECURITY DEFINER
  SET search_path = pg_catalog, public AS $$
DECLARE
  a attempts%ROWTYPE;
  organization uuid;
  split record;
BEGIN
  SELECT * INTO a FROM attempts WHERE id = target
    AND (project_id = app_project() OR node_id = app_node() OR session_user = 'tunery_scheduler');
  IF NOT FOUND THEN
    RETURN false;
  END IF;
  PERFORM 1 FROM gpus WHERE id IN
    (SELECT gpu_id FROM allocations WHERE owner_attempt = target AND released_at IS NULL)
    ORDER BY id FOR NO KEY UPDATE;
  IF a.claimed_at IS NOT NULL
      AND EXISTS (SELECT FROM allocations WHERE owner_attempt = target AND released_at IS NULL) THEN
    SELECT organization_id INTO organization FROM jobs WHERE id = a.job_id;
    SELECT * INTO split FROM attempt_split(a, now());
    INSERT INTO usage (id, organization_id, project_id, job_id, attempt_id, gpu_id, gpu_class, gpu_seconds,
                       loading_s, productive_s, user_fault_s, platform_fault_s, price_per_hour, share)
      SELECT gen_random_uuid(), organization, a.project_id, a.job_id, a.id, g.id, g.gpu_class, split.held,
             split.loading, split.productive, split.users, split.ours, c.price_per_hour,
             CASE WHEN l.exclusive THEN 1 ELSE l.bytes::float8 / greatest(g.usable_bytes, 1) END
      FROM allocations l JOIN gpus g ON g.id = l.gpu_id LEFT JOIN gpu_classes c ON c.name = g.gpu_class
      WHERE l.owner_attempt = target AND l.released_at IS NULL
      ON CONFLICT DO NOTHING;
    IF FOUND THEN
      UPDATE projects SET service = service + a.rate * (split.held - split.ours) WHERE id = a.project_id;
      UPDATE organizations SET service = service + a.rate * (split.held - split.ours) WHERE id = organization;
    END IF;
  END IF;
  UPDATE allocations SET released_at = now() WHERE owner_attempt = target AND released_at IS NULL;
  UPDATE slots SET attempt_id = NULL WHERE attempt_id = target;
  RETURN true;
END $$;

-- What attempts that still hold GPUs have used up to now, as their usage would be written. A project sees its own; the
-- scheduler everybody's where it wants no one in particular.
CREATE FUNCTION live_usage(wanted uuid) RETURNS TABLE (
    project_id uuid, job_id uuid, attempt_id uuid, gpu_id uuid, gpu_class varchar, since timestamptz,
    gpu_seconds float8, loading_s float8, productive_s float8, user_fault_s float8, platform_fault_s float8,
    price_per_hour numeric, share float8)
  LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, public AS $$
  SELECT a.project_id, a.job_id, a.id, g.id, g.gpu_class, a.assigned_at,
         s.held, s.loading, s.productive, s.users, s.ours, c.price_per_hour,
         CASE WHEN l.exclusive THEN 1 ELSE l.bytes::float8 / greatest(g.usable_bytes, 1) END
  FROM allocations l JOIN attempts a ON a.id = l.owner_attempt JOIN gpus g ON g.id = l.gpu_id
    LEFT JOIN gpu_classes c ON c.name = g.gpu_class CROSS JOIN LATERAL attempt_split(a, now()) s
  WHERE l.released_at IS NULL AND a.claimed_at IS NOT NULL AND (wanted IS NULL OR a.project_id = wanted)
    AND (a.project_id = app_project() OR session_user = 'tunery_scheduler') $$;

-- A job that has ended holds nothing of its project's budget, whoever ended it: what it used is written down.
CREATE FUNCTION settle_hold() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER
  SET search_path = pg_catalog, public AS $$
BEGIN
  DELETE FROM usage_holds WHERE job_id = NEW.id;
  RETURN NULL;
END $$;
CREATE TRIGGER settle_hold AFTER UPDATE OF state ON jobs FOR EACH ROW
  WHEN (NEW.state IN ('succeeded', 'failed', 'cancelled')) EXECUTE FUNCTION settle_hold();

REVOKE ALL ON FUNCTION attempt_split(attempts, timestamptz), live_usage(uuid) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION live_usage(uuid) TO tunery_api, tunery_scheduler;
"""

GRANTS = """
CREATE POLICY tunery_scheduler ON budgets TO tunery_scheduler USING (true) WITH CHECK (true);
CREATE POLICY tunery_scheduler ON budget_alerts TO tunery_scheduler USING (true) WITH CHECK (true);
CREATE POLICY tunery_scheduler ON usage_holds TO tunery_scheduler USING (true) WITH CHECK (true);
GRANT SELECT, UPDATE (exhausted_month) ON budgets TO tunery_scheduler;
GRANT SELECT, INSERT ON budget_alerts TO tunery_scheduler;
GRANT SELECT ON usage_holds TO tunery_scheduler;

CREATE POLICY tunery_api ON budgets TO tunery_api
  USING (project_id = app_project()) WITH CHECK (project_id = app_project());
CREATE POLICY tunery_api ON budget_alerts TO tunery_api
  USING (project_id = app_project()) WITH CHECK (project_id = app_project());
CREATE POLICY tunery_api ON usage_holds TO tunery_api
  USING (project_id = app_project()) WITH CHECK (project_id = app_project());
GRANT SELECT, INSERT, UPDATE (monthly_gpu_hours, monthly_amount, exhausted_month, updated_at) ON budgets TO tunery_api;
GRANT SELECT ON budget_alerts TO tunery_api;
GRANT SELECT, INSERT ON usage_holds TO tunery_api;

CREATE POLICY tunery_worker ON usage_holds TO tunery_worker
  USING (node_holds_job(job_id)) WITH CHECK (node_holds_job(job_id));
GRANT SELECT, UPDATE (gpu_seconds) ON usage_holds TO tunery_worker;
"""

RELEASE_BEFORE = """
CREATE OR REPLACE FUNCTION release_attempt(target uuid) RETURNS boolean LANGUAGE plpgsql SECURITY DEFINER
  SET search_path = pg_catalog, public AS $$
DECLARE
  a attempts%ROWTYPE;
  organization uuid;
  held float8;
  loading float8;
  productive float8;
  users float8 := 0;
  ours float8 := 0;
  kept timestamptz;
BEGIN
  SELECT * INTO a FROM attempts WHERE id = target
    AND (project_id = app_project() OR node_id = app_node() OR session_user = 'tunery_scheduler');
  IF NOT FOUND THEN
    RETURN false;
  END IF;
  PERFORM 1 FROM gpus WHERE id IN
    (SELECT gpu_id FROM allocations WHERE owner_attempt = target AND released_at IS NULL)
    ORDER BY id FOR NO KEY UPDATE;
  IF a.claimed_at IS NOT NULL
      AND EXISTS (SELECT FROM allocations WHERE owner_attempt = target AND released_at IS NULL) THEN
    SELECT organization_id INTO organization FROM jobs WHERE id = a.job_id;
    held := extract(epoch FROM now() - a.assigned_at);
    loading := extract(epoch FROM coalesce(a.first_step_at, a.ended_at, now()) - a.assigned_at);
    productive := greatest(held - loading, 0);
    IF a.state IN ('preempted', 'lost') OR a.fault = 'platform' THEN
      SELECT max(created_at) INTO kept FROM checkpoints WHERE attempt_id = target;
      IF kept IS NULL THEN
        ours := held;
        loading := 0;
        productive := 0;
      ELSE
        productive := least(productive, greatest(extract(epoch FROM kept - a.assigned_at) - loading, 0));
        ours := greatest(held - loading - productive, 0);
      END IF;
    ELSIF a.fault = 'user' THEN
      users := productive;
      productive := 0;
    END IF;
    INSERT INTO usage (id, organization_id, project_id, job_id, attempt_id, gpu_id, gpu_class, gpu_seconds,
                       loading_s, productive_s, user_fault_s, platform_fault_s)
      SELECT gen_random_uuid(), organization, a.project_id, a.job_id, a.id, g.id, g.gpu_class, held,
             loading, productive, users, ours
      FROM allocations l JOIN gpus g ON g.id = l.gpu_id
      WHERE l.owner_attempt = target AND l.released_at IS NULL
      ON CONFLICT DO NOTHING;
    IF FOUND THEN
      UPDATE projects SET service = service + a.rate * (held - ours) WHERE id = a.project_id;
      UPDATE organizations SET service = service + a.rate * (held - ours) WHERE id = organization;
    END IF;
  END IF;
  UPDATE allocations SET released_at = now() WHERE owner_attempt = target AND released_at IS NULL;
  UPDATE slots SET attempt_id = NULL WHERE attempt_id = target;
  RETURN true;
END $$;
"""
