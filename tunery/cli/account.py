"""`login`, `logout`, `whoami`."""

import sys
from typing import Annotated, Any

import typer

from tunery.cli import config
from tunery.cli.failures import Exit, Failure
from tunery.cli.options import Json
from tunery.cli.show import date, fields, size, table
from tunery.cli.terminal import done, json_out, say


def register(app: typer.Typer) -> None:
    app.command("login")(login)
    app.command("logout")(logout)
    app.command("whoami")(whoami)
    app.command("storage")(storage)


def login(
    key: Annotated[str | None, typer.Option(metavar="-", help="- reads the key from stdin; else it is asked.")] = None,
) -> None:
    """Check a key with the server and store it, readable by you alone."""
    if key not in (None, "-"):
        raise Failure(
            "a key does not belong on the command line",
            why="it would stay in your shell's history and be seen in the list of processes",
            fix="tunery login     (asks)   or   tunery login --key - < key.txt",
            code="key_in_argv",
            exit_code=Exit.USAGE,
        )
    url = _url_to_log_into()
    secret = (sys.stdin.readline() if key == "-" else _ask(url)).strip()
    if not secret:
        raise Failure(
            "no key was given",
            why="the input was empty",
            fix="Paste the key when asked, or: tunery login --key - < key.txt",
            code="no_api_key",
            exit_code=Exit.USAGE,
        )
    identity = config.connect(url, secret).whoami()
    name = config.chosen_profile()
    path = config.save_profile(name, url, secret)
    if url.startswith("http://") and not config.is_loopback(url):
        say("warning: this address is not encrypted; the key can be read on the way")
    project = identity.get("project", {}).get("name") or "-"
    done(f"signed in to {url}, project {project}; stored as profile {name} in {path}")


def logout() -> None:
    """Forget the stored key of this profile. The key itself stays valid until it is revoked."""
    name = config.chosen_profile()
    if config.forget_profile(name):
        done(f"profile {name} is forgotten; the key itself stays valid until it is revoked")
    else:
        say(f"profile {name} is not stored; there was nothing to forget")


def whoami(as_json: Json = False) -> None:
    """Show whose key is in use, and where it comes from."""
    where = config.target()
    identity = config.client().whoami()
    if as_json:
        json_out(identity)
        return
    key: Any = identity.get("key", {})
    fields(
        [
            ("organization", _named(identity.get("organization"))),
            ("project", _named(identity.get("project"))),
            ("key", _named(key)),
            ("scopes", ", ".join(key.get("scopes") or [])),
            ("expires", date(key.get("expires_at")) or "never"),
            ("server", where.api_url),
            ("from", where.origin),
        ]
    )


def storage(as_json: Json = False) -> None:
    """Show what this project keeps in the object store, and its limit."""
    found = config.client().storage_usage()
    if as_json:
        json_out(found)
        return
    kinds = ("files", "datasets", "checkpoints", "adapters", "logs")
    table(("KIND", "COUNT", "SIZE"), [(kind, found[kind]["count"], size(found[kind]["bytes"])) for kind in kinds])
    say(f"{size(found['total_bytes'])} of {size(found['limit_bytes'])} allowed; logs are not counted")


def _named(thing: Any) -> str:
    thing = thing or {}
    name, identifier = thing.get("name"), thing.get("id")
    return f"{name} ({identifier})" if name and identifier else name or identifier or "-"


def _url_to_log_into() -> str:
    """Logging in may make a profile, so an absent one is no error here."""
    profile = config.stored(config.chosen_profile())
    return config.asked_url() or (profile.api_url if profile else None) or config.local_url() or config.DEFAULT_URL


def _ask(url: str) -> str:
    if not sys.stdin.isatty():
        return sys.stdin.readline()
    import getpass

    return getpass.getpass(f"Key for {url} (not shown): ", stream=sys.stderr)
