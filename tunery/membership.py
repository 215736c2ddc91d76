"""Which machines belong to the deployment: join tokens, admission with credentials of a node's own, and removal."""

import hashlib
import hmac
import ipaddress
import secrets
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any
from urllib.parse import quote, urlsplit, urlunsplit

import psycopg
import structlog
from psycopg.errors import FeatureNotSupported, UndefinedFunction
from redis import Redis
from redis.exceptions import RedisError
from sqlalchemy import func, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from tunery import audit, ids, node_logins, redis_acl
from tunery.audit import Actor
from tunery.db import Sessions, transaction
from tunery.errors import Conflict, NotFound, Unauthenticated
from tunery.ids import uuid7
from tunery.models import Gpu, JoinToken, Node, NodeCredentials
from tunery.settings import ApiSettings

log = structlog.get_logger(__name__)

TOKEN_PREFIX = "tunery_join_"  # noqa: S105 - the beginning of every token
SILENT_AFTER_S = 45.0
"""A node that said nothing for so long is shown as silent."""


@dataclass(frozen=True)
class NodeView:
    """A node with its devices, as operators see it."""

    node: Node
    joined: bool
    silent: bool
    devices: Sequence[Gpu]
    attempts: int = 0
    """Live, or still holding its devices."""
    tasks: int = 0

    @property
    def state(self) -> str:
        """`drained` is a node that drains and has nothing left: it may be switched off."""
        if self.node.state == "draining" and not self.attempts and not self.tasks:
            return "drained"
        return "silent" if self.silent else self.node.state


@dataclass(frozen=True)
class Place:
    """Where a server is; the login comes separately."""

    what: str
    setting: str
    url: str = field(repr=False)

    @property
    def host(self) -> str:
        return urlsplit(self.url).hostname or ""

    @property
    def address(self) -> str:
        parts = urlsplit(self.url)
        ports = {"postgresql": 5432, "postgres": 5432, "redis": 6379, "rediss": 6379, "http": 80, "https": 443}
        return f"{parts.hostname}:{parts.port or ports.get(parts.scheme, 0)}"


@dataclass(frozen=True)
class Admitted:
    """What a node is told once. `environment` holds its secrets: it is sent, and neither stored nor logged."""

    node_id: uuid.UUID
    name: str
    environment: dict[str, str] = field(repr=False)
    redis_sha256: str | None


# ---- tokens -------------------------------------------------------------------------------------------------


def make_token(session: Session, actor: Actor, pepper: str, lives_s: float) -> tuple[JoinToken, str]:
    """A token for one node. Its text (256 random bits) is returned this once."""
    plain = TOKEN_PREFIX + secrets.token_urlsafe(32)
    expires_at = func.now() + timedelta(seconds=lives_s)
    token = JoinToken(token_hmac=_digest(plain, pepper), created_by=actor.identity.key_id, expires_at=expires_at)
    session.add(token)
    session.flush()
    session.refresh(token, ["expires_at", "created_at"])
    wire_id = ids.encode(ids.JOIN_TOKEN, token.id)
    audit.record(session, actor, "node.token", wire_id, after={"expires_at": token.expires_at.isoformat()})
    log.info("join token made", token=wire_id, key=str(actor.identity.key_id))
    return token, plain


def check_token(session: Session, presented: str, pepper: str) -> bytes:
    """The digest of a token that would admit a node now.

    Raises:
        Unauthenticated: malformed, unknown, used or expired.
    """
    digest = _digest(presented, pepper)
    found = session.scalar(text("SELECT find_join_token(:digest)"), {"digest": digest})
    if found == "good" and presented.startswith(TOKEN_PREFIX):
        return digest
    why = {"used": "This join token has been used.", "expired": "This join token has expired."}
    raise Unauthenticated(
        why.get(found or "", "This is not a join token of this server."),
        fix="Make a new one with `tunery node token`; each admits one node.",
        code="invalid_join_token",
    )


# ---- admission ----------------------------------------------------------------------------------------------


def places(settings: ApiSettings) -> list[Place]:
    """The addresses that nodes are told, from the settings or, where they say nothing, the api's own."""
    own_database = settings.node_database_url or settings.database_url
    own_redis = settings.node_redis_url or settings.redis_url
    s3 = settings.node_s3_endpoint_url or settings.s3_endpoint_url
    found = [
        Place("database", "TUNERY_NODE_DATABASE_URL", own_database.get_secret_value()),
        Place("redis", "TUNERY_NODE_REDIS_URL", own_redis.get_secret_value()),
    ]
    return [*found, Place("s3", "TUNERY_NODE_S3_ENDPOINT_URL", s3)] if s3 else found


def refuse_unreachable(found: Sequence[Place], *, from_elsewhere: bool) -> None:
    """Raises Conflict where a node on another machine would be told a loopback address."""
    near = [place for place in found if _is_loopback(place.host)]
    if near and from_elsewhere:
        raise Conflict(
            f"This server's {near[0].what} listens on {near[0].address}: another machine cannot reach it.",
            fix=(
                f"Give the api {' and '.join(place.setting for place in near)} with an address that nodes reach; the "
                "embedded servers listen on loopback only, so use servers of your own or a tunnel (docs/node.md)."
            ),
            code="node_unreachable_servers",
        )


def refuse_version(asked: str, ours: str) -> None:
    """Raises Conflict unless both are of the same minor release: they share a schema and a protocol."""
    if asked.split(".")[:2] != ours.split(".")[:2]:
        raise Conflict(
            f"The node's checkout is version {asked[:40]}, this server is {ours}.",
            param="version",
            fix=f"Check out the server's release on that machine: git checkout v{ours}",
            code="version_mismatch",
        )


def refuse_taken(session: Session, name: str) -> None:
    """Raises Conflict where a node of that name belongs already."""
    if session.scalar(select(Node.id).where(Node.name == name, Node.removed_at.is_(None))) is not None:
        raise Conflict(
            f"There is a node named '{name}' already.",
            param="name",
            fix=f"Join with another --name, or `tunery node remove {name}` first.",
        )


def admit(session: Session, digest: bytes, name: str, settings: ApiSettings, redis: Redis) -> Admitted:
    """Use the token up and make the node's logins, all in this transaction.

    Raises:
        Unauthenticated: somebody else used the token meanwhile.
        Conflict: this deployment cannot admit a node yet; the fix says what it lacks.
    """
    s3_key, s3_secret = settings.node_s3_access_key_id, settings.node_s3_secret_access_key
    if s3_key is None or s3_secret is None:
        raise _unprepared(
            "This server has no object store identity for nodes.",
            "Give the api TUNERY_NODE_S3_ACCESS_KEY_ID and TUNERY_NODE_S3_SECRET_ACCESS_KEY: an identity that reads "
            "u/ and a/ of the bucket and writes a/ (docs/node.md). The api's own key is never handed out.",
        )
    node_id, password, redis_password = uuid7(), secrets.token_urlsafe(32), secrets.token_urlsafe(32)
    redis_digest = hashlib.sha256(redis_password.encode()).hexdigest() if _keeps_users(redis) else None
    login = node_logins.login_of(node_id)
    given = {
        "digest": digest,
        "id": node_id,
        "name": name,
        "verifier": _verifier(session, login, password),
        "redis": redis_digest,
    }
    try:
        admitted = session.scalar(text("SELECT admit_node(:digest, :id, :name, :verifier, :redis)"), given)
    except DBAPIError as error:
        if isinstance(error.orig, UndefinedFunction):
            fix = "Run `tunery db init` with an admin URL once more: it makes what joining needs."
            raise _unprepared("The database was prepared by an older Tunery.", fix) from error
        if isinstance(error.orig, FeatureNotSupported):
            fix = "Use PostgreSQL 16 or later, or run `python -m worker` with TUNERY_* of your own (docs/node.md)."
            raise _unprepared("Nodes can join on PostgreSQL 16 or later only.", fix) from error
        raise
    if not admitted:
        raise Unauthenticated(
            "This join token has been used.", fix="Make a new one with `tunery node token`.", code="invalid_join_token"
        )
    where = {place.what: place.url for place in places(settings)}
    environment = {
        "TUNERY_DATABASE_URL": _with_login(where["database"], login, password),
        "TUNERY_S3_BUCKET": settings.s3_bucket,
        "TUNERY_S3_REGION": settings.s3_region,
        "TUNERY_S3_ACCESS_KEY_ID": s3_key.get_secret_value(),
        "TUNERY_S3_SECRET_ACCESS_KEY": s3_secret.get_secret_value(),
    }
    if redis_digest:
        environment["TUNERY_REDIS_URL"] = _with_login(where["redis"], redis_acl.user_of(node_id), redis_password)
    if "s3" in where:
        environment["TUNERY_S3_ENDPOINT_URL"] = where["s3"]
    return Admitted(node_id, name, environment, redis_digest)


def let_ring(redis: Redis, admitted: Admitted) -> None:
    """Make the node's Redis user now. Where Redis is away, the scheduler makes it later, and the node polls."""
    if admitted.redis_sha256:
        try:
            redis_acl.admit(redis, admitted.node_id, admitted.redis_sha256)
        except RedisError as error:
            log.warning("no user in redis yet; the node polls", node=str(admitted.node_id), error=str(error)[:200])


# ---- looking, and removal -----------------------------------------------------------------------------------


def page(session: Session, *, after: uuid.UUID | None, limit: int) -> tuple[list[NodeView], bool]:
    """Nodes that belong, oldest first, and whether there are more."""
    query = select(Node).where(Node.removed_at.is_(None)).order_by(Node.id).limit(limit + 1)
    if after is not None:
        query = query.where(Node.id > after)
    nodes = list(session.scalars(query))
    return _views(session, nodes[:limit]), len(nodes) > limit


def get(session: Session, name_or_id: str) -> NodeView:
    """Raises NotFound."""
    present = select(Node).where(Node.removed_at.is_(None))
    found = session.scalar(present.where(Node.name == name_or_id))
    if found is None and name_or_id.startswith(ids.NODE):
        try:
            found = session.scalar(present.where(Node.id == ids.decode(ids.NODE, name_or_id)))
        except NotFound:
            found = None
    if found is None:
        raise NotFound(f"No such node: '{name_or_id[:80]}'", param="node", fix="`tunery nodes` lists them.")
    return _views(session, [found])[0]


def remove(sessions: Sessions, redis: Redis, actor: Actor, node_id: uuid.UUID) -> None:
    """Shut a node out: its logins end and its connections with them. Its attempts are found lost as after a crash.

    Raises:
        NotFound: there is no such node, or not any more.
        Conflict: it runs with the deployment's shared login, which cannot be taken from it alone.
    """
    with transaction(sessions) as session:
        asked = {"id": node_id, "silent": SILENT_AFTER_S}
        answer = session.scalar(text("SELECT remove_node(:id, :silent)"), asked)
        if answer == "removed":
            node = session.get_one(Node, node_id)
            before = {"id": ids.encode(ids.NODE, node_id), "labels": node.labels}
            audit.record(session, actor, "node.remove", node.name, before=before)
    if answer == "absent":
        raise NotFound("No such node.", param="node", fix="`tunery nodes` lists them.")
    if answer == "alive":
        raise Conflict(
            "This node is up, with the login that nodes of this deployment share: that cannot be taken from one.",
            param="node",
            fix="Stop its process first (`tunery down` on its machine, or SIGTERM), then remove it.",
        )
    with transaction(sessions) as session:
        session.execute(text("SELECT cut_off_node(:id)"), {"id": node_id})
    try:
        redis_acl.remove(redis, node_id)
    except RedisError as error:
        log.warning("redis did not end the node's user; the scheduler will", node=str(node_id), error=str(error)[:200])


def redis_users(session: Session) -> tuple[dict[uuid.UUID, str], list[uuid.UUID]]:
    """Which nodes should have a user in Redis, with the hash of its password, and which no longer."""
    rows = session.execute(
        select(NodeCredentials.node_id, NodeCredentials.redis_sha256, NodeCredentials.revoked_at).where(
            NodeCredentials.redis_sha256.is_not(None)
        )
    ).all()
    return (
        {row.node_id: row.redis_sha256 for row in rows if row.revoked_at is None},
        [row.node_id for row in rows if row.revoked_at is not None],
    )


# ---- helpers ------------------------------------------------------------------------------------------------


def _views(session: Session, nodes: Sequence[Node]) -> list[NodeView]:
    wanted = [node.id for node in nodes]
    joined = set(session.scalars(select(NodeCredentials.node_id).where(NodeCredentials.node_id.in_(wanted))))
    heard = Node.last_seen_at > func.now() - timedelta(seconds=SILENT_AFTER_S)
    loud = set(session.scalars(select(Node.id).where(Node.id.in_(wanted), heard)))
    devices: dict[uuid.UUID, list[Gpu]] = {node_id: [] for node_id in wanted}
    for gpu in session.scalars(select(Gpu).where(Gpu.node_id.in_(wanted)).order_by(Gpu.index)):
        devices[gpu.node_id].append(gpu)
    load = {row.node_id: row for row in session.execute(text("SELECT * FROM node_load()"))}
    return [
        NodeView(
            node,
            joined=node.id in joined,
            silent=node.state != "down" and node.id not in loud,
            devices=devices[node.id],
            attempts=load[node.id].attempts if node.id in load else 0,
            tasks=load[node.id].tasks if node.id in load else 0,
        )
        for node in nodes
    ]


def _digest(token: str, pepper: str) -> bytes:
    return hmac.new(pepper.encode(), token.encode(errors="replace"), hashlib.sha256).digest()


def _verifier(session: Session, login: str, password: str) -> str:
    driver: Any = session.connection().connection.driver_connection
    assert isinstance(driver, psycopg.Connection)
    return driver.pgconn.encrypt_password(password.encode(), login.encode(), b"scram-sha-256").decode()


def _keeps_users(redis: Redis) -> bool:
    try:
        return redis_acl.is_kept(redis)
    except RedisError:
        return True  # it is away; the scheduler makes the user when it is back


def _with_login(url: str, user: str, password: str) -> str:
    parts = urlsplit(url)
    place = parts.netloc.rpartition("@")[2]
    scheme = "postgresql" if parts.scheme.startswith("postgres") else parts.scheme
    return urlunsplit((scheme, f"{quote(user)}:{quote(password)}@{place}", parts.path, parts.query, ""))


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host in ("", "localhost") or host.endswith(".localhost")


def _unprepared(message: str, fix: str) -> Conflict:
    return Conflict(message, fix=fix, code="join_not_prepared")
