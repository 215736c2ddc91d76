"""`gpus`: the deployment's devices, and what each kind of them costs."""

from typing import TYPE_CHECKING, Annotated

import typer

from tunery.cli import config
from tunery.cli.failures import Exit, Failure
from tunery.cli.options import Json, Quiet
from tunery.cli.show import listing, money, size
from tunery.cli.terminal import done, json_out, say

if TYPE_CHECKING:
    from tunery.client.shapes import Gpu, GpuClass

app = typer.Typer(
    help="The GPUs: which there are, which are free, what each class costs.",
    rich_markup_mode=None,
    add_completion=False,
    invoke_without_command=True,
)
_BAR = 10


@app.callback()
def list_gpus(
    context: typer.Context,
    gpu_class: Annotated[str | None, typer.Option("--class", metavar="CLASS", help="Only of this class.")] = None,
    free: Annotated[bool, typer.Option("--free", help="Only those that could take a job now.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """List the GPUs of the deployment, by node."""
    if context.invoked_subcommand is not None:
        return
    everything = sorted(config.client().gpus(), key=lambda one: (one.get("node") or "", one.get("index") or 0))
    asked = [one for one in everything if gpu_class in (None, one.get("gpu_class"))]
    rows = [one for one in asked if not free or one.get("state") == "free"]
    headers = ("NODE", "GPU", "CLASS", "STATE", "MEMORY", "", "JOBS", "YOURS")
    empty = "no GPUs\n  nodes bring them:  tunery nodes" if not everything else "none of the GPUs match"
    listing(rows, headers, _row, empty, right=("GPU", "JOBS"), as_json=as_json, quiet=quiet)
    if rows and not as_json and not quiet:
        say(_sum(asked))


def _row(gpu: "Gpu") -> tuple[object, ...]:
    used, usable = gpu.get("reserved_bytes") or 0, gpu.get("usable_bytes") or 0
    yours = gpu.get("jobs") or []
    return (
        gpu.get("node"),
        gpu.get("index"),
        gpu.get("gpu_class"),
        gpu.get("state"),
        _bar(used, usable),
        f"{size(used)} of {size(usable)}",
        gpu.get("attempts") or None,
        ", ".join(yours[:2]) + (f" +{len(yours) - 2}" if len(yours) > 2 else "") or None,
    )


def _bar(used: int, usable: int) -> str:
    filled = min(_BAR, -(-used * _BAR // usable)) if usable else 0  # rounded up: a little is not nothing
    return "█" * filled + "░" * (_BAR - filled)


def _sum(gpus: "list[Gpu]") -> str:
    """`3 of 8 free: 2 x h100-80gb, 1 x a100-40gb`."""
    free = [one.get("gpu_class") or "?" for one in gpus if one.get("state") == "free"]
    kinds = ", ".join(f"{free.count(kind)} x {kind}" for kind in sorted(set(free)))
    return f"{len(free)} of {len(gpus)} free{': ' + kinds if kinds else ''}"


@app.command("classes")
def classes(as_json: Json = False, quiet: Quiet = False) -> None:
    """List the kinds of GPU: what a second on one counts in fair share, and its price."""
    rows = list(config.client().gpu_classes())
    headers = ("CLASS", "GPUS", "COST", "PRICE PER HOUR")
    empty = "no GPU classes\n  nodes bring them:  tunery nodes"
    listing(rows, headers, _class_row, empty, right=headers[1:], as_json=as_json, quiet=quiet)


def _class_row(one: "GpuClass") -> tuple[object, ...]:
    return one["id"], one.get("devices"), f"{one.get('cost', 1.0):g}", money(one.get("price_per_hour"))


@app.command("class")
def set_class(
    name: Annotated[str, typer.Argument(metavar="CLASS", help="Such as h100-80gb; `tunery gpus classes` lists them.")],
    cost: Annotated[
        float | None, typer.Option(help="What a second counts in fair share; an ordinary GPU has 1.")
    ] = None,
    price: Annotated[float | None, typer.Option(help="Price of an hour, in your currency.")] = None,
    no_price: Annotated[bool, typer.Option("--no-price", help="Take the price away.")] = False,
    as_json: Json = False,
) -> None:
    """Show one class, or set its cost or its price. Needs a key with the scope admin to set."""
    if price is not None and no_price:
        raise Failure(
            "--price and --no-price contradict each other",
            why="one sets a price, the other takes it away",
            fix=f"tunery gpus class {name} --no-price",
            code="contradicting_options",
            exit_code=Exit.USAGE,
        )
    changes: dict[str, object] = {"cost": cost} if cost is not None else {}
    if price is not None or no_price:
        changes["price_per_hour"] = price
    api = config.client()
    found = api.set_gpu_class(name, changes) if changes else api.gpu_class(name)
    if as_json:
        json_out(found)
        return
    priced = money(found.get("price_per_hour"))
    text = f"{name}: cost {found.get('cost', 1.0):g}, {f'{priced} an hour' if priced else 'no price'}"
    if changes:
        done(text)
    else:
        say(f"{text}, {found.get('devices')} GPUs")
    if not found.get("devices"):
        say("  no node has GPUs of this class yet; tunery gpus classes lists them all")
