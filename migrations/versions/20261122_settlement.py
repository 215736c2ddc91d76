"""The end of an attempt decides how its time was spent, also when its GPUs were given back before its end was known."""

from alembic import op

revision = "settlement"
down_revision = "operations"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index("ix_checkpoints_attempt", "checkpoints", ["attempt_id", "created_at"])
    op.execute(SETTLE)
    op.execute("DROP TRIGGER note_change ON jobs")
    op.execute(_trigger(f"{WATCHED}, used_s"))


def downgrade() -> None:
    op.execute("DROP TRIGGER note_change ON jobs")
    op.execute(_trigger(WATCHED))
    op.execute("DROP FUNCTION settle_attempt(uuid)")
    op.drop_index("ix_checkpoints_attempt", table_name="checkpoints")


WATCHED = (
    "state, priority, urgent, limit_s, gpus, required_bytes, gpu_class, node_labels, shareable, preemptible, "
    "engine_key, engine_bytes"
)


def _trigger(columns: str) -> str:
    return (
        f"CREATE TRIGGER note_change BEFORE INSERT OR UPDATE OF {columns} ON jobs "
        "FOR EACH ROW EXECUTE FUNCTION note_job_change()"
    )


SETTLE = """
-- Frees what an attempt holds, and splits its time by what is known of its end now. A supervisor gives GPUs back as
-- soon as nothing runs on them, while the last checkpoint is still on its way; what that time was is told afterwards.
-- Repeating it changes nothing. The job is locked first, then GPUs, then tenants, as everywhere.
CREATE FUNCTION settle_attempt(target uuid) RETURNS boolean LANGUAGE plpgsql SECURITY DEFINER
  SET search_path = pg_catalog, public AS $$
DECLARE
  a attempts%ROWTYPE;
  organization uuid;
  split record;
  held float8;
  before float8;
BEGIN
  PERFORM 1 FROM jobs WHERE id = (SELECT job_id FROM attempts WHERE id = target) FOR NO KEY UPDATE;
  IF NOT release_attempt(target) THEN
    RETURN false;
  END IF;
  SELECT max(gpu_seconds), max(platform_fault_s) INTO held, before FROM usage WHERE attempt_id = target;
  IF held IS NULL THEN
    RETURN true;
  END IF;
  SELECT * INTO a FROM attempts WHERE id = target;
  SELECT * INTO split FROM attempt_split(a, a.assigned_at + make_interval(secs => held));
  UPDATE usage SET loading_s = split.loading, productive_s = split.productive, user_fault_s = split.users,
      platform_fault_s = held - split.loading - split.productive - split.users
    WHERE attempt_id = target AND (abs(loading_s - split.loading) > 1e-5 OR abs(productive_s - split.productive) > 1e-5
      OR abs(user_fault_s - split.users) > 1e-5);
  IF FOUND AND abs(split.ours - before) > 1e-5 THEN
    SELECT organization_id INTO organization FROM jobs WHERE id = a.job_id;
    UPDATE projects SET service = service + a.rate * (before - split.ours) WHERE id = a.project_id;
    UPDATE organizations SET service = service + a.rate * (before - split.ours) WHERE id = organization;
  END IF;
  UPDATE jobs j SET used_s = s.used FROM (
      SELECT coalesce(sum(used), 0) AS used FROM (
        SELECT max(u.loading_s + u.productive_s) AS used FROM attempts e JOIN usage u ON u.attempt_id = e.id
        WHERE e.job_id = a.job_id AND e.ended_at IS NOT NULL GROUP BY e.id) each) s
    WHERE j.id = a.job_id AND j.used_s <> s.used;
  RETURN true;
END $$;
REVOKE ALL ON FUNCTION settle_attempt(uuid) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION settle_attempt(uuid) TO tunery_api, tunery_scheduler, tunery_worker;
"""
