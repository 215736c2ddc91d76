"""Run by tests/test_upgrade.py with the *last release's* code: makes its schema and fills it with its own services.

    PYTHONPATH=<old tree> python -P tests/upgrade_fill.py <new tree> < {"admin_url", "passwords", "database", "pepper"}

Prints one JSON object: the keys of two projects and the jobs of each by state.
"""

import json
import sys
from pathlib import Path
from typing import Any

from sqlalchemy import NullPool, create_engine, event, text
from sqlalchemy.engine import Engine

import tunery
from tests import factories
from tunery import bootstrap, queue
from tunery.db import driver_url, transaction
from tunery.states import JobState

NEW_TREE = Path(sys.argv[1])


def engine(url: str, owner: bool) -> Engine:
    made = create_engine(driver_url(url), poolclass=NullPool)
    if owner:

        @event.listens_for(made, "connect")
        def _own(connection: Any, _record: Any) -> None:
            connection.execute("SET ROLE tunery_owner")
            connection.commit()

    return made


def jobs_of(tenant: factories.Tenant, database: factories.Database) -> dict[str, str]:
    """A job in each state, with what belongs to it."""
    made = {}
    for state in JobState:
        make = factories.IN_STATE.get(state, factories.running)
        if state is JobState.SUCCEEDED:
            work = factories.running(tenant, factories.node(database), suffix="kept")
            factories.tell(work, *(factories.metrics(seq, seq - 1) for seq in range(2, 12)))
            factories.checkpoint(work, 10, train_loss=1.0)
            factories.publish(work)
        else:
            work = make(tenant, factories.node(database))
        if state not in factories.IN_STATE:  # no service of that release moves a job there
            with factories.owner(database) as session, session.begin():
                session.execute(text("UPDATE jobs SET state = :to WHERE id = :id"), {"to": state, "id": work.job_id})
        made[state.value] = work.id
    return made


def main() -> None:
    assert not Path(tunery.__file__).is_relative_to(NEW_TREE), "this must run with the old code"
    assert not Path(factories.__file__).is_relative_to(NEW_TREE)
    given = json.load(sys.stdin)
    admin, passwords, name = given["admin_url"], given["passwords"], given["database"]
    bootstrap.create_roles(admin, passwords, name)

    def url(role: str) -> str:
        return bootstrap.url_for(admin, role, passwords[role], name)

    bootstrap.migrate(url("tunery_migrate"))
    database = factories.Database(name, url, engine)
    factories.base_model(database)
    with transaction(database.sessions("tunery_scheduler")) as session:
        queue.lead(session, "the last release", 0)
    tenants = [factories.tenant(database, given["pepper"]) for _ in range(2)]
    filled = [{"key": tenant.key, "jobs": jobs_of(tenant, database)} for tenant in tenants]
    json.dump(filled, sys.stdout)


if __name__ == "__main__":
    main()
