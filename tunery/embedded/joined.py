"""A node of somebody else's deployment on this machine: `join` it, `start` its process, `stop` it.

What the deployment gave it lies in `node.env`, readable by its user alone. The process itself is `python -m worker`.
"""

import argparse
import fcntl
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn

from tunery import __version__, ids
from tunery.client import APIError, Client, TuneryError
from tunery.client.shapes import Admission
from tunery.embedded.console import Tail
from tunery.embedded.home import CHECKOUT, Home, write_private
from tunery.embedded.problems import Refused
from tunery.embedded.programs import inherited

_ENV_FILE = "node.env"
_GIVEN = re.compile(r"TUNERY_(DATABASE_URL|REDIS_URL|S3_[A-Z_]+)")
"""The only names that an answer may set: a variable such as LD_PRELOAD would be code."""
_REACH_WITHIN_S = 5.0
_START_WITHIN_S = 30.0
_STOP_WITHIN_S = 180.0
_PAGE = "docs/node.md"


def join(home: Home, options: argparse.Namespace) -> int:
    """Be admitted with a one-time token, keep the credentials, and start."""
    _refuse_occupied(home)
    name = options.name or _host_name()
    token = _token(options.token_file)
    with Client(options.url, token, max_retries=0) as api:
        # first without using the token up: whatever is wrong can still be mended
        known = _ask(api, name, dry_run=True)
        _refuse_unreachable(known.get("addresses") or {})
        admitted = _ask(api, name, dry_run=False)
    _keep(home, options.url, admitted)
    sys.stderr.write(f"joined {options.url} as {name} ({admitted.get('id')}); credentials in {_env_file(home)}\n")
    return start(home, options)


def start(home: Home, options: argparse.Namespace) -> int:
    """Start the node that joined: here until Ctrl-C, or detached."""
    if not _env_file(home).exists():
        fix = "tunery node join <api-url>     (with a token from `tunery node token` there)"
        raise Refused("this machine has not joined", why=f"{_env_file(home)} is not there.", fix=fix, reference=_PAGE)
    if (pid := _holder(home)) is not None:
        raise Refused(
            f"the node runs already (pid {pid})",
            why="One process at a time may be this node.",
            fix="tunery node stop",
            reference=_PAGE,
        )
    given = _read(_env_file(home))
    environment = inherited(CHECKOUT) | given | {"TUNERY_HOME": str(home.node)}
    argv = [sys.executable, "-P", "-m", "worker"]
    if not options.detach:
        _become(home, argv, environment)
    return _detach(home, argv, environment)


def stop(home: Home, _options: argparse.Namespace) -> int:
    """Ask the node to leave in order: its trainers checkpoint, and their jobs go back to the queue."""
    pid = _holder(home)
    if pid is None:
        sys.stderr.write(f"no node runs here (home {home.root})\n")
        return 0
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + _STOP_WITHIN_S
    while _holder(home) is not None:
        if time.monotonic() > deadline:
            raise Refused(
                f"the node (pid {pid}) does not stop",
                why=f"It has had {_STOP_WITHIN_S:.0f} s.",
                fix=f"read {home.logs / 'node.log'}; kill -9 {pid} loses nothing that was checkpointed",
                reference=_PAGE,
            )
        time.sleep(0.1)
    sys.stderr.write("the node is stopped\n")
    return 0


def add_parsers(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """`join`, `node-start` and `node-stop`; the command line's `tunery node ...` becomes them."""
    joining = commands.add_parser("join", help="become a node of a deployment elsewhere")
    joining.add_argument("url")
    joining.add_argument("--name")
    joining.add_argument("--token-file", type=Path)
    joining.set_defaults(command=join)
    starting = commands.add_parser("node-start", help="start the node that joined")
    starting.set_defaults(command=start)
    for parser in (joining, starting):
        parser.add_argument("-d", "--detach", action="store_true")
    commands.add_parser("node-stop", help="stop it in order").set_defaults(command=stop)


# ---- joining ------------------------------------------------------------------------------------------------


def _refuse_occupied(home: Home) -> None:
    if _env_file(home).exists():
        name = _read(_env_file(home)).get("TUNERY_NODE_NAME", "?")
        raise Refused(
            f"this home is node {name} already",
            why=f"{_env_file(home)} holds its credentials.",
            fix=f"tunery node start; or `tunery node remove {name}` at the server, delete that file, and join anew",
            reference=_PAGE,
        )
    if home.secrets_file.exists() or (home.node / "node_id").exists():
        raise Refused(
            "this home belongs to a deployment of its own",
            why=f"`tunery up` or a node with shared credentials has run in {home.root}.",
            fix="TUNERY_HOME=<another folder> tunery node join ...",
            reference=_PAGE,
        )


def _host_name() -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname()).strip("-._")[:63] or "node"


def _token(file: Path | None) -> str:
    """From a file, TUNERY_NODE_TOKEN, stdin or a prompt; never from the command line, which everybody can read."""
    if file is not None:
        try:
            found = file.read_text().strip()
        except OSError as error:
            raise _no_token(f"{file}: {error.strerror}.") from error
    elif not (found := os.environ.get("TUNERY_NODE_TOKEN", "").strip()):
        found = _asked().strip()
    if not found:
        raise _no_token("The input was empty.")
    if not (found.isascii() and found.isprintable() and " " not in found):
        raise _no_token("A token has no spaces, line breaks or letters beyond ASCII.")
    return found


def _asked() -> str:
    if not sys.stdin.isatty():
        return sys.stdin.readline()
    import getpass

    return getpass.getpass("Join token (not shown): ", stream=sys.stderr)


def _no_token(why: str) -> Refused:
    fix = "make one with `tunery node token` where you have an admin key; then paste it, or give --token-file FILE"
    return Refused("there is no join token", why=why, fix=fix, reference=_PAGE)


def _ask(api: Client, name: str, *, dry_run: bool) -> Admission:
    try:
        return api.join_node(name=name, version=__version__, dry_run=dry_run)
    except APIError as error:
        older = error.status == 404
        raise Refused(
            "the server did not admit this machine",
            why="It is of a release before 0.2 and knows no join tokens." if older else error.message,
            fix="Upgrade the server." if older else error.fix or "Ask the server's operator.",
            reference=error.docs or _PAGE,
        ) from error
    except TuneryError as error:
        fix = "check the URL, and that this machine reaches the api's port"
        raise Refused("the server was not reached", why=str(error), fix=fix, reference=_PAGE) from error


def _refuse_unreachable(addresses: dict[str, str]) -> None:
    silent: list[str] = []
    for what, address in addresses.items():
        host, _, port = address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=_REACH_WITHIN_S).close()
        except (OSError, ValueError) as error:
            silent.append(f"{what} at {address}: {error}")
    if silent:
        raise Refused(
            "this machine does not reach the deployment's servers",
            why="\n".join(silent),
            fix="open the way (firewall, tunnel), or set TUNERY_NODE_*_URL of the api; the token is still good",
            reference=_PAGE,
        )


def _keep(home: Home, url: str, admitted: Admission) -> None:
    given = {name: value for name, value in (admitted.get("environment") or {}).items() if _GIVEN.fullmatch(name)}
    values = {"TUNERY_API_URL": url, "TUNERY_NODE_NAME": admitted.get("name", ""), **given}
    if any("\n" in value or "\r" in value for value in values.values()):
        raise Refused("the answer is not usable", why="A value holds a line break.", fix="Check the URL.")
    home.create()
    write_private(_env_file(home), "".join(f"{name}={value}\n" for name, value in values.items()))
    (home.node / "node_id").write_text(str(ids.decode(ids.NODE, admitted.get("id") or "")))


# ---- the process --------------------------------------------------------------------------------------------


def _become(home: Home, argv: list[str], environment: dict[str, str]) -> NoReturn:
    """Signals, terminal and exit code are then the node's own."""
    os.chdir(home.node)
    sys.stderr.write("the node runs until Ctrl-C; --detach leaves it in the background\n")
    sys.stderr.flush()
    os.execve(argv[0], argv, environment)  # noqa: S606


def _detach(home: Home, argv: list[str], environment: dict[str, str]) -> int:
    log = home.logs / "node.log"
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    tail = Tail("node", log)
    started = subprocess.Popen(
        argv,
        env=environment,
        cwd=home.node,
        stdin=subprocess.DEVNULL,
        stdout=descriptor,
        stderr=descriptor,
        start_new_session=True,
    )
    os.close(descriptor)
    deadline = time.monotonic() + _START_WITHIN_S
    said: list[str] = []
    while time.monotonic() < deadline:
        said += tail.read()
        if started.poll() is not None:
            raise Refused(
                "the node ended at once",
                why="\n".join(said[-5:]) or "It said nothing.",
                fix=f"read {log}",
                reference=_PAGE,
            )
        if any('"node up"' in line for line in said):
            sys.stderr.write(f"the node is up (pid {started.pid}); log {log}; tunery node stop ends it\n")
            return 0
        time.sleep(0.05)
    sys.stderr.write(f"the node runs (pid {started.pid}) but has not registered yet; read {log}\n")
    return 0


def _holder(home: Home) -> int | None:
    """The pid of the node's process, believed only while it holds the lock."""
    try:
        with (home.node / "node.lock").open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return None
    except BlockingIOError:
        return int((home.node / "node.lock").read_text() or "0") or None
    return None


def _env_file(home: Home) -> Path:
    return home.root / _ENV_FILE


def _read(path: Path) -> dict[str, str]:
    pairs = (line.partition("=") for line in path.read_text().splitlines() if line and not line.startswith("#"))
    return {name: value for name, _, value in pairs}
