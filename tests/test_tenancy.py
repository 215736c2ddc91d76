"""Keys: what opens a project, and everything that does not."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import httpx
import pytest
from sqlalchemy import func, select, update

from tests import factories
from tests.conftest import PEPPER
from tests.factories import Database, Tenant
from tunery import tenancy
from tunery.db import transaction
from tunery.errors import Forbidden, Unauthenticated
from tunery.models import ApiKey, Project
from tunery.tenancy import Identity


def enter(database: Database, key: str, pepper: str = PEPPER) -> Identity:
    """As the api does it, before any project is known."""
    with transaction(database.sessions("tunery_api")) as session:
        return tenancy.authenticate(session, key, pepper)


def new_key(tenant: Tenant, **options: object) -> str:
    with transaction(tenant.database.sessions("owner")) as session:
        return tenancy.create_key(session, tenant.project_id, "another", ["jobs:read"], PEPPER, **options)[1]  # type: ignore[arg-type]


def change_key(tenant: Tenant, **values: object) -> None:
    with transaction(tenant.database.sessions("owner")) as session:
        session.execute(update(ApiKey).where(ApiKey.id == tenant.identity.key_id).values(**values))


def test_a_key_opens_its_own_project(database: Database, project: Tenant) -> None:
    who = enter(database, project.key)
    assert (who.project_id, who.organization_id) == (project.project_id, project.identity.organization_id)
    assert who.scopes == {"admin"} and who.key_id == project.identity.key_id


def spoilt(key: str) -> dict[str, str]:
    flipped = "A" if key[20] != "A" else "B"
    return {
        "empty": "",
        "another service's": "sk-proj-abcdef",
        "cut": key[:-1],
        "longer": key + "x",
        "one letter changed": key[:25] + flipped + key[26:],
        "not ASCII": key[:-8] + "é" * 8,
        "NUL": key[:-1] + "\0",
        "only the prefix": "ftk_live_",
    }


@pytest.mark.parametrize("how", list(spoilt("x" * 60)))
def test_what_is_no_key_opens_nothing(database: Database, project: Tenant, how: str) -> None:
    with pytest.raises(Unauthenticated) as refused:
        enter(database, spoilt(project.key)[how])
    assert refused.value.message == "Incorrect API key provided."


def test_a_wrong_secret_with_a_right_checksum(database: Database, project: Tenant) -> None:
    body = project.key[:-6]
    forged = body[:-1] + ("A" if body[-1] != "A" else "B")
    with pytest.raises(Unauthenticated, match="Incorrect"):
        enter(database, forged + tenancy._checksum(forged))
    unknown = "ftk_live_" + "z" * 12 + body[21:]
    with pytest.raises(Unauthenticated, match="Incorrect"):
        enter(database, unknown + tenancy._checksum(unknown))


def test_another_servers_pepper(database: Database, project: Tenant) -> None:
    with pytest.raises(Unauthenticated, match="Incorrect"):
        enter(database, project.key, "another pepper")


def test_revoked_and_expired_keys_are_refused_at_once(database: Database, project: Tenant) -> None:
    enter(database, project.key)
    change_key(project, expires_at=datetime.now(UTC) - timedelta(seconds=1))
    with pytest.raises(Unauthenticated, match="revoked or has expired"):
        enter(database, project.key)
    change_key(project, expires_at=datetime.now(UTC) + timedelta(hours=1))
    assert enter(database, project.key).expires_at is not None
    change_key(project, revoked_at=func.now())
    with pytest.raises(Unauthenticated, match="revoked or has expired"):
        enter(database, project.key)


def test_an_archived_project_is_shut(database: Database, project: Tenant) -> None:
    with transaction(database.sessions("owner")) as session:
        session.execute(update(Project).where(Project.id == project.project_id).values(status="archived"))
    with pytest.raises(Unauthenticated):
        enter(database, project.key)


def test_two_keys_of_one_project_rotate(database: Database, project: Tenant) -> None:
    second = new_key(project)
    change_key(project, revoked_at=func.now())
    assert enter(database, second).project_id == project.project_id


def test_the_database_keeps_no_secret(database: Database, project: Tenant) -> None:
    secret = project.key.split("_")[-1][:-6]
    with factories.owner(database) as session:
        key = session.get_one(ApiKey, project.identity.key_id)
        assert key.last_used_at is None
        kept = " ".join(str(getattr(key, column.name)) for column in ApiKey.__table__.columns)
    assert secret not in kept and secret.encode() not in key.secret_hmac and len(key.secret_hmac) == 32
    enter(database, project.key)
    with factories.owner(database) as session:
        assert session.scalar(select(ApiKey.last_used_at).where(ApiKey.id == project.identity.key_id)) is not None


def test_scopes() -> None:
    def who(*scopes: str) -> Identity:
        none = factories.NONE_YET
        return Identity(none, "o", none, "p", none, "k", frozenset(scopes), None)

    who("jobs:read").require("jobs:read")
    who("admin").require("files:write")
    for scopes in ((), ("jobs:read",), ("files:read", "jobs:write")):
        with pytest.raises(Forbidden) as refused:
            who(*scopes).require("files:write")
        assert "files:write" in refused.value.message and refused.value.fix


def test_a_revoked_key_is_refused_over_http(connect: Callable[[Tenant | None], httpx.Client], project: Tenant) -> None:
    client = connect(project)
    assert client.get("/v1/whoami").status_code == 200
    change_key(project, revoked_at=func.now())
    refused = client.get("/v1/whoami")
    assert refused.status_code == 401 and refused.headers["www-authenticate"] == "Bearer"
    assert refused.json()["error"]["code"] == "invalid_api_key"
