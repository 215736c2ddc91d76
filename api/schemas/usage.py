"""What a project uses."""

from typing import Any, Literal

from api.schemas.common import Out
from tunery import ids
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


def storage_usage_out(who: Identity, used: StorageUsage) -> StorageUsageOut:
    kinds: dict[str, Any] = {kind: UsedOut(count=item.count, bytes=item.bytes) for kind, item in used.kinds.items()}
    return StorageUsageOut(
        project_id=ids.encode(ids.PROJECT, who.project_id),
        total_bytes=used.counted_bytes,
        limit_bytes=used.limit_bytes,
        **kinds,
    )
