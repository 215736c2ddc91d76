"""What a project uses."""

import csv
import io
from collections.abc import Iterable
from datetime import date
from decimal import Decimal
from typing import Any, Literal

from api.schemas.common import Out
from tunery import ids, ledger
from tunery.ledger import Line, Used
from tunery.tenancy import Identity
from tunery.usage import StorageUsage


class UsedOut(Out):
    count: int
    bytes: int


class StorageUsageOut(Out):
    """Bytes in the object store. Logs are not part of `total_bytes`: they count against no limit."""

    object: Literal["tunery.usage.storage"] = "tunery.usage.storage"
    project_id: str
    total_bytes: int
    limit_bytes: int
    files: UsedOut
    datasets: UsedOut
    checkpoints: UsedOut
    adapters: UsedOut
    logs: UsedOut


class GpuTimeOut(Out):
    """GPU-seconds. The four kinds add up to `gpu_seconds`; charged is all but `platform_fault_seconds`."""

    gpu_seconds: float
    loading_seconds: float
    productive_seconds: float
    user_fault_seconds: float
    platform_fault_seconds: float
    charged_gpu_seconds: float
    running_gpu_seconds: float
    """Of `gpu_seconds`: of attempts that still run. Until they end it is an estimate."""
    amount: float | None
    """By the price list of the moment at which each attempt ended; null where there was no price."""


class ClassUsageOut(GpuTimeOut):
    gpu_class: str


class UsageOut(Out):
    """One month, UTC. What an attempt used belongs, undivided, to the month in which it gave its GPUs back."""

    object: Literal["tunery.usage"] = "tunery.usage"
    project_id: str
    month: str
    total: GpuTimeOut
    classes: list[ClassUsageOut]


class CostOut(Out):
    """Of all attempts together, up to now: GPU-hours times rate."""

    gpu_seconds: float
    charged_gpu_seconds: float
    """What was lost through the platform is not charged."""
    amount: float | None
    """Null where there is no price."""
    running: bool
    """It still grows."""


def usage_out(who: Identity, month: date, classes: dict[str, Used]) -> UsageOut:
    return UsageOut(
        project_id=ids.encode(ids.PROJECT, who.project_id),
        month=month.strftime("%Y-%m"),
        total=GpuTimeOut(**_gpu_time(ledger.total(list(classes.values())))),
        classes=[ClassUsageOut(gpu_class=name, **_gpu_time(used)) for name, used in classes.items()],
    )


def cost_out(used: Used | None) -> CostOut:
    used = used or Used()
    return CostOut(
        gpu_seconds=round(used.gpu_seconds, 3),
        charged_gpu_seconds=round(used.charged_s, 3),
        amount=_money(used.amount),
        running=used.running_s > 0,
    )


_COLUMNS = (
    "job", "attempt", "gpu", "gpu_class", "ended_at", "running", "gpu_share", "gpu_seconds", "loading_seconds",
    "productive_seconds", "user_fault_seconds", "platform_fault_seconds", "charged_gpu_seconds", "price_per_hour",
    "amount",
)  # fmt: skip


def usage_csv(lines: Iterable[Line]) -> str:
    """RFC 4180. Seconds are already multiplied by the share; what runs has no end."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(_COLUMNS)
    for line in lines:
        seconds = (line.gpu_seconds, line.loading_s, line.productive_s, line.user_fault_s, line.platform_fault_s)
        writer.writerow(
            (
                ids.encode(ids.JOB, line.job_id),
                ids.encode(ids.ATTEMPT, line.attempt_id),
                str(line.gpu_id),
                line.gpu_class,
                "" if line.running else line.at.isoformat(timespec="seconds"),
                "true" if line.running else "false",
                f"{line.share:.6g}",
                *(f"{value:.3f}" for value in (*seconds, line.charged_s)),
                "" if line.price_per_hour is None else str(line.price_per_hour),
                "" if line.amount is None else f"{line.amount:.6f}",
            )
        )
    return text.getvalue()


def storage_usage_out(who: Identity, used: StorageUsage) -> StorageUsageOut:
    kinds: dict[str, Any] = {kind: UsedOut(count=item.count, bytes=item.bytes) for kind, item in used.kinds.items()}
    return StorageUsageOut(
        project_id=ids.encode(ids.PROJECT, who.project_id),
        total_bytes=used.counted_bytes,
        limit_bytes=used.limit_bytes,
        **kinds,
    )


def _gpu_time(used: Used) -> dict[str, Any]:
    return {
        "gpu_seconds": round(used.gpu_seconds, 3),
        "loading_seconds": round(used.loading_s, 3),
        "productive_seconds": round(used.productive_s, 3),
        "user_fault_seconds": round(used.user_fault_s, 3),
        "platform_fault_seconds": round(used.platform_fault_s, 3),
        "charged_gpu_seconds": round(used.charged_s, 3),
        "running_gpu_seconds": round(used.running_s, 3),
        "amount": _money(used.amount),
    }


def _money(amount: Decimal | None) -> float | None:
    """Ten-thousandths: prices have four digits, and the sums of a month should too."""
    return None if amount is None else float(round(amount, 4))
