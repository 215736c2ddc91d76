"""Traces: the span that submitted a job and the one that assigned an attempt. For operators: the schema's version,
and what is stored in all, which no program may add up from tenants' rows itself."""

import sqlalchemy as sa
from alembic import op

revision = "traces"
down_revision = "node_imports"
branch_labels = None
depends_on = None

PROGRAMS = "tunery_api, tunery_scheduler, tunery_worker"


def upgrade() -> None:
    op.add_column("jobs", sa.Column("traceparent", sa.String(), nullable=True))
    op.add_column("attempts", sa.Column("traceparent", sa.String(), nullable=True))
    # readiness compares it with the migrations beside the code
    op.execute(f"GRANT SELECT ON alembic_version TO {PROGRAMS}")
    op.execute("""
        CREATE FUNCTION stored_bytes() RETURNS TABLE (kind text, bytes bigint)
          LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, public AS $$
          SELECT 'files', coalesce(sum(bytes), 0)::bigint FROM files WHERE deleted_at IS NULL
          UNION ALL SELECT 'datasets', coalesce(sum(bytes), 0)::bigint FROM datasets
          UNION ALL SELECT 'checkpoints', coalesce(sum(bytes), 0)::bigint FROM checkpoints WHERE deleted_at IS NULL
          UNION ALL SELECT 'adapters', coalesce(sum(bytes), 0)::bigint FROM adapter_versions
          UNION ALL SELECT 'base_models', coalesce(sum(bytes), 0)::bigint FROM base_models
          UNION ALL SELECT 'logs', coalesce(sum(log_bytes), 0)::bigint FROM attempts $$""")
    op.execute("REVOKE ALL ON FUNCTION stored_bytes() FROM PUBLIC")
    op.execute("GRANT EXECUTE ON FUNCTION stored_bytes() TO tunery_scheduler")


def downgrade() -> None:
    op.execute("DROP FUNCTION stored_bytes()")
    op.execute(f"REVOKE SELECT ON alembic_version FROM {PROGRAMS}")
    op.drop_column("attempts", "traceparent")
    op.drop_column("jobs", "traceparent")
