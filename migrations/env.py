"""Alembic's entry: migrations run as `tunery_owner`, under one advisory lock, one transaction each."""

import os

from alembic import context
from sqlalchemy import NullPool, create_engine, text

import tunery.models  # noqa: F401 - fills the metadata
from tunery.db import Base, driver_url

OWNER = "tunery_owner"
LOCK = 7_206_543  # one migration at a time, whoever starts it


def run() -> None:
    url = context.config.attributes.get("url") or os.environ["TUNERY_DATABASE_URL"]
    engine = create_engine(driver_url(url), poolclass=NullPool)
    with engine.connect() as connection:
        connection.execute(text(f"SET ROLE {OWNER}"))
        connection.execute(text("SET lock_timeout = '10min'"))  # another migration may have much to do
        connection.execute(text(f"SELECT pg_advisory_lock({LOCK})"))
        # whoever waits for an exclusive lock makes everybody behind it wait too: let go, and let the caller try again
        connection.execute(text("SET lock_timeout = '1s'"))
        connection.commit()
        context.configure(
            connection=connection,
            target_metadata=Base.metadata,
            transaction_per_migration=True,
            compare_type=True,
            compare_server_default=False,
        )
        with context.begin_transaction():
            context.run_migrations()


run()
