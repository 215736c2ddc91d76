"""Sessions, transactions and the tenant that each transaction is bound to."""

import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain, repeat
from typing import Any

import structlog
from sqlalchemy import Connection, MetaData, create_engine, event, text
from sqlalchemy.engine import URL, Engine, make_url
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import DeclarativeBase, Session, SessionTransaction, sessionmaker

log = structlog.get_logger(__name__)

Sessions = sessionmaker[Session]

NAMING = {
    "ix": "ix_%(column_0_N_label)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s",
    "pk": "pk_%(table_name)s",
}


class Base(DeclarativeBase):
    metadata = MetaData(naming_convention=NAMING)


_PAUSES_S = (0.2, 0.5, 1, 2, 5)
"""Between tries of a program that starts before its database."""


class PrivilegedRole(RuntimeError):
    """The database role could see every tenant's rows; no program may start with it."""


def driver_url(url: str) -> URL:
    """Accept `postgresql://...` as people write it, and use psycopg 3."""
    return make_url(url).set(drivername="postgresql+psycopg")


def make_engine(url: str, *, pool_size: int = 5, statement_timeout_s: float = 30, idle_timeout_s: float = 30) -> Engine:
    """An engine whose connections give up rather than hang: on connect, on a lock, on a statement.

    `idle_timeout_s`: a transaction whose program says nothing for so long is rolled back by the server. A frozen or
    cut-off program would otherwise keep its locks, and those who are to take over would wait for it for ever.
    """
    settings = {
        "statement_timeout": int(statement_timeout_s * 1000),
        "lock_timeout": 10_000,
        "idle_in_transaction_session_timeout": int(idle_timeout_s * 1000),
        # the server's end of the same line, for the same reason
        "tcp_keepalives_idle": 10,
        "tcp_keepalives_interval": 5,
        "tcp_keepalives_count": 3,
        "timezone": "UTC",
    }
    options = " ".join(f"-c {name}={value}" for name, value in settings.items())
    return create_engine(
        driver_url(url),
        pool_size=pool_size,
        max_overflow=pool_size,
        pool_pre_ping=True,
        pool_recycle=1800,
        hide_parameters=True,  # prompts and samples are tenants' data and do not belong into a log
        connect_args={
            "connect_timeout": 5,
            "options": options,
            # a peer that vanished is noticed in seconds, not in the two hours of TCP's default
            "keepalives_idle": 10,
            "keepalives_interval": 5,
            "keepalives_count": 3,
            "tcp_user_timeout": 20_000,
        },
    )


def make_sessions(engine: Engine, *, node_id: uuid.UUID | None = None) -> Sessions:
    """Sessions for one program; a node's are bound to that node."""
    info = {"node_id": node_id} if node_id else {}
    return sessionmaker(engine, expire_on_commit=False, info=info)


def for_project(sessions: Sessions, project_id: uuid.UUID) -> Session:
    """A session that sees one project."""
    return sessions(info={"project_id": project_id})


@event.listens_for(Session, "after_begin")
def _bind_tenant(session: Session, _transaction: SessionTransaction, connection: Connection) -> None:
    """Tell Postgres whose rows this transaction may touch; row-level security reads these settings.

    `set_config(..., true)` ends with the transaction, so a pooled connection carries nothing to its next user.
    """
    for name in ("project_id", "node_id"):
        if (value := session.info.get(name)) is not None:
            connection.execute(
                text("SELECT set_config(:name, :value, true)"), {"name": f"app.{name}", "value": str(value)}
            )


@contextmanager
def transaction(sessions: Sessions | Callable[[], Session]) -> Iterator[Session]:
    """One unit of work: commit on success, then run what waited for the commit."""
    with sessions() as session:
        with session.begin():
            yield session
        for callback in session.info.pop("after_commit", []):
            try:
                callback()
            except Exception:  # the row is durable; a sweep repeats a lost hint
                log.exception("after-commit callback failed")


def after_commit(session: Session, callback: Callable[[], Any]) -> None:
    """Run `callback` once the transaction has committed; never if it rolls back."""
    session.info.setdefault("after_commit", []).append(callback)


def await_own_role(engine: Engine) -> None:
    """Wait until the database answers, and refuse a role that row-level security would not bind.

    A program that starts before its database, or beside one that restarts, is early and not broken.

    Raises:
        PrivilegedRole: the role may not be used.
    """
    for pause_s in chain(_PAUSES_S, repeat(_PAUSES_S[-1])):
        try:
            refuse_privileged_role(engine)
            return
        except OperationalError as error:
            log.warning("waiting for the database", error=str(error.orig).strip()[:300])
        time.sleep(pause_s)


def refuse_privileged_role(engine: Engine, owner: str = "tunery_owner") -> None:
    """Stop a program whose role row-level security would not bind.

    Raises:
        PrivilegedRole: the role is a superuser, has BYPASSRLS, or owns the tables.
    """
    query = text(
        "SELECT rolname, rolsuper, rolbypassrls, pg_has_role(oid, :owner, 'MEMBER') "
        "FROM pg_roles WHERE rolname = current_user"
    )
    with engine.connect() as connection:
        name, superuser, bypass, owns = connection.execute(query, {"owner": owner}).one()
    if superuser or bypass or owns:
        raise PrivilegedRole(
            f"database role '{name}' is a superuser, has BYPASSRLS or owns the tables: it would see every project. "
            "Use the role that `tunery db init` made for this program."
        )
