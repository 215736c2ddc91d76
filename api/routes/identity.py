"""`/v1/whoami`: which key is in use, and what it opens."""

from fastapi import APIRouter, Depends

from api.deps import Scope, TenantDep
from api.schemas.registry import IdentityOut, identity_out

router = APIRouter(prefix="/v1", tags=["Identity"], dependencies=[Depends(Scope(None))])


@router.get("/whoami")
def whoami(tenant: TenantDep) -> IdentityOut:
    """The key's organization, project and scopes."""
    return identity_out(tenant.identity)
