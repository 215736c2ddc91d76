"""Fair share: weights, guarantees and caps, what a job asks of the scheduler, what it keeps for whom, and why jobs wait."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "scheduling"
down_revision = "traces"
branch_labels = None
depends_on = None

TABLES = ("gpu_classes", "holds", "queue_views", "run_observations")


def _share() -> tuple[sa.Column[object], ...]:
    return (
        sa.Column("weight", sa.Float(), server_default="1", nullable=False),
        sa.Column("guarantee", sa.Float(), server_default="0", nullable=False),
        sa.Column("cap", sa.Float(), nullable=True),
        sa.Column("service", sa.Float(), server_default="0", nullable=False),
        sa.Column("active", sa.Boolean(), server_default=sa.text("false"), nullable=False),
    )


def upgrade() -> None:
    for table in ("organizations", "projects"):
        for column in _share():
            op.add_column(table, column)
        op.create_check_constraint("weight_positive", table, "weight > 0")
        op.create_check_constraint(
            "guarantee_below_cap", table, "guarantee >= 0 AND guarantee <= coalesce(cap, 'Infinity')"
        )
    op.add_column("projects", sa.Column("max_running_jobs", sa.Integer(), nullable=True))
    op.add_column("projects", sa.Column("blocked", sa.String(), nullable=True))
    for column in (
        sa.Column("priority", sa.Integer(), server_default="0", nullable=False),
        sa.Column("urgent", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("time_limit_s", sa.Float(), nullable=True),
        sa.Column("limit_s", sa.Float(), server_default="1800", nullable=False),
        sa.Column("used_s", sa.Float(), server_default="0", nullable=False),
        sa.Column("gpu_class", sa.String(), nullable=True),
        sa.Column("node_labels", JSONB(), server_default="{}", nullable=False),
        sa.Column("shareable", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("preemptible", sa.Boolean(), server_default=sa.text("true"), nullable=False),
        sa.Column("engine_key", sa.String(), nullable=True),
        sa.Column("engine_bytes", sa.BigInteger(), nullable=True),
        sa.Column("changed_in", sa.BigInteger(), server_default="0", nullable=False),
    ):
        op.add_column("jobs", column)
    op.create_check_constraint("priority_sane", "jobs", "priority BETWEEN -100 AND 100")
    op.create_check_constraint("limits_positive", "jobs", "limit_s > 0 AND coalesce(time_limit_s, 1) > 0")
    op.create_index("ix_jobs_changed", "jobs", ["changed_in"])
    for column in (
        sa.Column("limit_s", sa.Float(), server_default="1800", nullable=False),
        sa.Column("rate", sa.Float(), server_default="1", nullable=False),
        sa.Column("first_step_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("stop_by", sa.DateTime(timezone=True), nullable=True),
        sa.Column("preempted_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("preempted_for", sa.Uuid(), nullable=True),
        sa.Column("preempted_for_project", sa.Uuid(), nullable=True),
        sa.Column("fault", sa.String(), nullable=True),
    ):
        op.add_column("attempts", column)
    op.create_index(
        "ix_attempts_preempted", "attempts", ["preempted_at"], postgresql_where=sa.text("preempted_at IS NOT NULL")
    )
    op.add_column("gpus", sa.Column("gpu_class", sa.String(), server_default="unclassified", nullable=False))
    for name in ("loading_s", "productive_s", "user_fault_s", "platform_fault_s"):
        op.add_column("usage", sa.Column(name, sa.Float(), server_default="0", nullable=False))
    op.add_column("nodes", sa.Column("labels", JSONB(), server_default="{}", nullable=False))
    op.create_table(
        "gpu_classes",
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("cost", sa.Float(), server_default="1", nullable=False),
        sa.Column("price_per_hour", sa.Numeric(12, 4), nullable=True),
        sa.CheckConstraint("cost > 0", name=op.f("ck_gpu_classes_cost_positive")),
        sa.CheckConstraint("price_per_hour >= 0", name=op.f("ck_gpu_classes_price_positive")),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_gpu_classes")),
    )
    op.create_table(
        "holds",
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("project_id", sa.Uuid(), nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("gpu_class", sa.String(), nullable=False),
        sa.Column("node_id", sa.Uuid(), nullable=False),
        sa.Column("gpu_ids", sa.ARRAY(sa.Uuid()), nullable=False),
        sa.Column("promised_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.CheckConstraint("kind IN ('gang', 'preemption')", name=op.f("ck_holds_kind_known")),
        sa.ForeignKeyConstraint(
            ["project_id", "job_id"], ["jobs.project_id", "jobs.id"], name=op.f("fk_holds_project_id")
        ),
        sa.ForeignKeyConstraint(["node_id"], ["nodes.id"], name=op.f("fk_holds_node_id")),
        sa.PrimaryKeyConstraint("job_id", name=op.f("pk_holds")),
    )
    op.create_table(
        "queue_views",
        sa.Column("project_id", sa.Uuid(), nullable=False),
        sa.Column("reasons", JSONB(), server_default="{}", nullable=False),
        sa.Column("reasons_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("forecast", JSONB(), server_default="{}", nullable=False),
        sa.Column("forecast_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_queue_views_project_id")),
        sa.PrimaryKeyConstraint("project_id", name=op.f("pk_queue_views")),
    )
    op.create_table(
        "run_observations",
        sa.Column("attempt_id", sa.Uuid(), nullable=False),
        sa.Column("project_id", sa.Uuid(), nullable=False),
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("base_model_id", sa.Uuid(), nullable=False),
        sa.Column("gpu_class", sa.String(), nullable=False),
        sa.Column("gpus", sa.Integer(), nullable=False),
        sa.Column("method", sa.String(), nullable=False),
        sa.Column("outcome", sa.String(), nullable=False),
        sa.Column("estimated_bytes", sa.BigInteger(), nullable=False),
        sa.Column("peak_bytes", sa.BigInteger(), nullable=False),
        sa.Column("tokens", sa.BigInteger(), nullable=False),
        sa.Column("load_s", sa.Float(), nullable=False),
        sa.Column("train_s", sa.Float(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.ForeignKeyConstraint(
            ["project_id", "attempt_id"],
            ["attempts.project_id", "attempts.id"],
            name=op.f("fk_run_observations_project_id"),
        ),
        sa.ForeignKeyConstraint(["base_model_id"], ["base_models.id"], name=op.f("fk_run_observations_base_model_id")),
        sa.PrimaryKeyConstraint("attempt_id", name=op.f("pk_run_observations")),
    )
    op.create_index("ix_run_observations_base", "run_observations", ["base_model_id", "gpu_class", "created_at"])
    op.execute(FUNCTIONS)
    for table in TABLES:
        op.execute(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY")
        op.execute(f"ALTER TABLE {table} FORCE ROW LEVEL SECURITY")
        op.execute(f"CREATE POLICY owner ON {table} TO tunery_owner USING (true) WITH CHECK (true)")
        op.execute(f"CREATE POLICY backup ON {table} FOR SELECT TO tunery_backup USING (true)")
    op.execute(GRANTS)


def downgrade() -> None:
    op.execute(REVOKES)
    op.execute("DROP TRIGGER note_change ON jobs")
    op.execute("DROP FUNCTION note_job_change()")
    op.execute(RELEASE_BEFORE)
    for table in TABLES:
        op.drop_table(table)
    op.drop_column("nodes", "labels")
    op.drop_column("gpus", "gpu_class")
    for column in ("user_fault_s", "platform_fault_s", "productive_s", "loading_s"):
        op.drop_column("usage", column)
    op.drop_index("ix_attempts_preempted", table_name="attempts")
    for column in (
        "fault", "preempted_for_project", "preempted_for", "preempted_at", "stop_by", "first_step_at", "rate", "limit_s",
    ):  # fmt: skip
        op.drop_column("attempts", column)
    op.drop_index("ix_jobs_changed", table_name="jobs")
    op.drop_constraint(op.f("ck_jobs_limits_positive"), "jobs")
    op.drop_constraint(op.f("ck_jobs_priority_sane"), "jobs")
    for column in (
        "changed_in", "engine_bytes", "engine_key", "preemptible", "shareable", "node_labels", "gpu_class", "used_s",
        "limit_s", "time_limit_s", "urgent", "priority",
    ):  # fmt: skip
        op.drop_column("jobs", column)
    for column in ("blocked", "max_running_jobs"):
        op.drop_column("projects", column)
    for table in ("projects", "organizations"):
        op.drop_constraint(op.f(f"ck_{table}_guarantee_below_cap"), table)
        op.drop_constraint(op.f(f"ck_{table}_weight_positive"), table)
        for column in ("active", "service", "cap", "guarantee", "weight"):
            op.drop_column(table, column)


FUNCTIONS = """
-- The transaction that last changed what the scheduler looks at. A pass reads the jobs changed since the oldest
-- transaction that the pass before could not see: nothing that commits late is missed.
CREATE FUNCTION note_job_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  NEW.changed_in := pg_current_xact_id()::text::bigint;
  RETURN NEW;
END $$;
CREATE TRIGGER note_change BEFORE INSERT OR UPDATE OF state, priority, urgent, limit_s, gpus, required_bytes, gpu_class,
  node_labels, shareable, preemptible, engine_key, engine_bytes ON jobs
  FOR EACH ROW EXECUTE FUNCTION note_job_change();

-- Frees what an attempt holds, writes down how the time was spent, and charges it to its project and organization.
-- Work behind the newest checkpoint of an attempt that was pre-empted, lost or ended by our fault is not charged, nor
-- is an attempt that was never claimed. GPUs are locked in id order, as everywhere; tenants after them.
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

RELEASE_BEFORE = """
CREATE OR REPLACE FUNCTION release_attempt(target uuid) RETURNS boolean LANGUAGE plpgsql SECURITY DEFINER
  SET search_path = pg_catalog, public AS $$
BEGIN
  PERFORM 1 FROM attempts WHERE id = target
    AND (project_id = app_project() OR node_id = app_node() OR session_user = 'tunery_scheduler');
  IF NOT FOUND THEN
    RETURN false;
  END IF;
  PERFORM 1 FROM gpus WHERE id IN
    (SELECT gpu_id FROM allocations WHERE owner_attempt = target AND released_at IS NULL)
    ORDER BY id FOR NO KEY UPDATE;
  INSERT INTO usage (id, organization_id, project_id, job_id, attempt_id, gpu_id, gpu_class, gpu_seconds)
    SELECT gen_random_uuid(), j.organization_id, a.project_id, a.job_id, a.id, g.id, g.name,
           extract(epoch FROM now() - a.claimed_at)
    FROM attempts a JOIN jobs j ON j.id = a.job_id JOIN allocations l ON l.owner_attempt = a.id
      JOIN gpus g ON g.id = l.gpu_id
    WHERE a.id = target AND l.released_at IS NULL AND a.claimed_at IS NOT NULL
    ON CONFLICT DO NOTHING;
  UPDATE allocations SET released_at = now() WHERE owner_attempt = target AND released_at IS NULL;
  UPDATE slots SET attempt_id = NULL WHERE attempt_id = target;
  RETURN true;
END $$;
"""

GRANTS = """
CREATE POLICY tunery_scheduler ON organizations TO tunery_scheduler USING (true) WITH CHECK (true);
CREATE POLICY tunery_scheduler ON gpu_classes TO tunery_scheduler USING (true) WITH CHECK (true);
CREATE POLICY tunery_scheduler ON holds TO tunery_scheduler USING (true) WITH CHECK (true);
CREATE POLICY tunery_scheduler ON queue_views TO tunery_scheduler USING (true) WITH CHECK (true);
CREATE POLICY tunery_scheduler ON usage TO tunery_scheduler USING (true) WITH CHECK (true);
CREATE POLICY tunery_scheduler ON run_observations TO tunery_scheduler USING (true) WITH CHECK (true);
GRANT SELECT, UPDATE (service, active) ON organizations TO tunery_scheduler;
GRANT UPDATE (service, active, blocked) ON projects TO tunery_scheduler;
GRANT UPDATE (limit_s, used_s, required_bytes) ON jobs TO tunery_scheduler;
GRANT UPDATE (stop_by, preempted_at, preempted_for, preempted_for_project, fault) ON attempts TO tunery_scheduler;
GRANT SELECT ON gpu_classes, usage, run_observations TO tunery_scheduler;
GRANT SELECT, INSERT, UPDATE, DELETE ON holds TO tunery_scheduler;
GRANT SELECT, INSERT, UPDATE ON queue_views TO tunery_scheduler;

CREATE POLICY tunery_api ON gpu_classes TO tunery_api USING (true) WITH CHECK (true);
CREATE POLICY tunery_api ON holds TO tunery_api
  USING (project_id = app_project()) WITH CHECK (project_id = app_project());
CREATE POLICY tunery_api ON queue_views TO tunery_api
  USING (project_id = app_project()) WITH CHECK (project_id = app_project());
CREATE POLICY tunery_api ON run_observations TO tunery_api
  USING (project_id = app_project()) WITH CHECK (project_id = app_project());
GRANT SELECT, INSERT, UPDATE ON gpu_classes TO tunery_api;
GRANT SELECT ON holds, queue_views, run_observations TO tunery_api;
GRANT UPDATE (fault, stop_by) ON attempts TO tunery_api;

CREATE POLICY tunery_worker ON gpu_classes TO tunery_worker USING (true) WITH CHECK (true);
CREATE POLICY tunery_worker ON run_observations TO tunery_worker
  USING (node_holds_job(job_id)) WITH CHECK (node_holds_job(job_id));
GRANT SELECT, INSERT (name) ON gpu_classes TO tunery_worker;
GRANT SELECT, INSERT ON run_observations TO tunery_worker;
GRANT INSERT (gpu_class), UPDATE (gpu_class) ON gpus TO tunery_worker;
GRANT UPDATE (fault, first_step_at, stop_by) ON attempts TO tunery_worker;
GRANT UPDATE (limit_s, used_s, engine_key, engine_bytes) ON jobs TO tunery_worker;
"""

REVOKES = """
DROP POLICY tunery_scheduler ON organizations;
DROP POLICY tunery_scheduler ON usage;
REVOKE SELECT, UPDATE (service, active) ON organizations FROM tunery_scheduler;
REVOKE UPDATE (service, active, blocked) ON projects FROM tunery_scheduler;
REVOKE UPDATE (limit_s, used_s, required_bytes) ON jobs FROM tunery_scheduler;
REVOKE UPDATE (stop_by, preempted_at, preempted_for, preempted_for_project, fault) ON attempts FROM tunery_scheduler;
REVOKE SELECT ON usage FROM tunery_scheduler;
REVOKE UPDATE (fault, stop_by) ON attempts FROM tunery_api;
REVOKE INSERT (gpu_class), UPDATE (gpu_class) ON gpus FROM tunery_worker;
REVOKE UPDATE (fault, first_step_at, stop_by) ON attempts FROM tunery_worker;
REVOKE UPDATE (limit_s, used_s, engine_key, engine_bytes) ON jobs FROM tunery_worker;
"""
