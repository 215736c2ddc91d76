"""Questions to the scheduler: when would this start? It alone sees every project; the api sees the answer."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "forecasts"
down_revision = "settlement"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "queue_questions",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("project_id", sa.Uuid(), nullable=False),
        sa.Column("asked", JSONB(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("answer", JSONB(), nullable=True),
        sa.Column("answered_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_queue_questions_project_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_queue_questions")),
    )
    op.create_index("ix_queue_questions_created_at", "queue_questions", ["created_at"])
    op.execute("ALTER TABLE queue_questions ENABLE ROW LEVEL SECURITY")
    op.execute("ALTER TABLE queue_questions FORCE ROW LEVEL SECURITY")
    op.execute("CREATE POLICY owner ON queue_questions TO tunery_owner USING (true) WITH CHECK (true)")
    op.execute("CREATE POLICY backup ON queue_questions FOR SELECT TO tunery_backup USING (true)")
    op.execute(GRANTS)


def downgrade() -> None:
    op.drop_table("queue_questions")


GRANTS = """
GRANT SELECT ON queue_questions TO tunery_backup;
CREATE POLICY tunery_api ON queue_questions TO tunery_api
  USING (project_id = app_project()) WITH CHECK (project_id = app_project());
GRANT SELECT, INSERT ON queue_questions TO tunery_api;
CREATE POLICY tunery_scheduler ON queue_questions TO tunery_scheduler USING (true) WITH CHECK (true);
GRANT SELECT, UPDATE (answer, answered_at), DELETE ON queue_questions TO tunery_scheduler;
"""
