"""What routes ask for: who is calling, whether the key may, and a transaction that sees that project alone."""

import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any

import structlog
from fastapi import Depends, Request, Security
from fastapi.concurrency import run_in_threadpool
from fastapi.security import HTTPBearer
from sqlalchemy.orm import Session

from tunery import db, failpoints, ids, tenancy
from tunery.audit import Actor
from tunery.db import Sessions
from tunery.errors import NotFound, Unauthenticated
from tunery.settings import ApiSettings
from tunery.storage import Storage
from tunery.tenancy import Identity

JOIN = "/v1/nodes/join"
"""Here the bearer is a join token, which its route checks: a machine that joins has no key."""
PUBLIC = frozenset({"/healthz", "/livez", "/readyz", "/openapi.json", "/docs", JOIN})
"""Everything else needs a key, also what has not been written yet."""

_bearer = HTTPBearer(auto_error=False, description="An API key: `Authorization: Bearer ftk_live_...`")


async def authenticate(request: Request) -> None:
    """Applied to the whole app; async, so that liveness needs no thread while a hung database holds them all."""
    if request.scope["path"] not in PUBLIC:
        await run_in_threadpool(_authenticate, request)
        who: Identity = request.state.identity
        project, key = ids.encode(ids.PROJECT, who.project_id), ids.encode(ids.KEY, who.key_id)
        structlog.contextvars.bind_contextvars(project=project, key=key)


def _authenticate(request: Request) -> None:
    """The key is looked up in a transaction of its own, before any project is known."""
    if (key := _presented(request)) is None:
        fix = "Send the header 'Authorization: Bearer <key>'."
        raise Unauthenticated("You did not provide an API key.", fix=fix)
    app = request.app.state
    with db.transaction(app.sessions) as session:
        pepper = app.settings.key_pepper.get_secret_value()
        request.state.identity = tenancy.authenticate(session, key, pepper)


def join_token(request: Request, _shown_in_the_document: Annotated[Any, Security(_bearer)] = None) -> str:
    """The token as it was sent; whether it admits anybody is for `membership.check_token` to say."""
    if (token := _presented(request)) is None:
        fix = "Send the header 'Authorization: Bearer <join token>'; `tunery node token` makes one."
        raise Unauthenticated("You did not provide a join token.", fix=fix, code="invalid_join_token")
    return token


def _presented(request: Request) -> str | None:
    scheme, _, secret = request.headers.get("authorization", "").partition(" ")
    return secret.strip() or None if scheme.lower() == "bearer" else None


@dataclass(frozen=True)
class Scope:
    """A dependency: the key must carry this scope. One on every route that is not public."""

    name: str | None
    """None: any valid key will do."""

    def __call__(self, request: Request, _shown_in_the_document: Annotated[Any, Security(_bearer)] = None) -> None:
        if self.name is not None:
            request.state.identity.require(self.name)


@dataclass(frozen=True)
class Tenant:
    """The calling project, for routes that open their own short transactions around slow work."""

    identity: Identity
    sessions: Sessions
    request_id: str | None = None

    @property
    def actor(self) -> Actor:
        """For the audit log."""
        return Actor(self.identity, self.request_id)

    @property
    def project_id(self) -> uuid.UUID:
        return self.identity.project_id

    def of(self, project_id: uuid.UUID) -> "Tenant":
        """Transactions that see another project, for routes that have asked for the scope `admin`."""
        return Tenant(replace(self.identity, project_id=project_id), self.sessions, self.request_id)

    def transaction(self) -> AbstractContextManager[Session]:
        return db.transaction(partial(db.for_project, self.sessions, self.project_id))


def get_tenant(request: Request) -> Tenant:
    return Tenant(request.state.identity, request.app.state.sessions, request.state.request_id)


def get_session(tenant: Annotated[Tenant, Depends(get_tenant)]) -> Iterator[Session]:
    with tenant.transaction() as session:
        yield session
    failpoints.reach("request.committed")


def get_storage(request: Request) -> Storage:
    return request.app.state.storage


def get_settings(request: Request) -> ApiSettings:
    return request.app.state.settings


def job_id(fine_tuning_job_id: str) -> uuid.UUID:
    """From the path. What is not an id at all is answered like an id that does not exist."""
    try:
        return ids.decode(ids.JOB, fine_tuning_job_id)
    except NotFound:
        fix = "`tunery jobs list` shows this project's jobs."
        raise NotFound("No such fine-tuning job.", param="fine_tuning_job_id", fix=fix) from None


TenantDep = Annotated[Tenant, Depends(get_tenant)]
# function scope: the commit happens before the answer leaves, so that nothing acknowledged can still be lost
SessionDep = Annotated[Session, Depends(get_session, scope="function")]
StorageDep = Annotated[Storage, Depends(get_storage)]
SettingsDep = Annotated[ApiSettings, Depends(get_settings)]
JoinToken = Annotated[str, Depends(join_token)]
JobId = Annotated[uuid.UUID, Depends(job_id)]
