"""A node changes the base models that it imports, and no others."""

from alembic import op

revision = "node_imports"
down_revision = "storage"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("""
        CREATE POLICY node_imports ON base_models AS RESTRICTIVE FOR UPDATE TO tunery_worker USING (
          EXISTS (SELECT FROM tasks t WHERE t.base_model_id = base_models.id AND t.node_id = app_node()
                    AND coalesce(t.finished_at > now() - interval '10 minutes', true)))
    """)


def downgrade() -> None:
    op.execute("DROP POLICY node_imports ON base_models")
