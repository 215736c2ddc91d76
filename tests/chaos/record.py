"""What Postgres' own record may not say of devices, projects, pre-emptions and usage, once all is at rest."""

from sqlalchemy import text

from tests.fleet import Fleet

RECORD = {
    "exclusive allocations of one device overlap": """
        SELECT a.gpu_id FROM allocations a JOIN allocations b ON a.gpu_id = b.gpu_id AND a.id < b.id
        WHERE (a.exclusive OR b.exclusive)
          AND tstzrange(a.created_at, a.released_at) && tstzrange(b.created_at, b.released_at)""",
    "an attempt has not the devices its job asked for, on its own node": """
        SELECT t.id FROM attempts t JOIN jobs j ON j.id = t.job_id
          LEFT JOIN allocations a ON a.owner_attempt = t.id
          LEFT JOIN gpus g ON g.id = a.gpu_id AND g.node_id = t.node_id
        GROUP BY t.id, j.gpus HAVING count(g.id) <> j.gpus""",
    "a project had more than its cap": """
        SELECT p.id FROM projects p JOIN jobs j ON j.project_id = p.id JOIN attempts t ON t.job_id = j.id
          CROSS JOIN LATERAL (
            SELECT sum(o.rate) AS rate FROM attempts o JOIN jobs k ON k.id = o.job_id
            WHERE k.project_id = p.id AND o.assigned_at <= t.assigned_at
              AND coalesce(o.ended_at > t.assigned_at, true) AND EXISTS (
                SELECT FROM allocations a WHERE a.owner_attempt = o.id
                  AND coalesce(a.released_at > t.assigned_at, true))) held
        WHERE p.cap IS NOT NULL AND held.rate > p.cap + 1e-6""",
    "a job was moved off more often than it may be": """
        SELECT job_id FROM attempts WHERE preempted_at IS NOT NULL GROUP BY job_id HAVING count(*) > 3""",
    "two projects took turns": """
        SELECT a.id FROM attempts a JOIN attempts b ON a.project_id = b.preempted_for_project
          AND b.project_id = a.preempted_for_project AND a.id < b.id
        WHERE a.preempted_for_project <> a.project_id""",
    "an attempt's time does not add up": """
        SELECT attempt_id FROM usage
        WHERE abs(gpu_seconds - loading_s - productive_s - user_fault_s - platform_fault_s) > 1e-3""",
    "a device's time was counted twice": """
        SELECT attempt_id FROM usage GROUP BY attempt_id, gpu_id HAVING count(*) > 1""",
    "a device's time was not counted": """
        SELECT l.id FROM allocations l JOIN attempts t ON t.id = l.owner_attempt
        WHERE t.claimed_at IS NOT NULL AND l.released_at IS NOT NULL
          AND NOT EXISTS (SELECT FROM usage u WHERE u.attempt_id = t.id AND u.gpu_id = l.gpu_id)""",
    "what was counted is not the time of an attempt on its device": """
        SELECT u.id FROM usage u JOIN attempts t ON t.id = u.attempt_id
          LEFT JOIN allocations l ON l.owner_attempt = t.id AND l.gpu_id = u.gpu_id
        WHERE t.claimed_at IS NULL OR l.id IS NULL
          OR abs(u.gpu_seconds - extract(epoch FROM l.released_at - t.assigned_at)) > 1e-3""",
    "what a fault of ours cost was not refunded": """
        SELECT u.id FROM usage u JOIN attempts t ON t.id = u.attempt_id LEFT JOIN LATERAL (
            SELECT extract(epoch FROM max(c.created_at) - t.assigned_at) AS s FROM checkpoints c
            WHERE c.attempt_id = t.id) kept ON true
        WHERE (t.state IN ('preempted', 'lost') OR t.fault = 'platform')
          AND u.gpu_seconds - u.platform_fault_s
            > coalesce(least(u.gpu_seconds, greatest(kept.s, u.loading_s)), 0) + 1e-2""",
    "work that was kept was not charged": """
        SELECT u.id FROM usage u JOIN attempts t ON t.id = u.attempt_id
        WHERE t.state = 'succeeded' AND t.fault IS NULL AND u.platform_fault_s > 1e-3""",
    "a budget's alert was told more than once, or never": """
        SELECT a.project_id FROM budget_alerts a LEFT JOIN outbox o ON o.topic = 'budget_alert'
          AND o.project_id = a.project_id AND (o.payload->>'threshold')::int = a.threshold
          AND o.payload->>'month' = to_char(a.month, 'YYYY-MM') AND o.created_at > now() - interval '1 day'
        WHERE a.created_at > now() - interval '23 hours'
        GROUP BY a.project_id, a.month, a.threshold HAVING count(o.id) <> 1""",
    "GPUs are kept for a job that has ended": """
        SELECT h.job_id FROM holds h JOIN jobs j ON j.id = h.job_id
        WHERE j.finished_at < now() - interval '10 seconds'""",
}


def against(fleet: Fleet) -> list[str]:
    """Each violation is one sentence."""
    with fleet.look() as session:
        return [f"{what}: {row[0]}" for what, query in RECORD.items() for row in session.execute(text(query))]
