"""The scheduler's SQL: leadership, what the policy sees, carrying out what it decided, and finding what went silent."""

from tunery.queue.decisions import NodeFull, NotStarted, apply, assign, record, start
from tunery.queue.leadership import Deposed, assert_leader, epoch_of, lead, live_nodes, resign
from tunery.queue.mirror import Mirror
from tunery.queue.silence import (
    archived_jobs,
    expired_attempts,
    forgive_outage,
    live_attempts,
    overdue_attempts,
    stranded_attempts,
    unclaimed_attempts,
)
from tunery.queue.snapshots import snapshot

__all__ = [
    "Deposed",
    "Mirror",
    "NodeFull",
    "NotStarted",
    "apply",
    "archived_jobs",
    "assert_leader",
    "assign",
    "epoch_of",
    "expired_attempts",
    "forgive_outage",
    "lead",
    "live_attempts",
    "live_nodes",
    "overdue_attempts",
    "record",
    "resign",
    "snapshot",
    "start",
    "stranded_attempts",
    "unclaimed_attempts",
]
