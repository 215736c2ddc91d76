"""`queue`: what waits, why, and when it starts; and what would become of one more job."""

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunery.cli import config, refs
from tunery.cli.job_create import create, request_of
from tunery.cli.job_estimate import counted
from tunery.cli.jobs import about, asks, place_of, starts_in, unknown
from tunery.cli.options import Json, Quiet
from tunery.cli.show import duration, fields, last_below, money, size
from tunery.cli.terminal import data, json_out, say

if TYPE_CHECKING:
    from tunery.client.shapes import Queue, QueuedJob, QueueSimulation, StartTimes

app = typer.Typer(
    help="The queue: your waiting jobs, why each waits, and when it starts.",
    rich_markup_mode=None,
    add_completion=False,
    invoke_without_command=True,
)
_AHEAD = re.compile(r"; \d+ jobs? of (your project|other projects)( and \d+ of other projects)? (is|are) ahead$")
_SUBMITTING = ("wait", "watch", "detach", "dry_run", "quiet")


@app.callback()
def show_queue(context: typer.Context, as_json: Json = False, quiet: Quiet = False) -> None:
    """List your project's waiting jobs in their order."""
    if context.invoked_subcommand is not None:
        return
    found = config.client().queue()
    if as_json:
        json_out(found)
        return
    rows = found.get("jobs") or []
    if quiet:
        for job in rows:
            data(job["id"])
        return
    if rows:
        last_below(("JOB", "POS", "STARTS IN", "ASKS", "WHY"), [_row(job) for job in rows], right=("POS",))
    say(_sum(found, len(rows)))


def _row(job: "QueuedJob") -> tuple[str, ...]:
    wait = job.get("queue") or {}
    where, when = job.get("resources") or {}, job.get("scheduling") or {}
    reason = (wait.get("reason") or {}).get("message") or ""
    return (
        job["id"],
        str(wait.get("position") or "-"),
        _starts(wait.get("estimated_start")),
        _short(asks(where, when)),
        _beside(reason),
    )


def _short(text: str) -> str:
    """`2 GPUs with 40 GB, class h100-80gb` -> `2 x 40 GB, h100-80gb`."""
    return text.replace(" GPUs with ", " x ").replace(" GPU with ", " x ").replace("class ", "")


def _beside(reason: str) -> str:
    """The table has columns for what it needs and for its place."""
    need, found, rest = reason.partition("; ")
    told = rest if found and need.startswith("needs ") else reason
    return _AHEAD.sub("", told)


def _starts(times: "StartTimes | None") -> str:
    """`41m - 1h 20m`: median and ninth decile."""
    import time

    if times is None:
        return "?"
    now = time.time()
    p50, p90, least = (times.get(name) for name in ("p50", "p90", "not_before"))
    if p50 is None:
        return f"> {about(least - now)}" if least is not None else "?"
    first = about(p50 - now) if p50 - now >= 60 else "< 1m"
    last = about(p90 - now) if p90 is not None and p90 - now >= 60 else None
    return f"{first} - {last}" if last and last != first else first


def _sum(queue: "Queue", shown: int) -> str:
    own, everybody = (queue.get("project") or {}).get("queued", 0), queue.get("queued", 0)
    free, total = queue.get("available_gpus", 0), queue.get("total_gpus", 0)
    rest = f"; the first {shown} are shown" if own > shown else ""
    wait = "waits" if own == 1 else "wait"
    text = f"{own} of your jobs {wait}{rest}, {everybody - own} of other projects; {free} of {total} GPUs are free"
    return f"{text}\n  why  tunery jobs why JOB" if shown else text


def simulate(**given: Any) -> None:
    """Say when a job would start if it were submitted now. Nothing is sent but numbers; same options as jobs create."""
    rows, as_json = given.pop("rows"), given.pop("as_json")
    body = request_of(given)
    api = config.client()
    if (training := body.pop("training_file", None)) is not None:
        path = Path(training)
        body |= counted(path) if path.exists() else {"training_file": refs.file(api, training)["id"]}
    body.pop("validation_file", None)
    body |= {"rows": rows} if rows is not None else {}
    if not body.keys() & {"training_file", "rows"}:
        raise typer.BadParameter("give --training or --rows")
    found = api.simulate(body)
    if as_json:
        json_out(found)
    else:
        fields(_about(found))


def _about(found: "QueueSimulation") -> list[tuple[str, object]]:
    cost, reason = found.get("cost") or {}, found.get("reason") or {}
    amount = cost.get("amount")
    place = place_of({"position": found.get("position"), "jobs_ahead": found.get("jobs_ahead") or {}})
    return [
        (
            "starts",
            starts_in(found.get("starts_in"), 0) or unknown(reason.get("code"), "not within what was looked at"),
        ),
        ("place", place),
        ("waits", reason.get("message")),
        ("memory", f"{size(found.get('gpu_bytes'))} on each GPU"),
        ("runs", f"about {duration(cost.get('hours', 0) * 3600)}, stopped after {duration(found.get('limit_s'))}"),
        ("cost", money(amount) if amount is not None else None),
    ]


def _with_options_of(command: Callable[..., None], without: tuple[str, ...]) -> inspect.Signature:
    """So that what can be submitted can be asked about in the same words."""
    rows = Annotated[int | None, typer.Option(metavar="N", min=1, help="Instead of a file.")]
    kept = [
        one.replace(kind=inspect.Parameter.KEYWORD_ONLY, default=None if name == "training" else one.default)
        for name, one in inspect.signature(command).parameters.items()
        if name not in without
    ]
    return inspect.Signature(
        [*kept, inspect.Parameter("rows", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=rows)]
    )


simulate.__signature__ = _with_options_of(create, _SUBMITTING)  # pyright: ignore[reportFunctionMemberAccess]
simulate.__annotations__ = {one.name: one.annotation for one in simulate.__signature__.parameters.values()}  # pyright: ignore[reportFunctionMemberAccess]
app.command("simulate")(simulate)
