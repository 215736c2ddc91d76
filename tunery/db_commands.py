"""`python -m tunery.db_commands init|upgrade|status`: the program behind `tunery db`, for a server of your own."""

import argparse
import getpass
import os
import secrets
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import quote, urlsplit, urlunsplit

from tunery import bootstrap
from tunery.bootstrap import LOGIN_ROLES, NoEntry, Unsuitable
from tunery.embedded.home import write_private

ADMIN_URL = "TUNERY_ADMIN_DATABASE_URL"
_NEXT = """
Next, on one machine, all by one command:
  set -a; . {file}; set +a; tunery up -d
or each program by itself, with the role that is its own ({file} has the URLs; docs/deploy.md the whole list):
  api         TUNERY_DATABASE_URL=$TUNERY_API_DATABASE_URL        python -m api
  scheduler   TUNERY_DATABASE_URL=$TUNERY_SCHEDULER_DATABASE_URL  python -m scheduler
  node        TUNERY_DATABASE_URL=$TUNERY_WORKER_DATABASE_URL     python -m worker
"""


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        options.command(options.env_file)
    except Unsuitable as error:
        sys.stderr.write(f"error: {options.failed}\nwhy:   {error}\nfix:   {error.fix}\ndocs:  docs/deploy.md\n")
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def init(file: Path) -> None:
    """Roles, schema and admin key. What is there already is kept, passwords of the file included."""
    admin_url = os.environ.get(ADMIN_URL) or ""
    if urlsplit(admin_url).scheme not in ("postgresql", "postgres"):
        raise Unsuitable("there is no admin URL", f"--admin-url postgresql://admin@host/database, or {ADMIN_URL}")
    admin_url = _with_password(admin_url)
    known, passwords = keep_secrets(file)
    pepper, values = known["TUNERY_KEY_PEPPER"], dict[str, str]()
    database = bootstrap.create_roles(admin_url, passwords)
    urls = {role: bootstrap.url_for(admin_url, role, passwords[role], database) for role in LOGIN_ROLES}
    bootstrap.migrate(urls["tunery_migrate"])
    values |= {f"{role.upper()}_DATABASE_URL": url for role, url in urls.items()}
    values["TUNERY_DATABASE_URL"] = _without_login(urls["tunery_migrate"])
    if key := bootstrap.first_run(urls["tunery_migrate"], pepper, known.get("TUNERY_API_KEY")):
        values["TUNERY_API_KEY"] = key
    _write_env(file, known | values)
    _say(f"database '{database}' is ready: {_state(urls['tunery_migrate'])}")
    _say(f"passwords, URLs and the admin key are in {file} (readable by you alone)")
    _say(_NEXT.format(file=file if file.is_absolute() else f"./{file}"))


def keep_secrets(file: Path, **given: str) -> tuple[dict[str, str], dict[str, str]]:
    """The file's values, and the password of each role. What was missing is made, and written before it is used: a
    password must not be lost once a role has it. `given` stands over what the file has."""
    known = read_env(file) | given
    passwords = {role: known.get(f"{role.upper()}_PASSWORD") or secrets.token_urlsafe(32) for role in LOGIN_ROLES}
    known |= {f"{role.upper()}_PASSWORD": password for role, password in passwords.items()}
    pepper = os.environ.get("TUNERY_KEY_PEPPER") or known.get("TUNERY_KEY_PEPPER") or secrets.token_urlsafe(32)
    _write_env(file, known := known | {"TUNERY_KEY_PEPPER": pepper})
    return known, passwords


def upgrade(file: Path) -> None:
    """Bring an existing database to this release's schema."""
    url = _migrator(file)
    before = bootstrap.schema_version(url)
    bootstrap.migrate(url)
    after = bootstrap.schema_version(url)
    _say(f"the schema is at {after}" if before == after else f"the schema went from {before} to {after}")


def status(file: Path) -> None:
    url = _migrator(file)
    sys.stdout.write(f"{_state(url)}\n")


def _state(url: str) -> str:
    with bootstrap.connect(url) as connection:
        place = f"{connection.info.host}:{connection.info.port}/{connection.info.dbname}"
        version = bootstrap.server_version(connection)
    found, newest = bootstrap.schema_version(url), bootstrap.newest_version()
    schema = "the newest" if found == newest else f"this release has {newest}: tunery db upgrade"
    return f"PostgreSQL {version} at {place}, schema {found or 'none'} ({schema})"


def _migrator(file: Path) -> str:
    name = "TUNERY_MIGRATE_DATABASE_URL"
    if url := os.environ.get(name) or read_env(file).get(name):
        return url
    raise Unsuitable(f"neither {file} nor the environment has {name}", "--env-file FILE of `tunery db init`")


def _with_password(url: str) -> str:
    """Asked for at the terminal where the server wants one and none came by URL, environment or ~/.pgpass."""
    try:
        bootstrap.connect(url).close()
    except NoEntry:
        parts = urlsplit(url)
        if parts.password or not sys.stdin.isatty():
            raise
        user, place = parts.username or getpass.getuser(), parts.netloc.rpartition("@")[2]
        login = f"{quote(user, safe='')}:{quote(getpass.getpass(f'Password of {user}: '), safe='')}"
        return urlunsplit(parts._replace(netloc=f"{login}@{place}"))
    return url


def _without_login(url: str) -> str:
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def read_env(path: Path) -> dict[str, str]:
    if not path.exists():
        return {}
    pairs = (line.partition("=") for line in path.read_text().splitlines() if "=" in line and line[0] != "#")
    return {name.strip(): value.strip().strip("'") for name, _, value in pairs}


def _write_env(path: Path, values: Mapping[str, str]) -> None:
    """Readable by a shell and by systemd; single quotes keep the `&` of a URL's query from either."""
    write_private(path, "".join(f"{name}='{value}'\n" for name, value in values.items()))


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tunery.db_commands", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command, failed in (
        (init, "the database could not be prepared"),
        (upgrade, "the schema could not be upgraded"),
        (status, "the database could not be looked at"),
    ):
        one = commands.add_parser(command.__name__, help=command.__doc__)
        one.add_argument("--env-file", type=Path, default=Path("tunery.env"), help="kept 0600")
        one.set_defaults(command=command, failed=failed)
    return parser


if __name__ == "__main__":
    sys.exit(main())
