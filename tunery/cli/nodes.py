"""`nodes` and `node ...`: the machines of a deployment, and this machine as one of them."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunery.cli import config
from tunery.cli.failures import Exit, Failure
from tunery.cli.local import hand_over
from tunery.cli.options import All, Json, Limit, Quiet, group, take
from tunery.cli.show import ago, date, fields, listing, size
from tunery.cli.terminal import data, done, json_out, say

if TYPE_CHECKING:
    from tunery.client.shapes import Node

app = group("The machines of a deployment: token, join, start, stop, list, show, remove.")
NodeRef = Annotated[str, typer.Argument(metavar="NODE", help="A node's name or id.")]
Detach = Annotated[bool, typer.Option("-d", "--detach", help="Leave it in the background; else Ctrl-C stops it.")]
_APART = ("layers", "disk_free_bytes", "disk_full")
"""Of what a node says of itself, what is shown in words of its own."""
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


def register(root: typer.Typer) -> None:
    root.command("nodes")(list_nodes)
    root.add_typer(app, name="node")


@app.command("token")
def token(
    expires: Annotated[str, typer.Option(metavar="TIME", help="How long it is good: 30m, 1h, 7d.")] = "1h",
    as_json: Json = False,
) -> None:
    """Make a token that admits one machine, once. Needs a key with the scope admin."""
    made = config.client().create_join_token(expires_in=_seconds(expires))
    if as_json:
        json_out(made)
        return
    data(made["token"])
    say(f"shown this once; good for one machine until {date(made.get('expires_at'))}. There, in a checkout:")
    say(f"  tunery node join {config.target().api_url}")


@app.command("join")
def join(
    api_url: Annotated[str, typer.Argument(metavar="API_URL", help="The deployment's api, as seen from here.")],
    name: Annotated[str | None, typer.Option(help="What this node is called; else the host's name.")] = None,
    token_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Holds the token; else TUNERY_NODE_TOKEN, stdin or a prompt.")
    ] = None,
    detach: Detach = False,
) -> None:
    """Make this machine a node, with a one-time token.

    What it is given goes to node.env in TUNERY_HOME and opens this node's own rows and queue alone. Its process is
    started: until Ctrl-C, or in the background with --detach.
    """
    url = config.normal(api_url)
    if url.startswith("http://") and not config.is_loopback(url):
        say("warning: this address is not encrypted; the node's credentials can be read on the way")
    options = [*(["--name", name] if name else []), *(["--token-file", str(token_file)] if token_file else [])]
    hand_over("tunery.embedded", "join", url, *options, *(["--detach"] if detach else []))


@app.command("start")
def start(detach: Detach = False) -> None:
    """Start this machine's node again."""
    hand_over("tunery.embedded", "node-start", *(["--detach"] if detach else []))


@app.command("stop")
def stop() -> None:
    """Stop this machine's node in order.

    Its trainers checkpoint, and their jobs go back to the queue.
    """
    hand_over("tunery.embedded", "node-stop")


@app.command("list")
def list_nodes(limit: Limit = 20, everything: All = False, as_json: Json = False, quiet: Quiet = False) -> None:
    """List the machines of the deployment."""
    rows = take(config.client().nodes(), limit, everything)
    headers = ("NAME", "STATE", "DEVICES", "HEARD", "ISOLATED", "LOGIN", "VERSION")
    empty = "no nodes\n  this machine: tunery up;  another one: tunery node token"
    listing(rows, headers, _row, empty, as_json=as_json, quiet=quiet)


def _row(node: "Node") -> tuple[object, ...]:
    never = not node.get("version")
    return (
        node.get("name"),
        node.get("state"),
        _devices(node),
        "never" if never else ago(node.get("last_seen_at")),
        _word((node.get("info") or {}).get("trainer_isolated")),
        "own" if node.get("joined") else "shared",
        node.get("version") or None,
    )


@app.command("show")
def show(node: NodeRef, as_json: Json = False) -> None:
    """Show one machine: its devices, and what it says of itself."""
    found = config.client().node(node)
    if as_json:
        json_out(found)
        return
    info: dict[str, Any] = found.get("info") or {}
    fields(
        [
            ("name", found.get("name")),
            ("id", found["id"]),
            ("state", found.get("state")),
            ("version", found.get("version")),
            ("login", "its own" if found.get("joined") else "shared with other nodes"),
            ("heard", ago(found.get("last_seen_at"))),
            ("registered", date(found.get("registered_at"))),
            ("task slots", found.get("task_slots")),
            ("disk", _disk(info)),
            *[(f"device {one.get('index')}", _device(one)) for one in found.get("devices") or []],
            *[(name.replace("_", " "), _word(value)) for name, value in info.items() if name not in _APART],
            *[(f"wall: {layer.get('name')}", _layer(layer)) for layer in info.get("layers") or []],
        ]
    )


@app.command("remove")
def remove(
    node: NodeRef,
    yes: Annotated[bool, typer.Option("-y", "--yes", help="Do not ask.")] = False,
    quiet: Quiet = False,
) -> None:
    """Shut a machine out at once.

    Its logins end with their open connections; its jobs are found lost, and resume elsewhere.
    """
    api = config.client()
    found = api.node(node)
    if not yes and not _confirmed(str(found.get("name"))):
        raise Failure(
            "nothing was removed",
            why="the answer was not the node's name",
            fix=f"tunery node remove {node}     (and type its name, or add --yes)",
            code="not_confirmed",
            exit_code=Exit.USAGE,
        )
    api.remove_node(found["id"])
    if quiet:
        data(found["id"])
        return
    done(f"{found.get('name')} is removed; what it was running is found lost within two minutes and resumes elsewhere")
    say("  on that machine: tunery node stop; its node.env opens nothing any more")


def _confirmed(name: str) -> bool:
    import sys

    say(f"Remove node {name}? Its database and queue logins end at once. Type its name: ")
    return sys.stdin.readline().strip() == name


def _seconds(text: str) -> int:
    parts = re.fullmatch(r"(\d{1,6})([smhd])", text.strip())
    seconds = int(parts[1]) * _UNITS[parts[2]] if parts else 0
    if not 60 <= seconds <= 7 * 86_400:
        raise Failure(
            f"{text!r} is not a time that a token can live",
            why="it is a number with s, m, h or d, from 1m to 7d",
            fix="tunery node token --expires 1h",
            code="invalid_duration",
            exit_code=Exit.USAGE,
        )
    return seconds


def _devices(node: "Node") -> str | None:
    names = [str(one.get("name")) for one in node.get("devices") or []]
    counted = [f"{names.count(name)} x {name}" if names.count(name) > 1 else name for name in dict.fromkeys(names)]
    return ", ".join(counted) or None


def _device(device: Any) -> str:
    free = (device.get("usable_bytes") or 0) - (device.get("reserved_bytes") or 0)
    return f"{device.get('name')}  {size(free)} free of {size(device.get('total_bytes'))}  {device.get('state')}"


def _layer(layer: Any) -> str:
    """One of the walls around this node's trainers."""
    state = "up" if layer.get("on") else "absent"
    fix = f"; fix: {layer['fix']}" if layer.get("fix") and not layer.get("on") else ""
    return f"{state}; {layer.get('detail')}{fix}"


def _disk(info: dict[str, Any]) -> str | None:
    if (free := info.get("disk_free_bytes")) is None:
        return None
    return f"{size(free)} free{'; too little: it takes no new work' if info.get('disk_full') else ''}"


def _word(value: object) -> str | None:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(str(_word(part)) for part in value) or None
    return None if value is None else str(value)
