"""What the supervisor sees of an attempt's devices: kept with the job, and an alert where they have little to do."""

import uuid
from dataclasses import dataclass

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from tunery import events, leases, progress
from tunery.events import Entry

UNDERUSED = "gpu_underused"
"""Kind of the event."""


@dataclass(frozen=True)
class Sample:
    """Of all devices of one attempt, at one moment."""

    utilization: float
    """Mean of the devices since the last sample, 0 to 1."""
    memory_bytes: int
    """Sum of the devices; with a CPU, what the attempt's processes have resident."""
    low_s: float = 0.0
    """For so long the devices have done less than the threshold without a break; 0 if they have not."""
    low_mean: float = 0.0
    """Their mean utilization in that time."""
    device: str = "GPU"
    """In words."""


def store(session: Session, attempt_id: uuid.UUID, fence: int, sample: Sample, *, below: float, after_s: float) -> None:
    """Show a sample on its job, and tell once an episode that the devices are underused for `after_s`.

    An episode ends with the first sample that is not below the threshold, or with the attempt. What was told is
    decided by the job's row, so that a sample sent twice tells nothing twice. Raises leases.Fenced.
    """
    held = leases.hold(session, attempt_id, fence)
    known = dict(held.job.progress or {})
    now = session.execute(select(func.extract("epoch", func.now()))).scalar_one()
    known["sampled_at"] = round(float(now), 3)
    known["gpu_utilization"] = round(sample.utilization, 4)
    known["device_memory_bytes"] = sample.memory_bytes
    # by number: a trainer's first word may be stored after the first samples
    if not sample.low_s or known.get("sampled_attempt") != held.attempt.no:
        known["underused_since"] = None
    known["sampled_attempt"] = held.attempt.no
    if sample.low_s >= after_s and known["underused_since"] is None:
        known["underused_since"] = round(float(now) - sample.low_s, 3)
        events.append(session, held.job, [_alert(sample, below)])
    held.job.progress = known
    values = {"system/gpu_utilization": sample.utilization, "system/device_memory_bytes": float(sample.memory_bytes)}
    progress.store_points(session, held, [(known.get("step", 0), values)])


def _alert(sample: Sample, below: float) -> Entry:
    """As a user may read it: 0.3 is 30 %."""
    for_s = leases.spoken(sample.low_s)
    message = (
        f"The {sample.device} was {100 * sample.low_mean:.0f} % busy in the last {for_s}, "
        f"less than the {100 * below:.0f} % below which it is worth a look"
    )
    data = {"kind": UNDERUSED, "utilization": round(sample.low_mean, 4), "below": below, "for_s": round(sample.low_s)}
    return Entry(message, "warn", data=data)
