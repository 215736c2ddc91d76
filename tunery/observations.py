"""What runs really took: written when they end, read back in aggregates that name nobody."""

import uuid
from dataclasses import dataclass

from sqlalchemy import func, select, text
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from tunery import nodes
from tunery.contracts.spec import Recipe
from tunery.estimate import memory
from tunery.estimate.correction import Seen
from tunery.estimate.places import Device
from tunery.models import Allocation, Attempt, Job, RunObservation

SUCCEEDED = "succeeded"


def note(session: Session, job: Job, attempt: Attempt, outcome: str, peak_bytes: int, tokens: int = 0) -> None:
    """Keep what an attempt took that has ended, once. `tokens` counts the whole job's; of a resumed attempt its share.

    `outcome` is `succeeded` or the failure code. An attempt inside an engine is not kept: its peak is not its own.
    """
    devices = nodes.devices_of(session, attempt.id)
    if not devices or attempt.engine_id is not None or job.recipe is None or not job.estimated_bytes:
        return
    freed = select(func.coalesce(func.max(Allocation.released_at), func.now()))
    until = session.scalar(freed.where(Allocation.owner_attempt == attempt.id))
    began, claimed = attempt.first_step_at, attempt.claimed_at
    row = {
        "attempt_id": attempt.id,
        "project_id": job.project_id,
        "job_id": job.id,
        "base_model_id": job.base_model_id,
        "gpu_class": devices[0].gpu_class,
        "gpus": len(devices),
        "method": memory.method_of(Recipe.model_validate(job.recipe)),
        "outcome": outcome,
        "estimated_bytes": job.estimated_bytes,
        "peak_bytes": max(0, peak_bytes),
        "tokens": _own_tokens(job, attempt, tokens) if began else 0,
        "load_s": max(0.0, (began - claimed).total_seconds()) if began and claimed else 0.0,
        "train_s": max(0.0, (until - began).total_seconds()) if began and until else 0.0,
    }
    session.execute(insert(RunObservation).values(**row).on_conflict_do_nothing())


def peaks(session: Session, base_model_id: uuid.UUID, method: str, gpu_class: str | None, estimate: int) -> Seen:
    """What is known of the memory of such runs, everybody's. `gpu_class` None: on any."""
    query = text("SELECT scope, samples, tail, largest FROM learned_memory(:base, :how, :class, :estimate)")
    asked = {"base": base_model_id, "how": method, "class": gpu_class, "estimate": estimate}
    found = {row.scope: row for row in session.execute(query, asked)}
    base, method_wide = found.get("base"), found.get("method")
    return Seen(
        samples=base.samples if base else 0,
        tail=base.tail if base else 1.0,
        largest_bytes=(base.largest or 0) if base else 0,
        elsewhere=method_wide.samples if method_wide else 0,
        elsewhere_tail=method_wide.tail if method_wide else 1.0,
    )


@dataclass(frozen=True, slots=True)
class Speed:
    """Of runs on one base model, by one method, on one class or (None) on all. Seconds."""

    samples: int
    token_s_p50: float
    """Of one GPU, for a token that had been estimated."""
    token_s_p90: float
    load_s_p50: float
    load_s_p90: float


Speeds = dict[tuple[uuid.UUID, str, str | None], Speed]


def speeds(session: Session) -> Speeds:
    """Every group that has runs to tell of."""
    rows = session.execute(text("SELECT * FROM learned_speeds()")).tuples()
    return {(base, method, gpu_class): Speed(*numbers) for base, method, gpu_class, *numbers in rows}


def devices(session: Session) -> list[Device]:
    """Of all the deployment's nodes, up or not."""
    rows = session.execute(text("SELECT node, gpu_class, kind, usable_bytes, labels FROM fleet_devices()"))
    return [Device(*row) for row in rows.tuples()]


def _own_tokens(job: Job, attempt: Attempt, tokens: int) -> int:
    total = (job.progress or {}).get("total_steps") or 0
    return round(tokens * (1 - attempt.start_step / total)) if 0 < attempt.start_step < total else tokens
