"""The first schema: tables, the rules that Postgres keeps by itself, and who may see what."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("CREATE SEQUENCE fence_seq")
    op.create_table(
        "base_models",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("request", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("hub_id", sa.String(), nullable=True),
        sa.Column("revision", sa.String(), nullable=True),
        sa.Column("source", sa.String(), nullable=True),
        sa.Column("license", sa.String(), nullable=True),
        sa.Column("parameters", sa.BigInteger(), nullable=True),
        sa.Column("bytes", sa.BigInteger(), nullable=True),
        sa.Column("card", postgresql.JSONB(astext_type=sa.Text()), nullable=True),
        sa.Column("object_prefix", sa.String(), nullable=True),
        sa.Column("error", sa.String(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.CheckConstraint(
            "(state = 'ready') = (object_prefix IS NOT NULL)", name=op.f("ck_base_models_ready_has_files")
        ),
        sa.CheckConstraint("state IN ('failed', 'importing', 'ready')", name=op.f("ck_base_models_state_known")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_base_models")),
        sa.UniqueConstraint("name", name=op.f("uq_base_models_name")),
    )
    op.create_table(
        "leader",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("holder", sa.String(), nullable=False),
        sa.Column("epoch", sa.BigInteger(), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("swept_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint("id = 1", name=op.f("ck_leader_one_row")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_leader")),
    )
    op.create_table(
        "nodes",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("boot_id", sa.Uuid(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("task_slots", sa.Integer(), nullable=False),
        sa.Column("version", sa.String(), nullable=False),
        sa.Column("info", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("registered_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("last_seen_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.CheckConstraint("state IN ('cordoned', 'down', 'draining', 'up')", name=op.f("ck_nodes_state_known")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_nodes")),
        sa.UniqueConstraint("name", name=op.f("uq_nodes_name")),
    )
    op.create_table(
        "organizations",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_organizations")),
        sa.UniqueConstraint("name", name=op.f("uq_organizations_name")),
    )
    op.create_table(
        "engines",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("organization_id", sa.Uuid(), nullable=False),
        sa.Column("node_id", sa.Uuid(), nullable=False),
        sa.Column("base_model_id", sa.Uuid(), nullable=False),
        sa.Column("precision", sa.String(), nullable=False),
        sa.Column("socket", sa.String(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.CheckConstraint("state IN ('down', 'starting', 'up')", name=op.f("ck_engines_state_known")),
        sa.ForeignKeyConstraint(["base_model_id"], ["base_models.id"], name=op.f("fk_engines_base_model_id")),
        sa.ForeignKeyConstraint(["node_id"], ["nodes.id"], name=op.f("fk_engines_node_id")),
        sa.ForeignKeyConstraint(["organization_id"], ["organizations.id"], name=op.f("fk_engines_organization_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_engines")),
        sa.UniqueConstraint("node_id", "id", name=op.f("uq_engines_node_id_id")),
    )
    op.create_table(
        "gpus",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("node_id", sa.Uuid(), nullable=False),
        sa.Column("uuid", sa.String(), nullable=False),
        sa.Column("index", sa.Integer(), nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("total_bytes", sa.BigInteger(), nullable=False),
        sa.Column("usable_bytes", sa.BigInteger(), nullable=False),
        sa.Column("reserved_bytes", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.CheckConstraint("kind IN ('cpu', 'cuda')", name=op.f("ck_gpus_kind_known")),
        sa.CheckConstraint("state IN ('absent', 'dirty', 'healthy', 'unhealthy')", name=op.f("ck_gpus_state_known")),
        sa.CheckConstraint("reserved_bytes BETWEEN 0 AND usable_bytes", name=op.f("ck_gpus_not_overcommitted")),
        sa.ForeignKeyConstraint(["node_id"], ["nodes.id"], name=op.f("fk_gpus_node_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_gpus")),
        sa.UniqueConstraint("node_id", "uuid", name=op.f("uq_gpus_node_id_uuid")),
    )
    op.create_table(
        "projects",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("organization_id", sa.Uuid(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("status", sa.String(), server_default="active", nullable=False),
        sa.Column("dedicated", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.CheckConstraint("status IN ('active', 'archived')", name=op.f("ck_projects_status_known")),
        sa.ForeignKeyConstraint(["organization_id"], ["organizations.id"], name=op.f("fk_projects_organization_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_projects")),
        sa.UniqueConstraint("organization_id", "id", name=op.f("uq_projects_organization_id_id")),
        sa.UniqueConstraint("organization_id", "name", name=op.f("uq_projects_organization_id_name")),
    )
    op.create_table(
        "adapters",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("project_id", sa.Uuid(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_adapters_project_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_adapters")),
        sa.UniqueConstraint("project_id", "id", name=op.f("uq_adapters_project_id_id")),
        sa.UniqueConstraint("project_id", "name", name=op.f("uq_adapters_project_id_name")),
    )
    op.create_table(
        "api_keys",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("organization_id", sa.Uuid(), nullable=False),
        sa.Column("project_id", sa.Uuid(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("lookup", sa.String(), nullable=False),
        sa.Column("secret_hmac", sa.LargeBinary(), nullable=False),
        sa.Column("scopes", sa.ARRAY(sa.Text()), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("revoked_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("last_used_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(
            ["organization_id", "project_id"],
            ["projects.organization_id", "projects.id"],
            name=op.f("fk_api_keys_organization_id_project_id"),
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_api_keys")),
        sa.UniqueConstraint("lookup", name=op.f("uq_api_keys_lookup")),
        sa.UniqueConstraint("project_id", "id", name=op.f("uq_api_keys_project_id_id")),
    )
    op.create_table(
        "datasets",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("project_id", sa.Uuid(), nullable=False),
        sa.Column("source_sha256", sa.String(), nullable=False),
        sa.Column("checker", sa.String(), nullable=False),
        sa.Column("sha256", sa.String(), nullable=False),
        sa.Column("object_key", sa.String(), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("rows", sa.Integer(), nullable=False),
        sa.Column("shape", sa.String(), nullable=False),
        sa.Column("max_row_bytes", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.CheckConstraint("rows > 0", name=op.f("ck_datasets_not_empty")),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_datasets_project_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_datasets")),
        sa.UniqueConstraint("project_id", "id", name=op.f("uq_datasets_project_id_id")),
        sa.UniqueConstraint(
            "project_id", "source_sha256", "checker", name=op.f("uq_datasets_project_id_source_sha256_checker")
        ),
    )
    op.create_table(
        "files",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("project_id", sa.Uuid(), nullable=False),
        sa.Column("filename", sa.String(), nullable=False),
        sa.Column("purpose", sa.String(), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("sha256", sa.String(), nullable=False),
        sa.Column("object_key", sa.String(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("deleted_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("bytes >= 0", name=op.f("ck_files_bytes_positive")),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_files_project_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_files")),
        sa.UniqueConstraint("object_key", name=op.f("uq_files_object_key")),
        sa.UniqueConstraint("project_id", "id", name=op.f("uq_files_project_id_id")),
    )
    op.create_index(
        "ix_files_project_created",
        "files",
        ["project_id", "id"],
        unique=False,
        postgresql_where=sa.text("deleted_at IS NULL"),
    )
    op.create_table(
        "members",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("organization_id", sa.Uuid(), nullable=False),
        sa.Column("project_id", sa.Uuid(), nullable=False),
        sa.Column("email", sa.String(), nullable=False),
        sa.Column("role", sa.String(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.CheckConstraint("role IN ('member', 'owner', 'reader')", name=op.f("ck_members_role_known")),
        sa.ForeignKeyConstraint(
            ["organization_id", "project_id"],
            ["projects.organization_id", "projects.id"],
            name=op.f("fk_members_organization_id_project_id"),
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_members")),
        sa.UniqueConstraint("project_id", "email", name=op.f("uq_members_project_id_email")),
    )
    op.create_table(
        "outbox",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("project_id", sa.Uuid(), nullable=False),
        sa.Column("topic", sa.String(), nullable=False),
        sa.Column("payload", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("published_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_outbox_project_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_outbox")),
    )
    op.create_index(
        "ix_outbox_unsent", "outbox", ["id"], unique=False, postgresql_where=sa.text("published_at IS NULL")
    )
    op.create_table(
        "jobs",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("organization_id", sa.Uuid(), nullable=False),
        sa.Column("project_id", sa.Uuid(), nullable=False),
        sa.Column("base_model_id", sa.Uuid(), nullable=False),
        sa.Column("model", sa.String(), nullable=False),
        sa.Column("training_file_id", sa.Uuid(), nullable=False),
        sa.Column("validation_file_id", sa.Uuid(), nullable=True),
        sa.Column("train_dataset_id", sa.Uuid(), nullable=True),
        sa.Column("validation_dataset_id", sa.Uuid(), nullable=True),
        sa.Column("suffix", sa.String(), nullable=True),
        sa.Column("seed", sa.BigInteger(), nullable=False),
        sa.Column("user_metadata", postgresql.JSONB(astext_type=sa.Text()), nullable=True),
        sa.Column("request", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("recipe", postgresql.JSONB(astext_type=sa.Text()), nullable=True),
        sa.Column("hyperparameters", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("model_name", sa.String(), nullable=False),
        sa.Column("gpus", sa.Integer(), nullable=False),
        sa.Column("required_bytes", sa.BigInteger(), nullable=True),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("error_code", sa.String(), nullable=True),
        sa.Column("error_message", sa.String(), nullable=True),
        sa.Column("error_param", sa.String(), nullable=True),
        sa.Column("wait_reason", sa.String(), nullable=True),
        sa.Column("fence", sa.BigInteger(), nullable=False),
        sa.Column("faults_without_progress", sa.Integer(), nullable=False),
        sa.Column("fault_step", sa.BigInteger(), nullable=False),
        sa.Column("event_seq", sa.BigInteger(), nullable=False),
        sa.Column("progress", postgresql.JSONB(astext_type=sa.Text()), nullable=True),
        sa.Column("trained_tokens", sa.BigInteger(), nullable=True),
        sa.Column("platform", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("queued_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("(state = 'failed') = (error_code IS NOT NULL)", name=op.f("ck_jobs_failed_says_why")),
        sa.CheckConstraint(
            "(state IN ('cancelled', 'failed', 'succeeded')) = (finished_at IS NOT NULL)",
            name=op.f("ck_jobs_finished_when_terminal"),
        ),
        sa.CheckConstraint(
            "state IN ('cancelled', 'cancelling', 'failed', 'paused', 'pausing', 'queued', 'running', 'starting', 'succeeded', 'validating')",
            name=op.f("ck_jobs_state_known"),
        ),
        sa.CheckConstraint("gpus BETWEEN 1 AND 64", name=op.f("ck_jobs_gpus_sane")),
        sa.ForeignKeyConstraint(["base_model_id"], ["base_models.id"], name=op.f("fk_jobs_base_model_id")),
        sa.ForeignKeyConstraint(
            ["organization_id", "project_id"],
            ["projects.organization_id", "projects.id"],
            name=op.f("fk_jobs_organization_id_project_id"),
        ),
        sa.ForeignKeyConstraint(
            ["project_id", "train_dataset_id"],
            ["datasets.project_id", "datasets.id"],
            name=op.f("fk_jobs_project_id_train_dataset_id"),
        ),
        sa.ForeignKeyConstraint(
            ["project_id", "training_file_id"],
            ["files.project_id", "files.id"],
            name=op.f("fk_jobs_project_id_training_file_id"),
        ),
        sa.ForeignKeyConstraint(
            ["project_id", "validation_dataset_id"],
            ["datasets.project_id", "datasets.id"],
            name=op.f("fk_jobs_project_id_validation_dataset_id"),
        ),
        sa.ForeignKeyConstraint(
            ["project_id", "validation_file_id"],
            ["files.project_id", "files.id"],
            name=op.f("fk_jobs_project_id_validation_file_id"),
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_jobs")),
        sa.UniqueConstraint("project_id", "id", name=op.f("uq_jobs_project_id_id")),
    )
    op.create_index(
        "ix_jobs_open",
        "jobs",
        ["state", "queued_at"],
        unique=False,
        postgresql_where=sa.text("state NOT IN ('cancelled', 'failed', 'succeeded')"),
    )
    op.create_index("ix_jobs_project", "jobs", ["project_id", "id"], unique=False)
    op.create_table(
        "attempts",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("project_id", sa.Uuid(), nullable=False),
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("no", sa.Integer(), nullable=False),
        sa.Column("fence", sa.BigInteger(), server_default=sa.text("nextval('fence_seq')"), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("node_id", sa.Uuid(), nullable=False),
        sa.Column("engine_id", sa.Uuid(), nullable=True),
        sa.Column("claimed_by", sa.String(), nullable=True),
        sa.Column("lease_expires_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("stop_reason", sa.String(), nullable=True),
        sa.Column("resume_checkpoint_id", sa.Uuid(), nullable=True),
        sa.Column("start_step", sa.BigInteger(), nullable=False),
        sa.Column("last_event_seq", sa.BigInteger(), nullable=False),
        sa.Column("details", postgresql.JSONB(astext_type=sa.Text()), nullable=True),
        sa.Column("failure_code", sa.String(), nullable=True),
        sa.Column("failure_message", sa.String(), nullable=True),
        sa.Column("log_bytes", sa.BigInteger(), nullable=False),
        sa.Column("assigned_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("claimed_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("ended_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint(
            "(state IN ('cancelled', 'failed', 'lost', 'preempted', 'succeeded')) = (ended_at IS NOT NULL)",
            name=op.f("ck_attempts_ended_when_over"),
        ),
        sa.CheckConstraint(
            "(state IN ('claimed', 'running', 'stopping', 'publishing')) = (lease_expires_at IS NOT NULL)",
            name=op.f("ck_attempts_leased_when_held"),
        ),
        sa.CheckConstraint(
            "state IN ('assigned', 'cancelled', 'claimed', 'failed', 'lost', 'preempted', 'publishing', 'running', 'stopping', 'succeeded')",
            name=op.f("ck_attempts_state_known"),
        ),
        sa.ForeignKeyConstraint(
            ["node_id", "engine_id"], ["engines.node_id", "engines.id"], name=op.f("fk_attempts_node_id_engine_id")
        ),
        sa.ForeignKeyConstraint(["node_id"], ["nodes.id"], name=op.f("fk_attempts_node_id")),
        sa.ForeignKeyConstraint(
            ["project_id", "job_id"], ["jobs.project_id", "jobs.id"], name=op.f("fk_attempts_project_id_job_id")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_attempts")),
        sa.UniqueConstraint("fence", name=op.f("uq_attempts_fence")),
        sa.UniqueConstraint("project_id", "id", name=op.f("uq_attempts_project_id_id")),
        sa.UniqueConstraint("project_id", "job_id", "no", name=op.f("uq_attempts_project_id_job_id_no")),
    )
    op.create_index("ix_attempts_job", "attempts", ["job_id", "no"], unique=False)
    op.create_index(
        "ix_attempts_node_live",
        "attempts",
        ["node_id", "state"],
        unique=False,
        postgresql_where=sa.text("state IN ('assigned', 'claimed', 'publishing', 'running', 'stopping')"),
    )
    op.create_index(
        "one_live_attempt",
        "attempts",
        ["job_id"],
        unique=True,
        postgresql_where=sa.text("state IN ('assigned', 'claimed', 'publishing', 'running', 'stopping')"),
    )
    op.create_table(
        "events",
        sa.Column("project_id", sa.Uuid(), nullable=False),
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("level", sa.String(), nullable=False),
        sa.Column("type", sa.String(), nullable=False),
        sa.Column("message", sa.String(), nullable=False),
        sa.Column("data", postgresql.JSONB(astext_type=sa.Text()), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.CheckConstraint("level IN ('error', 'info', 'warn')", name=op.f("ck_events_level_known")),
        sa.ForeignKeyConstraint(
            ["project_id", "job_id"], ["jobs.project_id", "jobs.id"], name=op.f("fk_events_project_id_job_id")
        ),
        sa.PrimaryKeyConstraint("job_id", "seq", name=op.f("pk_events")),
        sa.UniqueConstraint("id", name=op.f("uq_events_id")),
    )
    op.create_table(
        "metric_series",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("project_id", sa.Uuid(), nullable=False),
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.ForeignKeyConstraint(
            ["project_id", "job_id"], ["jobs.project_id", "jobs.id"], name=op.f("fk_metric_series_project_id_job_id")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_metric_series")),
        sa.UniqueConstraint("job_id", "name", name=op.f("uq_metric_series_job_id_name")),
        sa.UniqueConstraint("project_id", "id", name=op.f("uq_metric_series_project_id_id")),
    )
    op.create_table(
        "tasks",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("project_id", sa.Uuid(), nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("payload", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("job_id", sa.Uuid(), nullable=True),
        sa.Column("base_model_id", sa.Uuid(), nullable=True),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("fence", sa.BigInteger(), nullable=False),
        sa.Column("tries", sa.Integer(), nullable=False),
        sa.Column("node_id", sa.Uuid(), nullable=True),
        sa.Column("lease_expires_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("not_before", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("error", sa.String(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint(
            "(state = 'leased') = (lease_expires_at IS NOT NULL)", name=op.f("ck_tasks_leased_when_held")
        ),
        sa.CheckConstraint(
            "state IN ('cancelled', 'failed', 'leased', 'queued', 'succeeded')", name=op.f("ck_tasks_state_known")
        ),
        sa.ForeignKeyConstraint(["base_model_id"], ["base_models.id"], name=op.f("fk_tasks_base_model_id")),
        sa.ForeignKeyConstraint(["node_id"], ["nodes.id"], name=op.f("fk_tasks_node_id")),
        sa.ForeignKeyConstraint(
            ["project_id", "job_id"], ["jobs.project_id", "jobs.id"], name=op.f("fk_tasks_project_id_job_id")
        ),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_tasks_project_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_tasks")),
    )
    op.create_index(
        "ix_tasks_open", "tasks", ["id"], unique=False, postgresql_where=sa.text("state IN ('queued', 'leased')")
    )
    op.create_table(
        "adapter_versions",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("project_id", sa.Uuid(), nullable=False),
        sa.Column("adapter_id", sa.Uuid(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("model_name", sa.String(), nullable=False),
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("attempt_id", sa.Uuid(), nullable=False),
        sa.Column("base_model_id", sa.Uuid(), nullable=False),
        sa.Column("object_prefix", sa.String(), nullable=False),
        sa.Column("files", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("sha256", sa.String(), nullable=False),
        sa.Column("metrics", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.ForeignKeyConstraint(["base_model_id"], ["base_models.id"], name=op.f("fk_adapter_versions_base_model_id")),
        sa.ForeignKeyConstraint(
            ["project_id", "adapter_id"],
            ["adapters.project_id", "adapters.id"],
            name=op.f("fk_adapter_versions_project_id_adapter_id"),
        ),
        sa.ForeignKeyConstraint(
            ["project_id", "attempt_id"],
            ["attempts.project_id", "attempts.id"],
            name=op.f("fk_adapter_versions_project_id_attempt_id"),
        ),
        sa.ForeignKeyConstraint(
            ["project_id", "job_id"], ["jobs.project_id", "jobs.id"], name=op.f("fk_adapter_versions_project_id_job_id")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_adapter_versions")),
        sa.UniqueConstraint("adapter_id", "version", name=op.f("uq_adapter_versions_adapter_id_version")),
        sa.UniqueConstraint("job_id", name=op.f("uq_adapter_versions_job_id")),
        sa.UniqueConstraint("project_id", "id", name=op.f("uq_adapter_versions_project_id_id")),
        sa.UniqueConstraint("project_id", "model_name", name=op.f("uq_adapter_versions_project_id_model_name")),
    )
    op.create_table(
        "allocations",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("gpu_id", sa.Uuid(), nullable=False),
        sa.Column("owner_attempt", sa.Uuid(), nullable=True),
        sa.Column("owner_engine", sa.Uuid(), nullable=True),
        sa.Column("exclusive", sa.Boolean(), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("released_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("bytes >= 0", name=op.f("ck_allocations_bytes_positive")),
        sa.CheckConstraint("num_nonnulls(owner_attempt, owner_engine) = 1", name=op.f("ck_allocations_one_owner")),
        sa.ForeignKeyConstraint(["gpu_id"], ["gpus.id"], name=op.f("fk_allocations_gpu_id")),
        sa.ForeignKeyConstraint(["owner_attempt"], ["attempts.id"], name=op.f("fk_allocations_owner_attempt")),
        sa.ForeignKeyConstraint(["owner_engine"], ["engines.id"], name=op.f("fk_allocations_owner_engine")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_allocations")),
    )
    op.create_index(
        "ix_allocations_held", "allocations", ["gpu_id"], unique=False, postgresql_where=sa.text("released_at IS NULL")
    )
    op.create_index("ix_allocations_owner", "allocations", ["owner_attempt"], unique=False)
    op.create_table(
        "attempt_nodes",
        sa.Column("attempt_id", sa.Uuid(), nullable=False),
        sa.Column("rank", sa.Integer(), nullable=False),
        sa.Column("project_id", sa.Uuid(), nullable=False),
        sa.Column("node_id", sa.Uuid(), nullable=False),
        sa.ForeignKeyConstraint(["node_id"], ["nodes.id"], name=op.f("fk_attempt_nodes_node_id")),
        sa.ForeignKeyConstraint(
            ["project_id", "attempt_id"],
            ["attempts.project_id", "attempts.id"],
            name=op.f("fk_attempt_nodes_project_id_attempt_id"),
        ),
        sa.PrimaryKeyConstraint("attempt_id", "rank", name=op.f("pk_attempt_nodes")),
    )
    op.create_table(
        "checkpoints",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("project_id", sa.Uuid(), nullable=False),
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("attempt_id", sa.Uuid(), nullable=False),
        sa.Column("step", sa.BigInteger(), nullable=False),
        sa.Column("object_prefix", sa.String(), nullable=False),
        sa.Column("files", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("metrics", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.Column("deleted_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(
            ["project_id", "attempt_id"],
            ["attempts.project_id", "attempts.id"],
            name=op.f("fk_checkpoints_project_id_attempt_id"),
        ),
        sa.ForeignKeyConstraint(
            ["project_id", "job_id"], ["jobs.project_id", "jobs.id"], name=op.f("fk_checkpoints_project_id_job_id")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_checkpoints")),
        sa.UniqueConstraint("project_id", "id", name=op.f("uq_checkpoints_project_id_id")),
    )
    op.create_index(
        "one_checkpoint_a_step",
        "checkpoints",
        ["job_id", "step"],
        unique=True,
        postgresql_where=sa.text("deleted_at IS NULL"),
    )
    op.create_table(
        "metric_chunks",
        sa.Column("project_id", sa.Uuid(), nullable=False),
        sa.Column("series_id", sa.BigInteger(), nullable=False),
        sa.Column("attempt_no", sa.Integer(), nullable=False),
        sa.Column("first_step", sa.BigInteger(), nullable=False),
        sa.Column("steps", sa.ARRAY(sa.BigInteger()), nullable=False),
        sa.Column("vals", sa.ARRAY(sa.Double()), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.ForeignKeyConstraint(
            ["project_id", "series_id"],
            ["metric_series.project_id", "metric_series.id"],
            name=op.f("fk_metric_chunks_project_id_series_id"),
        ),
        sa.PrimaryKeyConstraint("series_id", "attempt_no", "first_step", name=op.f("pk_metric_chunks")),
    )
    op.create_index(
        "ix_metric_chunks_project",
        "metric_chunks",
        ["project_id", "series_id", sa.literal_column("first_step")],
        unique=False,
    )
    op.create_table(
        "slots",
        sa.Column("node_id", sa.Uuid(), nullable=False),
        sa.Column("no", sa.Integer(), nullable=False),
        sa.Column("attempt_id", sa.Uuid(), nullable=True),
        sa.ForeignKeyConstraint(["attempt_id"], ["attempts.id"], name=op.f("fk_slots_attempt_id")),
        sa.ForeignKeyConstraint(["node_id"], ["nodes.id"], name=op.f("fk_slots_node_id")),
        sa.PrimaryKeyConstraint("node_id", "no", name=op.f("pk_slots")),
        sa.UniqueConstraint("attempt_id", name=op.f("uq_slots_attempt_id")),
    )
    op.create_table(
        "usage",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("organization_id", sa.Uuid(), nullable=False),
        sa.Column("project_id", sa.Uuid(), nullable=False),
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("attempt_id", sa.Uuid(), nullable=False),
        sa.Column("gpu_id", sa.Uuid(), nullable=False),
        sa.Column("gpu_class", sa.String(), nullable=False),
        sa.Column("gpu_seconds", sa.Double(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.ForeignKeyConstraint(["gpu_id"], ["gpus.id"], name=op.f("fk_usage_gpu_id")),
        sa.ForeignKeyConstraint(
            ["organization_id", "project_id"],
            ["projects.organization_id", "projects.id"],
            name=op.f("fk_usage_organization_id_project_id"),
        ),
        sa.ForeignKeyConstraint(
            ["project_id", "attempt_id"],
            ["attempts.project_id", "attempts.id"],
            name=op.f("fk_usage_project_id_attempt_id"),
        ),
        sa.ForeignKeyConstraint(
            ["project_id", "job_id"], ["jobs.project_id", "jobs.id"], name=op.f("fk_usage_project_id_job_id")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_usage")),
        sa.UniqueConstraint("attempt_id", "gpu_id", name=op.f("uq_usage_attempt_id_gpu_id")),
    )
    op.create_foreign_key(
        op.f("fk_attempts_project_id_resume_checkpoint_id"),
        "attempts",
        "checkpoints",
        ["project_id", "resume_checkpoint_id"],
        ["project_id", "id"],
    )
    secure()


def downgrade() -> None:
    op.drop_constraint(op.f("fk_attempts_project_id_resume_checkpoint_id"), "attempts")
    for table in TABLES:
        for policy in ("owner", "backup", *GRANTS):
            op.execute(f"DROP POLICY IF EXISTS {policy} ON {table}")
    op.execute(f"DROP FUNCTION {FUNCTION_NAMES} CASCADE")
    op.drop_table("usage")
    op.drop_table("slots")
    op.drop_index("ix_metric_chunks_project", table_name="metric_chunks")
    op.drop_table("metric_chunks")
    op.drop_table("checkpoints")
    op.drop_table("attempt_nodes")
    op.drop_index("ix_allocations_owner", table_name="allocations")
    op.drop_index("ix_allocations_held", table_name="allocations", postgresql_where=sa.text("released_at IS NULL"))
    op.drop_table("allocations")
    op.drop_table("adapter_versions")
    op.drop_index("ix_tasks_open", table_name="tasks", postgresql_where=sa.text("state IN ('queued', 'leased')"))
    op.drop_table("tasks")
    op.drop_table("metric_series")
    op.drop_table("events")
    op.drop_index(
        "one_live_attempt",
        table_name="attempts",
        postgresql_where=sa.text("state IN ('assigned', 'claimed', 'publishing', 'running', 'stopping')"),
    )
    op.drop_index(
        "ix_attempts_node_live",
        table_name="attempts",
        postgresql_where=sa.text("state IN ('assigned', 'claimed', 'publishing', 'running', 'stopping')"),
    )
    op.drop_index("ix_attempts_job", table_name="attempts")
    op.drop_table("attempts")
    op.drop_index("ix_jobs_project", table_name="jobs")
    op.drop_index(
        "ix_jobs_open", table_name="jobs", postgresql_where=sa.text("state NOT IN ('cancelled', 'failed', 'succeeded')")
    )
    op.drop_table("jobs")
    op.drop_index("ix_outbox_unsent", table_name="outbox", postgresql_where=sa.text("published_at IS NULL"))
    op.drop_table("outbox")
    op.drop_table("members")
    op.drop_index("ix_files_project_created", table_name="files", postgresql_where=sa.text("deleted_at IS NULL"))
    op.drop_table("files")
    op.drop_table("datasets")
    op.drop_table("api_keys")
    op.drop_table("adapters")
    op.drop_table("projects")
    op.drop_table("gpus")
    op.drop_table("engines")
    op.drop_table("organizations")
    op.drop_table("nodes")
    op.drop_table("leader")
    op.drop_table("base_models")
    op.execute("DROP SEQUENCE fence_seq")


# ---- What Postgres keeps by itself, and who may see what -------------------------------------------------

FUNCTIONS = """
CREATE FUNCTION app_project() RETURNS uuid LANGUAGE sql STABLE PARALLEL SAFE
  RETURN nullif(current_setting('app.project_id', true), '')::uuid;
CREATE FUNCTION app_node() RETURNS uuid LANGUAGE sql STABLE PARALLEL SAFE
  RETURN nullif(current_setting('app.node_id', true), '')::uuid;

-- Over-commit is impossible whoever inserts: reserved_bytes follows the allocations, and its CHECK refuses.
CREATE FUNCTION fill_exclusive_allocation() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER
  SET search_path = pg_catalog, public AS $$
BEGIN
  IF NEW.exclusive THEN
    SELECT usable_bytes INTO NEW.bytes FROM gpus WHERE id = NEW.gpu_id;
  END IF;
  RETURN NEW;
END $$;
CREATE FUNCTION reserve_gpu_bytes() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER
  SET search_path = pg_catalog, public AS $$
BEGIN
  IF TG_OP = 'INSERT' AND NEW.released_at IS NULL THEN
    UPDATE gpus SET reserved_bytes = reserved_bytes + NEW.bytes WHERE id = NEW.gpu_id;
  ELSIF TG_OP = 'UPDATE' AND OLD.released_at IS NULL AND NEW.released_at IS NOT NULL THEN
    UPDATE gpus SET reserved_bytes = reserved_bytes - OLD.bytes WHERE id = OLD.gpu_id;
  END IF;
  RETURN NULL;
END $$;
CREATE TRIGGER fill_exclusive BEFORE INSERT ON allocations
  FOR EACH ROW EXECUTE FUNCTION fill_exclusive_allocation();
CREATE TRIGGER reserve_bytes AFTER INSERT OR UPDATE OF released_at ON allocations
  FOR EACH ROW EXECUTE FUNCTION reserve_gpu_bytes();

-- Free what an attempt holds and write down how long it held it. GPUs are locked in id order, as everywhere.
CREATE FUNCTION release_attempt(target uuid) RETURNS boolean LANGUAGE plpgsql SECURITY DEFINER
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

-- Authentication knows no project yet: this one function may look a key up, by its public half only.
CREATE FUNCTION find_api_key(presented text) RETURNS TABLE (
    id uuid, organization_id uuid, organization text, project_id uuid, project text, name text,
    secret_hmac bytea, scopes text[], expires_at timestamptz, usable boolean)
  LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, public AS $$
BEGIN
  UPDATE api_keys k SET last_used_at = now()
    WHERE k.lookup = presented AND coalesce(k.last_used_at < now() - interval '5 minutes', true);
  RETURN QUERY SELECT k.id, k.organization_id, o.name::text, k.project_id, p.name::text, k.name::text,
      k.secret_hmac, k.scopes, k.expires_at,
      k.revoked_at IS NULL AND coalesce(k.expires_at > now(), true) AND p.status = 'active'
    FROM api_keys k JOIN projects p ON p.id = k.project_id JOIN organizations o ON o.id = p.organization_id
    WHERE k.lookup = presented;
END $$;

-- What a node may see of projects: those it works for now, and for ten minutes after, to finish its sentence.
CREATE FUNCTION node_holds_job(target uuid) RETURNS boolean LANGUAGE sql STABLE SECURITY DEFINER
  SET search_path = pg_catalog, public AS $$
  SELECT EXISTS (SELECT FROM attempts WHERE job_id = target AND node_id = app_node()
                   AND coalesce(ended_at > now() - interval '10 minutes', true))
      OR EXISTS (SELECT FROM tasks WHERE job_id = target AND node_id = app_node()
                   AND coalesce(finished_at > now() - interval '10 minutes', true)) $$;
CREATE FUNCTION node_works_for(target uuid) RETURNS boolean LANGUAGE sql STABLE SECURITY DEFINER
  SET search_path = pg_catalog, public AS $$
  SELECT EXISTS (SELECT FROM attempts WHERE project_id = target AND node_id = app_node()
                   AND coalesce(ended_at > now() - interval '10 minutes', true))
      OR EXISTS (SELECT FROM tasks WHERE project_id = target AND node_id = app_node()
                   AND coalesce(finished_at > now() - interval '10 minutes', true)) $$;

REVOKE ALL ON FUNCTION release_attempt(uuid), find_api_key(text), node_holds_job(uuid), node_works_for(uuid)
  FROM PUBLIC;
GRANT EXECUTE ON FUNCTION release_attempt(uuid) TO tunery_api, tunery_scheduler, tunery_worker;
GRANT EXECUTE ON FUNCTION find_api_key(text) TO tunery_api;
GRANT EXECUTE ON FUNCTION node_holds_job(uuid), node_works_for(uuid) TO tunery_worker;
GRANT USAGE ON SEQUENCE fence_seq TO tunery_scheduler, tunery_worker;
"""

TABLES = [
    "organizations",
    "projects",
    "members",
    "api_keys",
    "files",
    "datasets",
    "jobs",
    "attempts",
    "attempt_nodes",
    "tasks",
    "outbox",
    "usage",
    "checkpoints",
    "adapters",
    "adapter_versions",
    "events",
    "metric_series",
    "metric_chunks",
    "base_models",
    "nodes",
    "gpus",
    "slots",
    "engines",
    "allocations",
    "leader",
]

OWN = "project_id = app_project()"
NODE = "node_id = app_node()"
HELD = "node_holds_job(job_id)"
WORKS = "node_works_for(project_id)"

JOB_ENDS = "state, error_code, error_message, error_param, wait_reason, event_seq, finished_at"
JOB_RUNS = f"{JOB_ENDS}, faults_without_progress, fault_step, progress, trained_tokens, started_at"
ATTEMPT_ENDS = "state, ended_at, lease_expires_at, stop_reason, failure_code, failure_message"

# role -> table -> (rows it sees, privileges). Columns are named wherever a program writes only some of them.
GRANTS: dict[str, dict[str, tuple[str, str]]] = {
    "tunery_api": {
        "organizations": ("id IN (SELECT organization_id FROM projects)", "SELECT"),
        "projects": ("id = app_project()", "SELECT"),
        "members": (OWN, "SELECT"),
        "api_keys": (
            OWN,
            "SELECT (id, organization_id, project_id, name, scopes, created_at, expires_at, last_used_at)",
        ),
        "files": (OWN, "SELECT, INSERT, UPDATE (deleted_at)"),
        "datasets": (OWN, "SELECT"),
        "jobs": (OWN, f"SELECT, INSERT, UPDATE ({JOB_ENDS})"),
        "attempts": (OWN, f"SELECT, UPDATE ({ATTEMPT_ENDS})"),
        "attempt_nodes": (OWN, "SELECT"),
        "tasks": (OWN, "SELECT, INSERT, UPDATE (state, finished_at, lease_expires_at)"),
        "outbox": (OWN, "SELECT, INSERT"),
        "usage": (OWN, "SELECT"),
        "checkpoints": (OWN, "SELECT"),
        "adapters": (OWN, "SELECT"),
        "adapter_versions": (OWN, "SELECT"),
        "events": (OWN, "SELECT, INSERT"),
        "metric_series": (OWN, "SELECT"),
        "metric_chunks": (OWN, "SELECT"),
        "base_models": ("true", "SELECT, INSERT, UPDATE (state, request, error)"),
        "nodes": ("true", "SELECT"),
        "gpus": ("true", "SELECT"),
    },
    "tunery_scheduler": {
        "projects": ("true", "SELECT"),
        "jobs": ("true", f"SELECT, UPDATE ({JOB_RUNS}, fence)"),
        "attempts": ("true", f"SELECT, INSERT, UPDATE ({ATTEMPT_ENDS})"),
        "attempt_nodes": ("true", "SELECT, INSERT"),
        "tasks": ("true", "SELECT, UPDATE (state, tries, node_id, lease_expires_at, not_before, error, finished_at)"),
        "outbox": ("true", "SELECT, INSERT, UPDATE (published_at), DELETE"),
        "checkpoints": ("true", "SELECT"),
        "events": ("true", "SELECT, INSERT"),
        "base_models": ("true", "SELECT, UPDATE (state, error)"),
        "nodes": ("true", "SELECT, UPDATE (state)"),
        "gpus": ("true", "SELECT, UPDATE (state)"),
        "slots": ("true", "SELECT, UPDATE (attempt_id)"),
        "engines": ("true", "SELECT, UPDATE (state)"),
        "allocations": ("true", "SELECT, INSERT"),
        "leader": ("true", "SELECT, INSERT, UPDATE"),
    },
    "tunery_worker": {
        "files": ("EXISTS (SELECT FROM jobs j WHERE files.id IN (j.training_file_id, j.validation_file_id))", "SELECT"),
        "datasets": (WORKS, "SELECT, INSERT"),
        "jobs": (
            "node_holds_job(id)",
            f"SELECT, UPDATE ({JOB_RUNS}, train_dataset_id, validation_dataset_id, recipe, hyperparameters, required_bytes)",
        ),
        "attempts": (
            NODE,
            f"SELECT, UPDATE ({ATTEMPT_ENDS}, claimed_by, claimed_at, started_at, last_event_seq, details, log_bytes)",
        ),
        "attempt_nodes": (NODE, "SELECT"),
        "tasks": (
            f"state = 'queued' OR {NODE}",
            "SELECT, UPDATE (state, fence, tries, node_id, lease_expires_at, not_before, error, finished_at)",
        ),
        "checkpoints": (HELD, "SELECT, INSERT, UPDATE (deleted_at)"),
        "adapters": (WORKS, "SELECT, INSERT"),
        "adapter_versions": (WORKS, "SELECT, INSERT"),
        "outbox": (WORKS, "SELECT, INSERT"),
        "events": (HELD, "SELECT, INSERT"),
        "metric_series": (HELD, "SELECT, INSERT"),
        "metric_chunks": (WORKS, "SELECT, INSERT"),
        "base_models": (
            "true",
            "SELECT, UPDATE (state, hub_id, revision, source, license, parameters, bytes, card, object_prefix, error)",
        ),
        "nodes": ("id = app_node()", "SELECT, INSERT, UPDATE"),
        "gpus": (NODE, "SELECT, INSERT, UPDATE (index, kind, name, total_bytes, usable_bytes, state)"),
        "slots": (NODE, "SELECT, INSERT"),
        "engines": (NODE, "SELECT, INSERT, UPDATE (state)"),
        "allocations": ("gpu_id IN (SELECT id FROM gpus)", "SELECT"),
    },
}


def secure() -> None:
    op.execute(FUNCTIONS)
    for table in TABLES:
        op.execute(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY")
        op.execute(f"ALTER TABLE {table} FORCE ROW LEVEL SECURITY")
        # Under FORCE even the owner needs a policy: a backfill would otherwise change nothing, and say nothing.
        op.execute(f"CREATE POLICY owner ON {table} TO tunery_owner USING (true) WITH CHECK (true)")
        op.execute(f"CREATE POLICY backup ON {table} FOR SELECT TO tunery_backup USING (true)")
        op.execute(f"GRANT SELECT ON {table} TO tunery_backup")
    for role, tables in GRANTS.items():
        for table, (rows, privileges) in tables.items():
            op.execute(f"CREATE POLICY {role} ON {table} TO {role} USING ({rows}) WITH CHECK ({rows})")
            op.execute(f"GRANT {privileges} ON {table} TO {role}")


FUNCTION_NAMES = (
    "node_works_for(uuid), node_holds_job(uuid), find_api_key(text), release_attempt(uuid), reserve_gpu_bytes(), "
    "fill_exclusive_allocation(), app_node(), app_project()"
)
