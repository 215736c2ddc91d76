"""`nodes` and `node ...`: the machines of a deployment, and this machine as one of them."""

import re
import uuid
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
    from tunery.client import Client
    from tunery.client.shapes import Node

app = group("The machines of a deployment: join them, look at them, take them out of service, remove them.")
NodeRef = Annotated[str, typer.Argument(metavar="NODE", help="A node's name or id.")]
Detach = Annotated[bool, typer.Option("-d", "--detach", help="Leave it in the background; else Ctrl-C stops it.")]
_APART = ("layers", "disk_free_bytes", "disk_full", "labels")
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
    headers = ("NAME", "STATE", "DEVICES", "JOBS", "LABELS", "HEARD", "ISOLATED", "LOGIN", "VERSION")
    empty = "no nodes\n  this machine: tunery up;  another one: tunery node token"
    listing(rows, headers, _row, empty, as_json=as_json, quiet=quiet)


def _row(node: "Node") -> tuple[object, ...]:
    never = not node.get("version")
    return (
        node.get("name"),
        node.get("state"),
        _devices(node),
        node.get("attempts"),
        _labels(node),
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
            ("labels", _labels(found)),
            ("jobs", found.get("attempts")),
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


@app.command("cordon")
def cordon(node: NodeRef, as_json: Json = False) -> None:
    """Assign nothing more to a machine; what runs there goes on."""
    found = config.client().cordon_node(node)
    left = found.get("attempts", 0)
    rest = f"{_jobs(left)} there {'goes' if left == 1 else 'go'} on" if left else "nothing runs there"
    _told(found, f"{found.get('name')} takes no new jobs; {rest}", as_json)


@app.command("drain")
def drain(
    node: NodeRef,
    wait: Annotated[
        bool, typer.Option("--wait", help="Until nothing is left there; Ctrl-C leaves it draining.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Empty a machine: its jobs save a checkpoint and go on elsewhere.

    They return to their places in the queue, and nothing that was saved is lost. `tunery node return` undoes it.
    """
    api = config.client()
    found = api.drain_node(node)
    if wait:
        found = _emptied(api, found)
    if found.get("state") == "drained":
        text = f"{found.get('name')} is drained: nothing is left on it, it may be switched off"
    else:
        text = f"{found.get('name')} is draining: {_jobs(found.get('attempts', 0))} to save and to go on elsewhere"
    _told(found, text, as_json)


def _emptied(api: "Client", node: "Node") -> "Node":
    import time

    left: int | None = None
    while node.get("state") != "drained":
        if node.get("state") not in ("draining", "silent"):
            raise Failure(
                f"{node.get('name')} is not draining any more",
                why=f"it is {node.get('state')}: somebody has changed that meanwhile",
                fix=f"tunery node drain {node.get('name')} --wait",
                code="node_not_draining",
                exit_code=Exit.OTHER,
            )
        if (now := node.get("attempts", 0)) != left:
            left = now
            say(f"{_jobs(left)} left" if left else "tasks are ending")
        time.sleep(0.5)
        node = api.node(node["id"])
    return node


@app.command("return")
def take_back(node: NodeRef, as_json: Json = False) -> None:
    """Give a cordoned or drained machine work again."""
    found = config.client().uncordon_node(node)
    state = found.get("state")
    later = "" if state == "up" else f" once its process runs (it is {state})"
    _told(found, f"{found.get('name')} takes jobs{later}", as_json)


@app.command("label")
def label(
    node: NodeRef,
    changes: Annotated[
        list[str], typer.Argument(metavar="NAME=VALUE|NAME-", help="rack=b sets one, rack- removes it.")
    ],
    as_json: Json = False,
) -> None:
    """Set or remove labels that jobs may ask for. They win over those that the machine gives itself."""
    wanted: dict[str, str | None] = {}
    for change in changes:
        name, equals, value = change.partition("=")
        if not equals and not change.endswith("-"):
            raise Failure(
                f"{change!r} changes no label",
                why="it is neither NAME=VALUE nor NAME-",
                fix=f"tunery node label {node} rack=b old-",
                code="invalid_label",
                exit_code=Exit.USAGE,
            )
        wanted[name if equals else change[:-1]] = value if equals else None
    found = config.client().label_node(node, wanted)
    _told(found, f"{found.get('name')}: {_labels(found) or 'no labels'}", as_json)


def _told(node: "Node", text: str, as_json: bool) -> None:
    if as_json:
        json_out(node)
    else:
        done(text)


def _jobs(count: int) -> str:
    return "1 job" if count == 1 else f"{count} jobs"


@app.command("manifest")
def manifest(
    attempt: Annotated[uuid.UUID, typer.Argument(metavar="ATTEMPT", help="Its UUID, as the scheduler's log has it.")],
    node: Annotated[uuid.UUID, typer.Argument(metavar="NODE", help="UUID of the node that it is assigned to.")],
    image: Annotated[str, typer.Option(help="Built from Dockerfile.worker.")] = "tunery-worker:latest",
    namespace: Annotated[str, typer.Option(help="Where the Secret and the claims are.")] = "tunery",
    gpus: Annotated[int, typer.Option(min=1, help="As many as the attempt was given.")] = 1,
    limit: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="The attempt's time limit; else a day.")
    ] = None,
) -> None:
    """Print the Kubernetes Job of one attempt, as JSON that kubectl takes.

    Nothing applies it: docs/node.md says what is wired and what is not.
    """
    from tunery.kubernetes import Pod, attempt_job

    json_out(attempt_job(attempt, node, limit_s=limit, pod=Pod(image=image, namespace=namespace, gpus=gpus)))


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


def _labels(node: "Node") -> str | None:
    return " ".join(f"{key}={value}" for key, value in (node.get("labels") or {}).items()) or None


def _devices(node: "Node") -> str | None:
    names = [str(one.get("name")) for one in node.get("devices") or []]
    counted = [f"{names.count(name)} x {name}" if names.count(name) > 1 else name for name in dict.fromkeys(names)]
    return ", ".join(counted) or None


def _device(device: Any) -> str:
    free = (device.get("usable_bytes") or 0) - (device.get("reserved_bytes") or 0)
    room = f"{size(free)} free of {size(device.get('total_bytes'))}"
    return f"{device.get('name')}  {device.get('gpu_class')}  {room}  {device.get('state')}"


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
