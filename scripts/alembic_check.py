"""Whether the models and the migrations say the same, on a throw-away Postgres; and whether there is one head."""

import logging
import secrets
import sys
import tempfile
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from alembic.util import CommandError

from tunery import bootstrap
from tunery.embedded.home import Home
from tunery.embedded.identity import run_as
from tunery.embedded.servers import External, Servers

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    config = Config(toml_file=str(ROOT / "pyproject.toml"))
    heads = ScriptDirectory.from_config(config).get_heads()
    if len(heads) != 1:
        sys.stderr.write(
            f"alembic: {len(heads)} heads: {', '.join(heads)}\nfix: give the later one the other's revision\n"
        )
        return 1
    home = Home(Path(tempfile.mkdtemp(prefix="tunery-check-")), run_as(None))
    home.create()
    # Only Postgres is needed; URLs nobody will call keep the other two from starting.
    external = External(redis_url="redis://127.0.0.1:1/0", s3_endpoint_url="http://127.0.0.1:1")
    servers = Servers(home, external, ("fsync=off",))
    try:
        servers.start()
        return _compare(config, servers.admin_url)
    finally:
        servers.stop()
        home.purge()


def _compare(config: Config, admin_url: str) -> int:
    passwords = {role: secrets.token_urlsafe(16) for role in bootstrap.LOGIN_ROLES}
    database = bootstrap.create_roles(admin_url, passwords)
    url = bootstrap.url_for(admin_url, "tunery_migrate", passwords["tunery_migrate"], database)
    bootstrap.migrate(url)
    config.attributes["url"] = url
    try:
        command.check(config)
    except CommandError as difference:
        sys.stderr.write(f"alembic: {difference}\nfix: alembic revision --autogenerate -m '...'\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
