"""`jobs estimate`: what a job would take, before it is submitted."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunery.cli import config, files, refs
from tunery.cli.options import Json
from tunery.cli.show import duration, fields, size, table
from tunery.cli.terminal import clean, data, json_out

if TYPE_CHECKING:
    from tunery.client.shapes import ClassEstimate, Estimate


def register(app: typer.Typer) -> None:
    app.command("estimate")(estimate)


def estimate(
    model: Annotated[str | None, typer.Option("--model", "-m", metavar="MODEL", help="A base model.")] = None,
    parameters: Annotated[
        float | None, typer.Option(metavar="N", help="Of a model that is not here, e.g. 8e9; instead of --model.")
    ] = None,
    training: Annotated[
        str | None, typer.Option("--training", "-t", metavar="FILE|ID", help="A local JSONL file, not sent, or an id.")
    ] = None,
    rows: Annotated[int | None, typer.Option(metavar="N", min=1, help="Instead of a file.")] = None,
    epochs: Annotated[int | None, typer.Option(metavar="N", min=1, max=50, help="Passes over the data.")] = None,
    r: Annotated[int | None, typer.Option("--r", metavar="N", min=1, help="LoRA rank.")] = None,
    max_length: Annotated[int | None, typer.Option(metavar="N", min=16, help="Tokens per example, at most.")] = None,
    gpus: Annotated[int | None, typer.Option(metavar="N", min=1, help="On one node.")] = None,
    gpu_class: Annotated[str | None, typer.Option(metavar="NAME", help="Only on such GPUs.")] = None,
    profile: Annotated[
        str | None, typer.Option(metavar="NAME", help="learned (past runs; the default) or seed001 (a rule of thumb).")
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what a job would take: time, memory, money, and the size of its adapter. Nothing is sent but numbers."""
    if (model is None) == (parameters is None):
        raise typer.BadParameter("give one of --model and --parameters")
    if (training is None) == (rows is None):
        raise typer.BadParameter("give one of --training and --rows")
    api = config.client()
    body: dict[str, Any] = {"model": model, "rows": rows, "profile": profile}
    body["parameters"] = None if parameters is None else round(parameters)
    if training is not None:
        path = Path(training)
        body |= counted(path) if path.exists() else {"training_file": refs.file(api, training)["id"]}
    body["hyperparameters"] = {"n_epochs": epochs} if epochs else None
    sections = {
        "adapter": {"r": r},
        "training": {"max_length": max_length},
        "resources": {"gpus": gpus, "gpu_class": gpu_class},
    }
    given = {name: {key: value for key, value in one.items() if value is not None} for name, one in sections.items()}
    body["tunery"] = {name: one for name, one in given.items() if one} or None
    found = api.estimate({name: value for name, value in body.items() if value is not None})
    if as_json:
        json_out(found)
        return
    fields(_about(found))
    data("")
    table(
        ("GPU CLASS", "FITS", "MEMORY", "TIME", "AT MOST", "COST", "FROM"),
        [_row(one) for one in found.get("classes") or []],
    )


def counted(path: Path) -> dict[str, Any]:
    """Rows of a local file and their bytes; it stays where it is."""
    count = total = longest = 0
    with files.local_file(path).open("rb") as lines:
        for line in lines:
            if length := len(line.strip()):
                count, total, longest = count + 1, total + length, max(longest, length)
    if not count:
        raise typer.BadParameter(f"{clean(str(path))} has no rows")
    return {"rows": count, "row_bytes": total / count, "longest_row_bytes": longest}


def _about(found: "Estimate") -> list[tuple[str, object]]:
    epochs, gpus = found.get("epochs", 0), found.get("gpus", 1)
    return [
        ("model", found.get("model") or f"{found.get('parameters', 0) / 1e9:.3g} B parameters"),
        ("rows", f"{found.get('rows', 0):,} x {epochs:g} epochs, about {found.get('tokens', 0):,} tokens"),
        ("adapter", f"{size(found.get('adapter_bytes'))}, {found.get('adapter_parameters', 0):,} parameters"),
        ("gpus", str(gpus) if gpus > 1 else None),
    ]


def _row(one: "ClassEstimate") -> tuple[object, ...]:
    fits, amount, runs = one.get("fits"), one.get("amount"), one.get("runs", 0)
    return (
        one.get("gpu_class") or "any",
        "-" if fits is None else "yes" if fits else "no",
        size(one.get("gpu_bytes")),
        duration(one.get("hours", 0) * 3600),
        duration(one.get("hours_p90", 0) * 3600),
        "-" if amount is None else f"{amount:.2f}",
        f"{runs} runs" if runs else "a formula",
    )
