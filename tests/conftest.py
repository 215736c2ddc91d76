"""Fixtures on real servers: a database a module, made from a migrated template; each test has projects of its own.

Every connection logs in as the role of the program it stands for, so row-level security is part of each test.
"""

import contextlib
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
import structlog
import uvicorn
from fastapi import FastAPI
from pydantic import SecretStr
from sqlalchemy import NullPool, create_engine, event
from sqlalchemy.engine import Engine

from api.main import create_app
from tests import factories
from tests import servers as embedded
from tests.factories import Database, FleetNode, Tenant
from tests.tiny_model import write_tiny_base
from tunery import bootstrap
from tunery.db import Sessions, driver_url, make_engine
from tunery.embedded.servers import Servers
from tunery.settings import ApiSettings
from tunery.storage import Storage

# the default renders tracebacks with every local variable in colours: seconds for each error that a test provokes
structlog.configure(
    processors=[
        structlog.contextvars.merge_contextvars,
        structlog.dev.ConsoleRenderer(colors=False, exception_formatter=structlog.dev.plain_traceback),
    ],
    logger_factory=structlog.stdlib.LoggerFactory(),
)

PEPPER = "a pepper for tests"
TEMPLATE = "tunery_template"
MAX_FILE_BYTES = 2 * 1024 * 1024


@pytest.fixture(scope="session")
def servers() -> Servers:
    """Postgres, Valkey and S3 of this session."""
    return embedded.servers()


@pytest.fixture(scope="session")
def template(servers: Servers) -> str:
    """A migrated database that nobody connects to."""
    bootstrap.create_roles(servers.admin_url, embedded.passwords(), TEMPLATE)
    bootstrap.migrate(embedded.database_url("tunery_migrate", TEMPLATE))
    return TEMPLATE


@pytest.fixture(scope="module")
def database(servers: Servers, template: str) -> Iterator[Database]:
    """A database of this module's own; `.sessions(role)` logs in as `tunery_api`, ... or becomes the `owner`."""
    name = f"t_{uuid.uuid4().hex[:12]}"
    with psycopg.connect(servers.admin_url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
    made = Database(name, lambda role: embedded.database_url(role, name), _engine)
    yield made
    made.close()
    with psycopg.connect(servers.admin_url, autocommit=True) as connection:
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


def _engine(url: str, owner: bool) -> Engine:
    if not owner:
        return make_engine(url, pool_size=10)
    engine = create_engine(driver_url(url), poolclass=NullPool)

    @event.listens_for(engine, "connect")
    def _become_owner(connection: Any, _record: Any) -> None:
        connection.execute("SET ROLE tunery_owner")
        connection.commit()

    return engine


@pytest.fixture(scope="module")
def sessions_for(database: Database) -> Callable[..., Sessions]:
    return database.sessions


@pytest.fixture(scope="session")
def storage(servers: Servers) -> Storage:
    """As the api sees the object store."""
    return Storage(settings_of(servers, "postgresql://unused"))


def settings_of(servers: Servers, database_url: str, **changes: Any) -> ApiSettings:
    s3 = servers.s3_root
    given: dict[str, Any] = {
        "database_url": SecretStr(database_url),
        "redis_url": SecretStr(servers.redis_url),
        "key_pepper": SecretStr(PEPPER),
        "s3_endpoint_url": s3.endpoint_url,
        "s3_bucket": s3.bucket,
        "s3_access_key_id": SecretStr(s3.access_key_id),
        "s3_secret_access_key": SecretStr(s3.secret_access_key),
        "max_file_bytes": MAX_FILE_BYTES,
        "max_live_jobs": 50,
    }
    return ApiSettings(**(given | changes))


@pytest.fixture(scope="module")
def settings(servers: Servers, database: Database) -> ApiSettings:
    return settings_of(servers, database.url("tunery_api"))


@pytest.fixture(scope="module")
def app(database: Database, storage: Storage, settings: ApiSettings) -> FastAPI:
    return create_app(database.sessions("tunery_api"), storage, settings)


@contextlib.contextmanager
def serving(app: FastAPI) -> Iterator[str]:
    """The app on loopback, as `python -m api` serves it; its URL."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, access_log=False, server_header=False))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        thread.join(0.01)
        assert thread.is_alive(), "the server did not start"
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(5)


@pytest.fixture(scope="module")
def api_url(app: FastAPI) -> Iterator[str]:
    with serving(app) as url:
        yield url


@pytest.fixture
def tenants(database: Database) -> Callable[..., Tenant]:
    """Makes an organization with one project and one key; `scopes` says what the key may."""

    def make(*scopes: str) -> Tenant:
        return factories.tenant(database, PEPPER, list(scopes) or ["admin"])

    return make


@pytest.fixture
def project(tenants: Callable[..., Tenant]) -> Tenant:
    return tenants()


@pytest.fixture
def other_project(tenants: Callable[..., Tenant]) -> Tenant:
    return tenants()


@pytest.fixture
def connect(api_url: str) -> Iterator[Callable[[Tenant | None], httpx.Client]]:
    """A client with a project's key, or with none."""
    with contextlib.ExitStack() as stack:

        def client_of(tenant: Tenant | None) -> httpx.Client:
            headers = {"authorization": f"Bearer {tenant.key}"} if tenant else {}
            return stack.enter_context(httpx.Client(base_url=api_url, headers=headers, timeout=20, trust_env=False))

        yield client_of


@pytest.fixture
def client(connect: Callable[[Tenant | None], httpx.Client], project: Tenant) -> httpx.Client:
    """HTTP with the key of `project`."""
    return connect(project)


@pytest.fixture(scope="module")
def base_model(database: Database) -> str:
    """Name of a base model that is ready."""
    return factories.base_model(database)


@pytest.fixture
def node(database: Database) -> FleetNode:
    """A node with one GPU and one slot."""
    return factories.node(database)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny random base model; the trainer's tests only read it."""
    folder = tmp_path_factory.mktemp("base")
    write_tiny_base(folder)
    return folder
