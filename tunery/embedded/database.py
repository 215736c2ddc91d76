"""Roles, schema and first key of the deployment's database, with a short way when nothing has changed."""

import contextlib
import hashlib
from urllib.parse import urlsplit

import psycopg

from tunery import bootstrap
from tunery.embedded.home import CHECKOUT, Home
from tunery.embedded.problems import Refused
from tunery.embedded.servers import Servers


def prepare(home: Home, servers: Servers) -> dict[str, str]:
    """The URL of each login role, on a database that is at the newest schema and has its first key."""
    secrets = home.secrets()
    if servers.postgres is None:
        for name, value in servers.external.database_secrets.items():
            secrets.put(name, value)
    passwords = {role: secrets.made(f"role_{role}") for role in bootstrap.LOGIN_ROLES}
    admin_url = servers.admin_url
    database = bootstrap.database_of(admin_url)
    urls = {role: bootstrap.url_for(admin_url, role, passwords[role], database) for role in bootstrap.LOGIN_ROLES}
    if _is_current(home, servers, urls["tunery_migrate"]):
        return urls
    if servers.postgres or not all(map(_opens, urls.values())):
        # On a server of the user's the URL has to be an admin's only until our roles can log in.
        try:
            bootstrap.create_roles(admin_url, passwords, database)
        except bootstrap.Unsuitable as error:
            raise Refused(
                "the database could not be prepared",
                why=str(error),
                fix=f"{error.fix}; TUNERY_DATABASE_URL needs a role that may create roles, for the first start only, "
                "or the variables that `tunery db init` made",
                reference="docs/deploy.md",
            ) from error
    elif not bootstrap.is_prepared(urls["tunery_migrate"]):
        # An older release made these roles. Without an admin everything works but nodes that join, and that says so.
        with contextlib.suppress(bootstrap.Unsuitable):
            bootstrap.create_roles(admin_url, passwords, database)
    _migrate(urls["tunery_migrate"])
    pepper = secrets.made("key_pepper")
    if key := bootstrap.first_run(urls["tunery_migrate"], pepper, secrets.get("admin_key")):
        secrets.put("admin_key", key)
        home.update_state(key_shown=False)
    version = bootstrap.schema_version(urls["tunery_migrate"])
    home.update_state(migrated=_marker(servers) | {"version": version})
    return urls


def _migrate(url: str) -> None:
    try:
        bootstrap.migrate(url)
    except bootstrap.Unsuitable as error:
        raise Refused("the schema could not be upgraded", why=str(error), fix=error.fix) from error


def _is_current(home: Home, servers: Servers, url: str) -> bool:
    """Alembic takes half a second to say so; the hash of its files and the database's own word take milliseconds."""
    if home.secrets().get("admin_key") is None:
        return False
    version = bootstrap.schema_version(url)
    return version is not None and home.state().get("migrated") == _marker(servers) | {"version": version}


def _marker(servers: Servers) -> dict[str, str]:
    digest = hashlib.sha256()
    for file in sorted((CHECKOUT / "migrations/versions").glob("*.py")):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    place = urlsplit(servers.external.database_url or "")
    server = f"{place.hostname}:{place.port}{place.path}" if servers.postgres is None else "embedded"
    return {"server": server, "migrations": digest.hexdigest()[:16], "roles": ",".join(bootstrap.LOGIN_ROLES)}


def _opens(url: str) -> bool:
    try:
        psycopg.connect(url, connect_timeout=5).close()
    except psycopg.OperationalError:
        return False
    return True
