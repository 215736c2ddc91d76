"""`/v1/usage`: what this project uses."""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query
from fastapi.responses import Response

from api.deps import Scope, SessionDep, SettingsDep, TenantDep
from api.documentation import problems
from api.schemas.usage import StorageUsageOut, UsageOut, storage_usage_out, usage_csv, usage_out
from tunery import ledger, usage

router = APIRouter(prefix="/v1/usage", tags=["Usage"])
Month = Annotated[str | None, Query(description="`2026-11`; else this month. Months are UTC's.", max_length=20)]
_CSV: dict[int | str, dict[str, Any]] = {200: {"content": {"text/csv": {"schema": {"type": "string"}}}}}


@router.get("", response_model=UsageOut, dependencies=[Depends(Scope("jobs:read"))], responses=problems(400) | _CSV)
def gpu_usage(
    tenant: TenantDep, session: SessionDep, month: Month = None, format: Literal["json", "csv"] = "json"
) -> UsageOut | Response:
    """A month's GPU time by class, how it was spent, and what it costs; as CSV one line an attempt and GPU.

    What runs now is in it, so far.
    """
    start = ledger.month(session, month)
    if format == "json":
        return usage_out(tenant.identity, start, ledger.by_class(session, tenant.project_id, start))
    content = usage_csv(ledger.lines(session, tenant.project_id, start))
    headers = {"content-disposition": f'attachment; filename="usage-{start:%Y-%m}.csv"'}
    return Response(content, media_type="text/csv; charset=utf-8", headers=headers)


@router.get("/storage", dependencies=[Depends(Scope("files:read"))])
def storage_usage(tenant: TenantDep, session: SessionDep, settings: SettingsDep) -> StorageUsageOut:
    """Bytes that this project keeps, by kind, and its limit."""
    return storage_usage_out(tenant.identity, usage.storage(session, tenant.project_id, settings.max_project_bytes))
