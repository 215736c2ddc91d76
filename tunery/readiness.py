"""The questions that readiness asks: Postgres and its schema, Redis, the object store. Each gives up quickly."""

import re
from functools import cache
from pathlib import Path

from pydantic import SecretStr
from sqlalchemy import text

from tunery.db import make_engine
from tunery.dispatch import connect
from tunery.settings import DatabaseSettings, StorageSettings
from tunery.storage import Storage
from tunery.telemetry.health import NotReady, Part

_MIGRATIONS = Path(__file__).resolve().parents[1] / "migrations"


def database(settings: DatabaseSettings) -> Part:
    """Postgres answers, and has the tables that this code needs. A connection of its own: a full pool is no outage."""
    engine = make_engine(settings.database_url.get_secret_value(), pool_size=1, statement_timeout_s=1)

    def ask() -> None:
        with engine.connect() as connection:
            allowed = "SELECT has_table_privilege('alembic_version', 'SELECT')"
            found = None
            if connection.scalar(text(allowed)):  # the migration that grants it is newer than the first schema
                found = connection.scalar(text("SELECT version_num FROM alembic_version"))
        _compare(found, known_revisions())

    return Part("database", ask)


def redis(url: SecretStr) -> Part:
    """Not required: jobs are taken and run without it, only found a few seconds later."""
    client = connect(url.get_secret_value(), timeout_s=1)

    def ask() -> None:
        client.ping()

    return Part("redis", ask, required=False)


def storage(settings: StorageSettings, prefix: str | None = None) -> Part:
    """`prefix`: what this identity may list, where it may not see the bucket as a whole."""

    @cache
    def impatient() -> Storage:
        return Storage(settings, patient=False)  # at the first question: a second client costs a start 100 ms

    def ask() -> None:
        impatient().ping(prefix)

    return Part("storage", ask)


@cache
def known_revisions() -> tuple[str, ...]:
    """Of the migrations beside this code, newest first; none where they were not shipped."""
    texts = [path.read_text() for path in (_MIGRATIONS / "versions").glob("*.py")]
    # read, not imported: Alembic and what it brings are 20 MiB that no program needs while it runs
    after = {_named("down_revision", text): _named("revision", text) for text in texts}
    chain, newest = [], after.get(None)
    while newest is not None:
        chain.insert(0, newest)
        newest = after.get(newest)
    return tuple(chain)


def _named(name: str, text: str) -> str | None:
    found = re.search(rf'^{name}\b.*= "([^"]+)"', text, re.MULTILINE)
    return found[1] if found else None


def _compare(found: str | None, known: tuple[str, ...]) -> None:
    """Migrations only add, so a schema that this code does not know is a newer one, and good enough."""
    if known and (found is None or found in known[1:]):
        raise NotReady(f"the schema is at {found or 'an older version'}, {known[0]} is needed: run the migrations")
