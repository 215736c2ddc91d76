"""After a restore, nothing of the deployment that was backed up may act on this one. May be repeated."""

import psycopg

from tunery import leases, queue, tasks
from tunery.bootstrap import OWNER
from tunery.db import make_engine, make_sessions, transaction

_JUMP = 1_000_000
"""Attempts and tasks that the old deployment fenced after the backup have lower numbers than all of ours."""
_STATEMENTS = (
    # what was held until the backup is billed to nobody: nobody knows when it was let go
    "UPDATE allocations SET released_at = now() WHERE released_at IS NULL",
    "UPDATE slots SET attempt_id = NULL WHERE attempt_id IS NOT NULL",
    "UPDATE nodes SET state = 'down', removed_at = now() WHERE removed_at IS NULL",
    "UPDATE node_credentials SET revoked_at = now() WHERE revoked_at IS NULL",
    "UPDATE join_tokens SET expires_at = now() WHERE used_at IS NULL AND expires_at > now()",
    "UPDATE engines SET state = 'down' WHERE state <> 'down'",
    "UPDATE leader SET expires_at = now(), epoch = epoch + 1000, swept_at = now()",
    "DELETE FROM deletion_holds",
    f"SELECT setval('fence_seq', last_value + {_JUMP}) FROM fence_seq",
)


def fence(migrate_url: str, scheduler_url: str) -> int:
    """Removes nodes, ends live attempts, and returns how many of them there were; their jobs wait again."""
    with psycopg.connect(migrate_url) as connection:
        connection.execute(f"SET ROLE {OWNER}".encode())
        for statement in _STATEMENTS:
            connection.execute(statement.encode())
    engine = make_engine(scheduler_url, pool_size=1)
    try:
        sessions = make_sessions(engine)
        with transaction(sessions) as session:
            live = queue.live_attempts(session)
            tasks.give_all_back(session)
        for attempt_id in live:
            with transaction(sessions) as session:
                leases.interrupt(session, attempt_id, "The deployment was restored from a backup.")
    finally:
        engine.dispose()
    return len(live)
