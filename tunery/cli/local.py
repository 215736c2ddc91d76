"""`tunery up` and its like: each becomes `python -m tunery.embedded`, so the client needs no server's library."""

import os
import sys
from pathlib import Path
from typing import Annotated, NoReturn
from urllib.parse import urlsplit

import typer

from tunery.cli import terminal

JsonFlag = Annotated[bool, typer.Option("--json", help="Print a JSON document.")]
PortOption = Annotated[
    int | None, typer.Option(metavar="PORT", help="Port of the API; else 8400 or that of last time.")
]
EnvFile = Annotated[Path, typer.Option(metavar="FILE", help="Passwords and URLs, readable by you alone.")]

db = typer.Typer(help="A database server of your own.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add the commands to the root."""
    for command in (up, down, status, doctor, logs, backup, restore):
        app.command(command.__name__)(command)
    app.add_typer(db, name="db")


def up(
    detach: Annotated[
        bool, typer.Option("-d", "--detach", help="Return once it answers; else Ctrl-C stops it.")
    ] = False,
    port: PortOption = None,
    data: Annotated[Path | None, typer.Option(metavar="DIR", help="State folder; else TUNERY_HOME.")] = None,
) -> None:
    """Start a server on this machine: Postgres, Valkey, S3, api, scheduler and one node.

    TUNERY_DATABASE_URL, TUNERY_REDIS_URL and TUNERY_S3_ENDPOINT_URL replace what would be started.
    """
    if data is not None:
        os.environ["TUNERY_HOME"] = str(data.absolute())
    hand_over("tunery.embedded", "up", *_flag("--detach", detach), *_port(port))


def down(
    purge: Annotated[bool, typer.Option("--purge", help="Delete its data as well.")] = False,
    yes: Annotated[bool, typer.Option("-y", "--yes", help="Do not ask.")] = False,
) -> None:
    """Stop the server on this machine, in order. Running attempts are left to their supervisors."""
    hand_over("tunery.embedded", "down", *_flag("--purge", purge), *_flag("--yes", yes))


def status(
    as_json: JsonFlag = False,
    env: Annotated[bool, typer.Option("--env", help="Print export lines with the key, for eval.")] = False,
) -> None:
    """Show what runs on this machine. Exit code 9 when nothing does."""
    hand_over("tunery.embedded", "status", *_flag("--json", as_json), *_flag("--env", env))


def doctor(as_json: JsonFlag = False, port: PortOption = None) -> None:
    """Check this machine: platform, servers, disk, ports, GPU, isolation of trainers."""
    hand_over("tunery.embedded", "doctor", *_flag("--json", as_json), *_port(port))


def logs(
    service: Annotated[
        list[str] | None, typer.Argument(metavar="SERVICE", help="api, scheduler, node, postgres, valkey, s3 or up.")
    ] = None,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on as lines come.")] = False,
    lines: Annotated[int, typer.Option("-n", "--lines", help="So many of the last lines.")] = 50,
    as_json: Annotated[bool, typer.Option("--json", help="The lines as they were written.")] = False,
) -> None:
    """Show logs of the server on this machine, in words; --json for programs."""
    hand_over(
        "tunery.embedded",
        "logs",
        *(service or []),
        *_flag("--follow", follow),
        *_flag("--json", as_json),
        "--lines",
        str(lines),
    )


def backup(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where to; one that holds a backup is brought up.")],
    include_secrets: Annotated[
        bool, typer.Option("--include-secrets", help="Keep the pepper and the admin key in it, so that keys go on.")
    ] = False,
) -> None:
    """Copy the database and every object that it refers to into a folder, while everything runs.

    TUNERY_BACKUP_DATABASE_URL and TUNERY_S3_* name a deployment elsewhere.
    """
    hand_over("tunery.backup", "backup", *_flag("--include-secrets", include_secrets), "--", str(folder))


def restore(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="What `tunery backup` made.")],
    env_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Into servers of your own, as `tunery db init` prepares them."),
    ] = None,
) -> None:
    """Restore a backup into an empty deployment. Jobs that ran go on from their newest checkpoint."""
    own = ["--env-file", str(env_file)] if env_file else []
    hand_over("tunery.backup", "restore", *own, "--", str(folder))


@db.command("init")
def db_init(
    admin_url: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="postgresql://admin@host/database, a role that may create roles; else TUNERY_ADMIN_DATABASE_URL. "
            "Its password: in that variable, PGPASSWORD, ~/.pgpass, or asked for.",
        ),
    ] = None,
    env_file: EnvFile = Path("tunery.env"),
) -> None:
    """Make Tunery's roles, schema and admin key on a PostgreSQL 15 or later of your own. May be repeated."""
    if admin_url:
        if urlsplit(admin_url).password:
            terminal.say("warning: the password in --admin-url is in the process list and your shell's history;")
            terminal.say("         leave it out, and it is asked for or taken from PGPASSWORD")
        os.environ["TUNERY_ADMIN_DATABASE_URL"] = admin_url
    hand_over("tunery.db_commands", "init", "--env-file", str(env_file))


@db.command("upgrade")
def db_upgrade(env_file: EnvFile = Path("tunery.env")) -> None:
    """Bring that database to this release's schema; older programs go on meanwhile."""
    hand_over("tunery.db_commands", "upgrade", "--env-file", str(env_file))


@db.command("status")
def db_status(env_file: EnvFile = Path("tunery.env")) -> None:
    """Show that server's version and the schema it is at."""
    hand_over("tunery.db_commands", "status", "--env-file", str(env_file))


def hand_over(module: str, *arguments: str) -> NoReturn:
    """Become that program: signals, terminal and exit code are then its own."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, "-P", "-m", module, *arguments])  # noqa: S606


def _flag(name: str, wanted: bool) -> list[str]:
    return [name] if wanted else []


def _port(port: int | None) -> list[str]:
    return [] if port is None else ["--port", str(port)]
