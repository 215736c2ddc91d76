"""`/v1/nodes`: the machines of the deployment. They join with a one-time token, and may be shut out again."""

from typing import Annotated

import structlog
from fastapi import APIRouter, Depends, Request
from redis import Redis

from api import pages
from api.deps import JOIN, JoinToken, Scope, SessionDep, SettingsDep, TenantDep
from api.documentation import problems
from api.schemas.common import Deleted, Page
from api.schemas.nodes import (
    AdmissionOut,
    JoinIn,
    JoinTokenIn,
    JoinTokenOut,
    NodeIn,
    NodeOut,
    admission_out,
    join_token_out,
    node_out,
)
from tunery import __version__, ids, maintenance, membership
from tunery.db import transaction

log = structlog.get_logger(__name__)

router = APIRouter(tags=["Nodes"])
ADMIN = [Depends(Scope("admin"))]
MAX_NODES = 1000


def get_redis(request: Request) -> Redis:
    return request.app.state.redis


RedisDep = Annotated[Redis, Depends(get_redis)]


@router.post("/v1/nodes/tokens", status_code=201, dependencies=ADMIN, responses=problems(400))
def create_join_token(body: JoinTokenIn, tenant: TenantDep, session: SessionDep, settings: SettingsDep) -> JoinTokenOut:
    """A token that admits one node, once, until it expires. `tunery node join` takes it."""
    pepper = settings.key_pepper.get_secret_value()
    token, plain = membership.make_token(session, tenant.actor, pepper, body.expires_in)
    return join_token_out(token, plain)


@router.post(JOIN, responses=problems(400, 409))
def join_node(body: JoinIn, request: Request, token: JoinToken, settings: SettingsDep, redis: RedisDep) -> AdmissionOut:
    """Become a node, with a join token as the bearer. The answer holds credentials for this node alone."""
    sessions = request.app.state.sessions
    pepper = settings.key_pepper.get_secret_value()
    places = membership.places(settings)
    with transaction(sessions) as session:
        digest = membership.check_token(session, token, pepper)
        membership.refuse_version(body.version, __version__)
        membership.refuse_unreachable(places, from_elsewhere=_is_from_elsewhere(request))
        membership.refuse_taken(session, body.name)
        admitted = None if body.dry_run else membership.admit(session, digest, body.name, settings, redis)
    if admitted:
        membership.let_ring(redis, admitted)
        log.info("node joined", node=str(admitted.node_id), name=body.name, address=_peer(request))
    return admission_out(body.name, __version__, places, admitted)


@router.get("/v1/nodes", dependencies=ADMIN, responses=problems(400))
def list_nodes(
    session: SessionDep, after: pages.After = None, limit: Annotated[int, pages.limit_query(MAX_NODES)] = 0
) -> Page[NodeOut]:
    """The deployment's nodes and their devices, in the order in which they came."""
    at = pages.cursor(ids.NODE, after, ascending=True)
    rows, more = membership.page(session, after=at, limit=limit or 100)
    return pages.page(rows, more, node_out)


@router.get("/v1/nodes/{node}", dependencies=ADMIN, responses=problems(404))
def retrieve_node(node: str, session: SessionDep) -> NodeOut:
    """One node, by its id or its name."""
    return node_out(membership.get(session, node))


@router.patch("/v1/nodes/{node}", dependencies=ADMIN, responses=problems(400, 404, 409))
def change_node(node: str, body: NodeIn, tenant: TenantDep, session: SessionDep) -> NodeOut:
    """Label it: your values win over the node's own, and `null` takes a label away."""
    maintenance.relabel(session, tenant.actor, membership.get(session, node).node.id, body.labels)
    return node_out(membership.get(session, node))


@router.post("/v1/nodes/{node}/cordon", dependencies=ADMIN, responses=problems(404, 409))
def cordon_node(node: str, tenant: TenantDep, session: SessionDep) -> NodeOut:
    """Assign nothing more to it. What runs there goes on."""
    maintenance.cordon(session, tenant.actor, membership.get(session, node).node.id)
    return node_out(membership.get(session, node))


@router.post("/v1/nodes/{node}/drain", dependencies=ADMIN, responses=problems(404, 409))
def drain_node(node: str, tenant: TenantDep, session: SessionDep) -> NodeOut:
    """Empty it: each attempt there saves a checkpoint and goes on elsewhere. `drained` when none is left."""
    maintenance.drain(session, tenant.actor, membership.get(session, node).node.id)
    return node_out(membership.get(session, node))


@router.post("/v1/nodes/{node}/uncordon", dependencies=ADMIN, responses=problems(404, 409))
def uncordon_node(node: str, tenant: TenantDep, session: SessionDep) -> NodeOut:
    """It takes work again."""
    maintenance.uncordon(session, tenant.actor, membership.get(session, node).node.id)
    return node_out(membership.get(session, node))


@router.delete("/v1/nodes/{node}", dependencies=ADMIN, responses=problems(404, 409))
def remove_node(node: str, tenant: TenantDep, redis: RedisDep) -> Deleted:
    """Shut a node out at once: its logins end. What it was running is found lost, and resumes elsewhere."""
    with tenant.transaction() as session:
        found = membership.get(session, node).node
    membership.remove(tenant.sessions, redis, tenant.actor, found.id)
    log.info("node removed", node=str(found.id), name=found.name, key=str(tenant.identity.key_id))
    return Deleted(id=ids.encode(ids.NODE, found.id), object="tunery.node")


def _peer(request: Request) -> str:
    return request.client.host if request.client else ""


def _is_from_elsewhere(request: Request) -> bool:
    """A caller on this machine comes from loopback, or from the very address that it called."""
    own = request.scope.get("server") or ("",)
    return _peer(request) not in ("127.0.0.1", "::1", "", own[0])
