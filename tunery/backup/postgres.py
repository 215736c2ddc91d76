"""pg_dump and pg_restore: which ones, and how they are called. Passwords travel in their environment alone."""

import os
import shutil
import subprocess
from pathlib import Path
from urllib.parse import unquote, urlsplit

import psycopg

from tunery.bootstrap import OWNER, url_for
from tunery.embedded import binaries
from tunery.embedded.problems import Refused

_BOOTSTRAPPED = ("node_login(", "create_node_login(", "close_node_login(", "drop_node_login(")
"""Functions that `create_roles` makes, for an owner of their own."""


def server_major(url: str) -> int:
    with psycopg.connect(url, connect_timeout=10) as connection:
        return connection.info.server_version // 10000


def dump(url: str, snapshot: str, path: Path, major: int) -> None:
    """The whole schema as that snapshot sees it. As a role without power, so row-level security stays on: a policy lets
    `tunery_backup` read everything."""
    arguments = ["--format=custom", "--schema=public", "--enable-row-security", f"--snapshot={snapshot}"]
    _run("pg_dump", major, url, [*arguments, f"--file={path}"])


def load(url: str, path: Path, major: int) -> None:
    """All of a dump or nothing of it, into a database without tables; everything belongs to the owner then."""
    listing = path.with_suffix(".list")
    listing.write_text(_contents(path, major))
    arguments = ["--no-owner", f"--role={OWNER}", "--single-transaction", "--exit-on-error", f"--use-list={listing}"]
    try:
        _run("pg_restore", major, url, [*arguments, str(path)])
    finally:
        listing.unlink()


def _contents(path: Path, major: int) -> str:
    """What is to be restored: all but what the roles' creation has made already."""
    program = _program("pg_restore", major, loopback=True)
    listed = subprocess.run([program, "--list", path], capture_output=True, text=True, check=True).stdout
    return "\n".join(line for line in listed.splitlines() if not _made_already(line))


def _made_already(line: str) -> bool:
    words = line.split()[3:]  # dump id, two oids, then type, schema, name, owner
    if words[:1] == ["SCHEMA"] or words[:3] in (["ACL", "-", "SCHEMA"], ["COMMENT", "-", "SCHEMA"]):
        return True
    return any(word.startswith(_BOOTSTRAPPED) for word in words)


def _run(name: str, major: int, url: str, arguments: list[str]) -> None:
    parts = urlsplit(url)
    program = _program(name, major, loopback=parts.hostname in ("127.0.0.1", "localhost", "::1"))
    environment = {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"}
    environment["PGPASSWORD"] = unquote(parts.password or "")
    place = url_for(url, unquote(parts.username or ""), "").replace(":@", "@", 1)
    done = subprocess.run(
        [program, "--no-password", f"--dbname={place}", *arguments], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise Refused(f"{name} failed", why=done.stderr.strip()[-2000:], fix="mend what it says and run this again")


def _program(name: str, major: int, *, loopback: bool) -> Path:
    """Not older than the server. The wheel's own speak no TLS, so for a server elsewhere the host's come first."""
    found = binaries.find_postgres()
    wheel = [found.path.with_name(name)] if found is not None else []
    on_path = [Path(path)] if (path := shutil.which(name)) else []
    packaged = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), reverse=True)
    for candidate in (*wheel, *on_path, *packaged) if loopback else (*on_path, *packaged, *wheel):
        if candidate.exists() and int(binaries.postgres_major(candidate)) >= major:
            return candidate
    raise Refused(
        f"no {name} for PostgreSQL {major} was found",
        why="An older one cannot read a newer server.",
        fix=f"install the client programs of PostgreSQL {major}, or pip install 'tunery[embedded]'",
    )
