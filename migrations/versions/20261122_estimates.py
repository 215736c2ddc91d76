"""What a job will need, as far as it can be told before it runs; and what all runs together have taught about that.

What was learned is everybody's, what it was learned from is not: programs read it through functions that return
aggregates and name no project.
"""

import sqlalchemy as sa
from alembic import op

revision = "estimates"
down_revision = "scheduling"
branch_labels = None
depends_on = None

FUNCTIONS = ("fleet_devices()", "learned_memory(uuid, text, text, bigint)", "learned_speeds()")
PROGRAMS = "tunery_api, tunery_scheduler, tunery_worker"


def upgrade() -> None:
    for column in (
        sa.Column("estimated_bytes", sa.BigInteger(), nullable=True),
        sa.Column("estimated_tokens", sa.BigInteger(), nullable=True),
        sa.Column("memory_faults", sa.Integer(), server_default="0", nullable=False),
    ):
        op.add_column("jobs", column)
    op.create_index("ix_run_observations_recent", "run_observations", ["created_at"])
    op.execute(SQL)
    for function in FUNCTIONS:
        op.execute(f"REVOKE ALL ON FUNCTION {function} FROM PUBLIC")
        op.execute(f"GRANT EXECUTE ON FUNCTION {function} TO {PROGRAMS}")
    op.execute("GRANT UPDATE (priority) ON jobs TO tunery_api")
    op.execute("GRANT UPDATE (estimated_bytes, estimated_tokens, memory_faults) ON jobs TO tunery_worker")
    op.execute("GRANT UPDATE (memory_faults) ON jobs TO tunery_scheduler")


def downgrade() -> None:
    op.execute("REVOKE UPDATE (priority) ON jobs FROM tunery_api")
    for function in FUNCTIONS:
        op.execute(f"DROP FUNCTION {function}")
    op.drop_index("ix_run_observations_recent", table_name="run_observations")
    for column in ("memory_faults", "estimated_tokens", "estimated_bytes"):
        op.drop_column("jobs", column)


SQL = """
-- Every device that belongs to the deployment, whether it can be reached now or not. A node is only a number here.
CREATE FUNCTION fleet_devices()
  RETURNS TABLE (node bigint, labels jsonb, gpu_class text, kind text, usable_bytes bigint)
  LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, public AS $$
  SELECT dense_rank() OVER (ORDER BY n.id), n.labels, g.gpu_class, g.kind, g.usable_bytes
  FROM nodes n JOIN gpus g ON g.node_id = n.id
  WHERE n.removed_at IS NULL AND g.state <> 'absent' $$;

-- How much the peaks of past runs differed from their estimates. `tail` is the mean of the worst fifth of the newest
-- 50 ratios (at least one of them), each within 0.5 and 2; `largest` is the largest peak of runs with this very
-- estimate. Scope `base`: this base model on this class, or on any; scope `method`: all base models.
CREATE FUNCTION learned_memory(base uuid, how text, class text, estimate bigint)
  RETURNS TABLE (scope text, samples bigint, tail float8, largest bigint)
  LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, public AS $$
  WITH seen AS (
    (SELECT 'base' AS scope, peak_bytes::float8 / estimated_bytes AS ratio FROM run_observations
     WHERE base_model_id = base AND method = how AND (class IS NULL OR gpu_class = class)
       AND peak_bytes > 0 AND estimated_bytes > 0
     ORDER BY created_at DESC LIMIT 50)
    UNION ALL
    (SELECT 'method', peak_bytes::float8 / estimated_bytes FROM run_observations
     WHERE method = how AND peak_bytes > 0 AND estimated_bytes > 0
     ORDER BY created_at DESC LIMIT 50)),
  ranked AS (
    SELECT s.scope, least(greatest(ratio, 0.5), 2.0) AS ratio,
           row_number() OVER (PARTITION BY s.scope ORDER BY ratio DESC) AS place,
           count(*) OVER (PARTITION BY s.scope) AS samples,
           greatest(1.0, 0.2 * count(*) OVER (PARTITION BY s.scope)) AS mass
    FROM seen s)
  SELECT r.scope, max(r.samples),
         (sum(ratio * least(1.0, greatest(0.0, mass - (place - 1)))) / max(mass))::float8,
         CASE WHEN r.scope = 'base' THEN
           (SELECT max(peak_bytes) FROM run_observations
            WHERE base_model_id = base AND method = how AND (class IS NULL OR gpu_class = class)
              AND estimated_bytes = estimate)
         END
  FROM ranked r GROUP BY r.scope $$;

-- How long past runs took: seconds of one GPU for each token that had been estimated, and seconds until the first
-- step. Of the newest 20,000 attempts; a group without a class is that base model on every class.
CREATE FUNCTION learned_speeds()
  RETURNS TABLE (base_model_id uuid, method text, gpu_class text, samples bigint,
                 token_s_p50 float8, token_s_p90 float8, load_s_p50 float8, load_s_p90 float8)
  LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, public AS $$
  WITH seen AS (
    SELECT o.base_model_id, o.method, o.gpu_class, o.load_s,
           o.train_s * o.gpus
             / (o.tokens * coalesce(j.estimated_tokens::float8 / nullif(j.trained_tokens, 0), 1)) AS token_s
    FROM (SELECT * FROM run_observations ORDER BY created_at DESC LIMIT 20000) o
      JOIN jobs j ON j.id = o.job_id
    WHERE o.outcome = 'succeeded' AND o.tokens > 0 AND coalesce(j.estimated_tokens, 1) > 0)
  SELECT s.base_model_id, s.method, s.gpu_class, count(*),
         percentile_cont(0.5) WITHIN GROUP (ORDER BY token_s), percentile_cont(0.9) WITHIN GROUP (ORDER BY token_s),
         percentile_cont(0.5) WITHIN GROUP (ORDER BY load_s), percentile_cont(0.9) WITHIN GROUP (ORDER BY load_s)
  FROM seen s GROUP BY GROUPING SETS ((s.base_model_id, s.method, s.gpu_class), (s.base_model_id, s.method)) $$;
"""
