"""`tunery usage` and `tunery budget`: GPU time, what it costs, and what a month may cost."""

import sys
from typing import Annotated, Any

import typer

from tunery.cli import config
from tunery.cli.failures import Exit, Failure
from tunery.cli.options import Json, group
from tunery.cli.show import date, duration, table, wrapped
from tunery.cli.terminal import console, data, done, json_out, paint, say

_BAR = 30
_SPLIT = ("loading_seconds", "productive_seconds", "user_fault_seconds", "platform_fault_seconds")
_HEADERS = ("CLASS", "GPU TIME", "LOADING", "PRODUCTIVE", "YOUR FAULT", "REFUNDED", "CHARGED", "AMOUNT")

Month = Annotated[str | None, typer.Option(metavar="YYYY-MM", help="Another month; months are UTC's.")]
ProjectRef = Annotated[str, typer.Argument(metavar="PROJECT", help="Its id, its name, or organization:name.")]

app = group("Monthly budgets of projects.")


def register(root: typer.Typer) -> None:
    root.command("usage")(usage)
    root.add_typer(app, name="budget")


def usage(
    month: Month = None,
    csv: Annotated[bool, typer.Option("--csv", help="One line an attempt and GPU.")] = False,
    as_json: Json = False,
) -> None:
    """Show a month's GPU time: by class, how it was spent, what it costs, and the budget."""
    api = config.client()
    if csv:
        api.stream_usage(month, sys.stdout.buffer.write)
        sys.stdout.buffer.flush()
        return
    used = api.usage(month)
    if as_json:
        json_out(used)
        return
    classes, total = used["classes"], used["total"]
    if not classes:
        say(f"no GPU time was used in {used['month']}")
    else:
        rows = [_row(one["gpu_class"], one) for one in classes]
        if len(rows) > 1:
            rows.append(_row("all", total))
        table(_HEADERS, rows, right=_HEADERS[1:])
    if running := total["running_gpu_seconds"]:
        say(f"{duration(running)} of it is of attempts that still run: an estimate until they end")
    budget = api.budget()
    if budget["month"] == used["month"]:
        if classes:
            data("")
        _show(budget)


@app.command("show")
def show(project: Annotated[str | None, typer.Argument(metavar="[PROJECT]")] = None, as_json: Json = False) -> None:
    """Show where a project's month stands: your key's own project, or with the scope admin any."""
    found = config.client().budget(project)
    if as_json:
        json_out(found)
    else:
        _show(found)


@app.command("set")
def set_budget(
    project: ProjectRef,
    gpu_hours: Annotated[float | None, typer.Option(min=0, help="GPU-hours a month.")] = None,
    amount: Annotated[float | None, typer.Option(min=0, help="Money a month, in the price list's unit.")] = None,
    as_json: Json = False,
) -> None:
    """Set a project's monthly budget (scope admin). A limit that is not given is none."""
    if gpu_hours is None and amount is None:
        raise Failure(
            "no limit was given",
            why="a budget is in GPU-hours, in money, or both",
            fix=f"tunery budget set {project} --gpu-hours 500     (to take it away: tunery budget clear {project})",
            code="no_limit",
            exit_code=Exit.USAGE,
        )
    found = config.client().set_budget(project, {"monthly_gpu_hours": gpu_hours, "monthly_amount": amount})
    if as_json:
        json_out(found)
        return
    done(f"budget of {project} is set; what was used since {found['month']}-01 counts")
    _show(found, anew=True)


@app.command("clear")
def clear(project: ProjectRef) -> None:
    """Take a project's budget away (scope admin)."""
    config.client().delete_budget(project)
    done(f"{project} has no budget")


def _row(name: str, used: dict[str, Any]) -> tuple[object, ...]:
    split = (duration(used[kind]) for kind in _SPLIT)
    return name, duration(used["gpu_seconds"]), *split, duration(used["charged_gpu_seconds"]), _money(used["amount"])


def _show(budget: dict[str, Any], *, anew: bool = False) -> None:
    measures = [("GPU-hours", budget["gpu_hours"]), ("amount", budget["amount"])]
    limited = [(name, measure) for name, measure in measures if measure["limit"] is not None]
    if not limited:
        say("no budget is set")
        return
    for name, measure in limited:
        data(f"{name:<10} {_bar(measure)}  {_words(measure)}")
    for alert in budget["alerts"]:
        kind = "GPU-hours" if alert["kind"] == "gpu_hours" else "amount"
        text = f"{alert['threshold']} % of {alert['limit']:g} {kind} was passed on {date(alert['at'])}"
        data(f"{'alert':<10} {paint(text, 'red' if alert['threshold'] >= 100 else 'yellow', out=True)}")
    if (blocked := budget["blocked"]) and anew and all(one["used"] < one["limit"] for _, one in limited):
        say("it was used up before; its jobs start again within seconds")
    elif blocked:
        first, *rest = wrapped(blocked, max(console().width - 11, 40))
        data("\n".join([f"{'blocked':<10} {paint(first, 'red', out=True)}", *(f"{'':<10} {line}" for line in rest)]))
    if any(measure["held"] for _, measure in limited):
        say(f"held: what unfinished jobs ({budget['holding_jobs']}) are still expected to use")


def _bar(measure: dict[str, Any]) -> str:
    """Used, held, left."""
    limit = measure["limit"] or 1e-9
    used = min(_BAR, round(_BAR * measure["used"] / limit))
    held = min(_BAR - used, round(_BAR * measure["held"] / limit))
    level = measure["used"] / limit
    colour = "red" if level >= 1 else "yellow" if level >= 0.8 else "green"
    return paint("█" * used, colour, out=True) + "▒" * held + "░" * (_BAR - used - held)


def _words(measure: dict[str, Any]) -> str:
    limit, used = measure["limit"], measure["used"]
    percent = f"{100 * used / limit:.0f} %" if limit else "100 %"
    held = f", {_plain(measure['held'])} held" if measure["held"] else ""
    return f"{percent}  {_plain(used)} of {_plain(limit)} used{held}, {_plain(measure['left'])} left"


def _plain(value: float) -> str:
    """As many digits behind the point as say something."""
    return f"{value:,.{2 if value >= 1 else 4}f}".rstrip("0").rstrip(".")


def _money(amount: float | None) -> str | None:
    return None if amount is None else f"{amount:,.2f}"
