"""A large cluster in a database, written by SQL: many projects, nodes, GPUs and waiting jobs."""

import uuid
from dataclasses import dataclass

import psycopg

GIB = 1 << 30
_SHA = "0" * 64


@dataclass(frozen=True)
class Crowd:
    """How much of everything. Each node has `gpus // nodes` devices of 80 GiB."""

    projects: int = 100
    organizations: int = 10
    nodes: int = 125
    gpus: int = 1000

    def fill(self, connection: psycopg.Connection) -> None:
        """Tenants, a model, a file for each project, nodes and their devices. As the owner of the tables."""
        each = self.gpus // self.nodes
        model = uuid.uuid4()
        connection.execute(
            """
            INSERT INTO organizations (id, name) SELECT gen_random_uuid(), 'organization ' || n
            FROM generate_series(1, %(organizations)s) n;
            """,
            {"organizations": self.organizations},
        )
        connection.execute(
            """
            INSERT INTO projects (id, organization_id, name, weight)
            SELECT gen_random_uuid(),
              (SELECT id FROM organizations ORDER BY name OFFSET n %% %(organizations)s LIMIT 1),
              'project ' || n, 1 + n %% 4 FROM generate_series(0, %(projects)s - 1) n
            """,
            {"organizations": self.organizations, "projects": self.projects},
        )
        connection.execute(
            "INSERT INTO base_models (id, name, request, state, card, object_prefix, hub_id, revision, source, "
            "license, parameters) "
            "VALUES (%s, 'bench', '{}', 'ready', '{}', 'a/base', 'bench/bench', '0', 'bench', 'mit', 1)",
            (model,),
        )
        connection.execute(
            "INSERT INTO files (id, project_id, filename, purpose, bytes, sha256, object_key) "
            "SELECT gen_random_uuid(), id, 'rows.jsonl', 'fine-tune', 100, %s, 'u/' || id || '/rows' FROM projects",
            (_SHA,),
        )
        connection.execute(
            "INSERT INTO nodes (id, name, boot_id, state, task_slots, version, info, last_seen_at) "
            "SELECT gen_random_uuid(), 'node-' || lpad(n::text, 4, '0'), gen_random_uuid(), 'up', 2, 'bench', '{}', "
            "now() + interval '1 day' FROM generate_series(1, %s) n",
            (self.nodes,),
        )
        connection.execute("INSERT INTO gpu_classes (name, cost) VALUES ('h100-80gb', 1) ON CONFLICT DO NOTHING")
        connection.execute(
            "INSERT INTO gpus (id, node_id, uuid, index, kind, name, total_bytes, usable_bytes, gpu_class, state) "
            "SELECT gen_random_uuid(), n.id, 'GPU-' || i, i, 'cuda', 'H100', %(size)s, %(size)s, 'h100-80gb', "
            "'healthy' "
            "FROM nodes n, generate_series(0, %(each)s - 1) i",
            {"size": 80 * GIB, "each": each},
        )
        connection.execute(
            "INSERT INTO slots (node_id, no) SELECT n.id, i FROM nodes n, generate_series(0, %s - 1) i", (each,)
        )

    def submit(self, connection: psycopg.Connection, count: int) -> None:
        """Waiting jobs in every project, from the oldest on; one in twenty wants two, four or eight GPUs."""
        connection.execute(
            """
            INSERT INTO jobs (id, organization_id, project_id, base_model_id, model, training_file_id, seed, request,
              hyperparameters, model_name, gpus, required_bytes, priority, limit_s, state, fence,
              faults_without_progress, fault_step, event_seq, platform, queued_at)
            SELECT gen_random_uuid(), p.organization_id, p.id, (SELECT id FROM base_models LIMIT 1), 'bench', f.id, 7,
              '{}', '{}', 'ft:bench:' || n, CASE WHEN n %% 20 = 0 THEN 2 << (n / 20 %% 3) ELSE 1 END,
              (10 + n %% 60)::bigint << 30, n %% 5, 1800 + 600 * (n %% 12), 'queued', 0, 0, 0, 0, '{}',
              now() - make_interval(secs => %(count)s - n)
            FROM generate_series(1, %(count)s) n
            JOIN (SELECT *, row_number() OVER (ORDER BY name) AS place FROM projects) p
              ON p.place = 1 + n %% (SELECT count(*) FROM projects)
            JOIN files f ON f.project_id = p.id
            """,
            {"count": count},
        )


def begin(connection: psycopg.Connection) -> None:
    """Every assigned attempt is claimed, loaded, has trained for a while and has a checkpoint."""
    connection.execute(
        "UPDATE jobs SET state = 'running', started_at = now() WHERE state = 'queued' "
        "AND id IN (SELECT job_id FROM attempts WHERE state = 'assigned')"
    )
    connection.execute(
        """
        INSERT INTO checkpoints (id, project_id, job_id, attempt_id, step, object_prefix, files, bytes, metrics)
        SELECT gen_random_uuid(), project_id, job_id, id, no, 'a/' || id, '[]', 10, '{}'
        FROM attempts WHERE state = 'assigned'
        """
    )
    connection.execute(
        "UPDATE attempts SET state = 'running', claimed_at = now(), claimed_by = 'bench', started_at = now(), "
        "first_step_at = now(), lease_expires_at = now() + interval '1 day', "
        "assigned_at = now() - interval '20 minutes' WHERE state = 'assigned'"
    )
