"""Who holds a job, and what becomes of it: the only package that writes `jobs.state` and `attempts.state`.

Every change locks the job, then the attempt, then GPUs by id, so that no two programs can deadlock. A writer that
holds an attempt shows its fence; whoever was replaced is told `Fenced`.
"""

from tunery.leases.asking import CANCEL_GRACE_S, cancel, enqueue, reject
from tunery.leases.holding import (
    Asked,
    Fenced,
    begin_publishing,
    claim,
    fail,
    give_back,
    hold,
    mark_running,
    renew,
    stopped,
    succeed,
)
from tunery.leases.moves import Held, release, spoken
from tunery.leases.taking import abandon, declare_lost, evict, interrupt, time_out, unassign

__all__ = [
    "CANCEL_GRACE_S",
    "Asked",
    "Fenced",
    "Held",
    "abandon",
    "begin_publishing",
    "cancel",
    "claim",
    "declare_lost",
    "enqueue",
    "evict",
    "fail",
    "give_back",
    "hold",
    "interrupt",
    "mark_running",
    "reject",
    "release",
    "renew",
    "spoken",
    "stopped",
    "succeed",
    "time_out",
    "unassign",
]
