"""`/v1/usage`: what this project uses."""

from fastapi import APIRouter, Depends

from api.deps import Scope, SessionDep, SettingsDep, TenantDep
from api.schemas.usage import StorageUsageOut, storage_usage_out
from tunery import usage

router = APIRouter(prefix="/v1/usage", tags=["Usage"], dependencies=[Depends(Scope("files:read"))])


@router.get("/storage")
def storage_usage(tenant: TenantDep, session: SessionDep, settings: SettingsDep) -> StorageUsageOut:
    """Bytes that this project keeps, by kind, and its limit."""
    return storage_usage_out(tenant.identity, usage.storage(session, tenant.project_id, settings.max_project_bytes))
