"""`models`: the base models that jobs may start from."""

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunery.cli import config
from tunery.cli.failures import Exit, Failure
from tunery.cli.options import All, Json, Limit, Quiet, group, take
from tunery.cli.progress import waiting
from tunery.cli.show import ago, date, fields, listing, parameters, size
from tunery.cli.terminal import clean, data, done, json_out, say

if TYPE_CHECKING:
    from tunery.client import Client
    from tunery.client.shapes import BaseModel

app = group("Base models: list, show, import.")
POLL_S = 1.0


@app.command("list")
def list_models(limit: Limit = 20, everything: All = False, as_json: Json = False, quiet: Quiet = False) -> None:
    """List the base models of this server."""
    rows = take(config.client().base_models(), limit, everything)
    headers = ("NAME", "STATE", "PARAMETERS", "SIZE", "LICENSE", "ADDED")
    empty = "no base models yet\n  start with the small demo model:  tunery models import demo"
    listing(rows, headers, _row, empty, right=("PARAMETERS", "SIZE"), as_json=as_json, quiet=quiet)


def _row(model: "BaseModel") -> tuple[object, ...]:
    return (
        model["id"],
        model.get("state"),
        parameters(model.get("parameters")),
        size(model.get("bytes")),
        model.get("license"),
        ago(model.get("created_at")),
    )


@app.command("show")
def show(
    name: Annotated[str, typer.Argument(help="A base model, or a tuned one (ft:...).")], as_json: Json = False
) -> None:
    """Show one model."""
    api = config.client()
    if name.startswith("ft:"):
        tuned = api.model(name)
        if as_json:
            json_out(tuned)
        else:
            fields([("id", name), ("owned by", tuned.get("owned_by")), ("created", date(tuned.get("created")))])
        return
    model = api.base_model(name)
    if as_json:
        json_out(model)
    else:
        _describe(model)


def _describe(model: "BaseModel") -> None:
    fields(
        [
            ("name", model["id"]),
            ("state", model.get("state")),
            ("error", model.get("error")),
            ("hub id", model.get("hub_id")),
            ("revision", model.get("revision")),
            ("source", model.get("source")),
            ("license", model.get("license")),
            ("parameters", parameters(model.get("parameters"))),
            ("size", size(model.get("bytes"))),
            ("added", date(model.get("created_at"))),
            *[(f"file {number}", _file(file)) for number, file in enumerate(model.get("files") or [], 1)],
        ]
    )


def _file(file: Any) -> str:
    return f"{file.get('name')}  {size(file.get('bytes'))}  sha256 {str(file.get('sha256', ''))[:12]}…"


@app.command("delete")
def delete(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Models that jobs have made: ft:...")],
    as_json: Json = False,
) -> None:
    """Delete models that jobs of this project have made, with their files."""
    api = config.client()
    deleted = [api.delete_model(name) for name in names]
    if as_json:
        json_out(deleted)
        return
    for answer in deleted:
        data(answer["id"])
    done("deleted")


@app.command("import")
def import_model(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="demo, hub:OWNER/NAME@REVISION or path:DIR.")],
    name: Annotated[str | None, typer.Option(help="What jobs will call it.")] = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Return when it is ready, or at once.")] = True,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Bring a base model into the catalogue: it is fetched, checked and hashed once."""
    api = config.client()
    model = api.import_base_model(_request(source, name))
    if wait:
        model = _until_ready(api, model)
    if as_json:
        json_out(model)
    else:
        data(model["id"])
    if quiet or as_json:
        return
    if model.get("state") == "ready":
        done(f"{model['id']} is ready ({parameters(model.get('parameters'))} parameters, {size(model.get('bytes'))})")
        say(f"  next   tunery jobs create -m {model['id']} -t train.jsonl --watch")
    else:
        say(f"importing; look with  tunery models show {model['id']}")


def _request(source: str, name: str | None) -> dict[str, str]:
    kind, _, rest = source.partition(":")
    body = {"source": kind} | ({"name": name} if name else {})
    if kind == "demo" and not rest:
        return body
    if kind == "path" and rest:
        return body | {"path": rest}
    repo, _, revision = rest.partition("@")
    if kind == "hub" and repo:
        return body | {"repo": repo} | ({"revision": revision} if revision else {})
    raise Failure(
        f"{source!r} names no source",
        why="a source is demo, hub:OWNER/NAME, hub:OWNER/NAME@REVISION or path:DIR",
        fix="tunery models import demo",
        code="invalid_source",
        exit_code=Exit.USAGE,
    )


def _until_ready(api: "Client", model: "BaseModel") -> "BaseModel":
    name = model["id"]
    try:
        with waiting(f"importing {clean(name)} ..."):
            while model.get("state") == "importing":
                time.sleep(POLL_S)
                model = api.base_model(name)
    except KeyboardInterrupt:
        say(f"\ndetached; the import continues: tunery models show {name}")
        raise typer.Exit(Exit.INTERRUPTED) from None
    if model.get("state") == "failed":
        raise Failure(
            f"{name} was not imported",
            why=model.get("error") or "the server gave no reason",
            fix="Correct the source and import it again; `tunery logs` shows more on a server of your own.",
            code="model_import_failed",
            exit_code=Exit.OTHER,
        )
    return model
