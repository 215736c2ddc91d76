"""`jobs`: list, show, cancel, checkpoints. Creating and following have modules of their own."""

import contextlib
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunery.cli import config, refs
from tunery.cli.options import All, JobRef, Json, Limit, Quiet, group, take
from tunery.cli.show import ago, date, duration, fields, listing, number, size, table, unix, wrapped
from tunery.cli.terminal import clean, console, data, done, json_out, one_line, say

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tunery.client.shapes import Attempt, Checkpoint, Cost, Job, Progress, StartTimes, Wait

MINUTE_S = 60

app = group("Fine-tuning jobs: create, watch, wait, logs and the rest.")

PLURAL = Annotated[list[str], typer.Argument(metavar="JOB...", help="Ids, beginnings of ids, or @last.")]


def state_of(job: "Job") -> str:
    """The true state; OpenAI's status where a server does not tell it."""
    return job.get("tunery", {}).get("state") or job.get("status") or "unknown"


def progress_of(job: "Job") -> "Progress":
    return job.get("tunery", {}).get("progress") or {}


@app.command("list")
def list_jobs(
    state: Annotated[list[str] | None, typer.Option("--state", "-s", help="Only these states.")] = None,
    metadata: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="Only with this metadata.")] = None,
    limit: Limit = 20,
    everything: All = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """List jobs, newest first."""
    from tunery.cli.job_create import pairs

    jobs = config.client().jobs(metadata=pairs(metadata or []))
    rows = take((job for job in jobs if not state or state_of(job) in state), limit, everything)
    headers = ("ID", "STATE", "MODEL", "SUFFIX", "PROGRESS", "LOSS", "CREATED")
    empty = "no jobs yet\n  start with:  tunery jobs create -m MODEL -t train.jsonl --watch"
    if state or metadata:
        empty = "no jobs match\n  see all of them:  tunery jobs list --all"
    listing(rows, headers, _row, empty, as_json=as_json, quiet=quiet)


def _row(job: "Job") -> tuple[object, ...]:
    progress = progress_of(job)
    total = progress.get("total_steps")
    done_so_far = f"{progress.get('step', 0)}/{total}" if total else "-"
    loss, created = number(progress.get("loss")), ago(job.get("created_at"))
    return job["id"], state_of(job), job.get("model"), suffix_of(job), done_so_far, loss, created


def suffix_of(job: "Job") -> str | None:
    adapter = job.get("tunery", {}).get("adapter") or {}
    return job.get("user_provided_suffix") or adapter.get("name")


@app.command("show")
def show(job: JobRef, as_json: Json = False) -> None:
    """Show one job: state, progress, attempts, settings, result."""
    found = refs.job(config.client(), job)
    if as_json:
        json_out(found)
        return
    fields(_about(found))
    attempts = found.get("tunery", {}).get("attempts") or []
    if attempts:
        data("")
        table(("ATTEMPT", "STATE", "NODE", "DEVICE", "FROM STEP", "TOOK", "FAILURE"), [_attempt(a) for a in attempts])


def _about(job: "Job") -> list[tuple[str, object]]:
    extra, progress, error = job.get("tunery", {}), progress_of(job), job.get("error") or {}
    queue, adapter = extra.get("queue") or {}, extra.get("adapter") or {}
    waits, starts = (queue.get("reason") or {}).get("message"), starts_in(queue.get("estimated_start"))
    total, tokens = progress.get("total_steps"), job.get("trained_tokens")
    step = f"{progress.get('step', 0)} of {total}" if total else None
    made = f"{adapter.get('name')} v{adapter.get('version')}, {size(adapter.get('bytes'))}" if adapter else None
    known = [f"{name} {number(value)}" for name, value in losses(progress)]
    return [
        ("id", job["id"]),
        ("state", state_of(job)),
        ("waits", waits),
        ("place", place_of(queue) if queue else None),
        ("starts", starts if queue else None),
        ("error", f"{error.get('message')} [{error.get('code')}]" if error else None),
        ("phase", progress.get("phase")),
        ("step", step),
        ("losses", ", ".join(known)),
        ("devices", sample_of(progress, running=state_of(job) == "running")),
        ("epochs took", _epochs(progress.get("epoch_seconds") or [])),
        ("model", job.get("model")),
        ("training file", job.get("training_file")),
        ("validation file", job.get("validation_file")),
        ("seed", job.get("seed")),
        ("settings", settings_of(job)),
        ("asked for", asked_of(job)),
        ("time limit", duration(limit) if (limit := extra.get("scheduling", {}).get("limit_s")) else None),
        ("metadata", ", ".join(f"{key}={value}" for key, value in (job.get("metadata") or {}).items())),
        ("created", date(job.get("created_at"))),
        ("finished", date(job.get("finished_at"))),
        ("trained tokens", f"{tokens:,}" if tokens else None),
        ("cost", _cost(extra.get("cost") or {})),
        ("result", job.get("fine_tuned_model")),
        ("adapter", made),
    ]


def sample_of(progress: "Progress", *, running: bool) -> str | None:
    """`87 % busy, 31 GB in use, 12s ago`: the newest sample."""
    busy, used, at = (progress.get(name) for name in ("gpu_utilization", "device_memory_bytes", "sampled_at"))
    if at is None or not isinstance(busy, int | float):
        return None
    since = progress.get("underused_since") if running else None
    told = f"; little to do for {duration(time.time() - since)}" if since is not None else ""
    return f"{100 * busy:.0f} % busy, {size(used)} in use, {ago(at)}{told}"


def _epochs(took: "Sequence[float]") -> str | None:
    """Every one of a few; else the last, and the mean."""
    if not took:
        return None
    if len(took) <= 5:
        return ", ".join(duration(seconds) for seconds in took)
    return f"{len(took)} of them, {duration(sum(took) / len(took))} each; the last {duration(took[-1])}"


def place_of(wait: "Wait") -> str | None:
    """`4th: 1 job of yours and 2 of other projects come before it`."""
    ahead, position = wait.get("jobs_ahead") or {}, wait.get("position")
    own, others = ahead.get("own") or 0, ahead.get("others")
    told = [f"{own} of your project's"] if own else []
    told += [f"{others} of other projects'"] if others else []
    before = f"{' and '.join(told)} before it" if told else "none before it" if others is not None else None
    return ", ".join(part for part in (f"position {position}" if position else None, before) if part) or None


def starts_in(times: "StartTimes | None", now: float | None = None) -> str | None:
    """`in 41m (9 of 10 times before 1h 20m)`. `now`: 0 where the times are seconds from now."""
    if times is None:
        return None
    passed = time.time() if now is None else now
    p50, p90, least = (times.get(name) for name in ("p50", "p90", "not_before"))
    if p50 is not None:
        soon = "now" if now is not None else "within a minute"
        first = soon if p50 - passed < MINUTE_S else f"in {about(p50 - passed)}"
        second = (
            f" (9 times in 10 within {about(p90 - passed)})" if p90 is not None and p90 - passed >= MINUTE_S else ""
        )
        return first + second
    return f"not before {about(least - passed)} from now" if least is not None else None


def about(seconds: float) -> str:
    """`41m`, `2h 05m`, `3d 4h`: nobody waits for a forecast to the second."""
    minutes = max(1, round(seconds / MINUTE_S))
    if minutes < 60:
        return f"{minutes}m"
    if minutes < 48 * 60:
        return f"{minutes // 60}h {minutes % 60:02d}m"
    return f"{minutes // 1440}d {minutes // 60 % 24}h"


def asked_of(job: "Job") -> str:
    """Of the scheduler, where it is not the usual; memory once it is known."""
    return asks(job.get("tunery", {}).get("resources") or {}, job.get("tunery", {}).get("scheduling") or {})


def asks(where: "Mapping[str, Any]", when: "Mapping[str, Any]") -> str:
    memory, gpus = where.get("gpu_bytes"), where.get("gpus", 1)
    shown = [f"{gpus} GPU{'s' if gpus > 1 else ''}" + (f" with {size(memory)}" if memory else "")]
    shown += [f"class {name}" for name in [where.get("gpu_class")] if name]
    shown += [f"{key}={value}" for key, value in (where.get("node_labels") or {}).items()]
    shown += [f"priority {level}" for level in [when.get("priority")] if level]
    marks = {"shareable": where.get("shareable"), "urgent": when.get("urgent")}
    marks["no pre-emption"] = when.get("preemptible") is False
    return ", ".join([*shown, *(name for name, on in marks.items() if on)])


def _cost(cost: "Cost") -> str | None:
    """What was charged, and what the platform lost and does not charge."""
    seconds, charged = cost.get("gpu_seconds") or 0, cost.get("charged_gpu_seconds") or 0
    if not seconds:
        return None
    amount = "" if (money := cost.get("amount")) is None else f"{money:,.4f} for "
    refunded = f", {duration(seconds - charged)} refunded" if seconds - charged >= 1 else ""
    return f"{amount}{duration(charged)} of GPU time{refunded}{' so far' if cost.get('running') else ''}"


def losses(progress: "Progress") -> list[tuple[str, float | str]]:
    pairs = (("loss", progress.get("loss")), ("eval", progress.get("eval_loss")))
    return [(name, value) for name, value in pairs if value is not None]


def settings_of(job: "Job") -> str:
    """What was resolved, in the words of the flags; before that, what was asked."""
    recipe = job.get("tunery", {}).get("recipe") or {}
    adapter, training = recipe.get("adapter") or {}, recipe.get("training") or {}
    shown = {
        "epochs": training.get("num_train_epochs"),
        "max_steps": training.get("max_steps") if training.get("max_steps", -1) > 0 else None,
        "batch": _batch(training),
        "lr": training.get("learning_rate"),
        "r": adapter.get("r"),
        "alpha": adapter.get("lora_alpha"),
        "max_length": training.get("max_length"),
    }
    if not recipe:
        shown = dict(job.get("hyperparameters") or {})
    return ", ".join(f"{key} {_plain(value)}" for key, value in shown.items() if value is not None)


def _batch(training: "Mapping[str, int]") -> str | None:
    per_device, steps = training.get("per_device_train_batch_size"), training.get("gradient_accumulation_steps", 1)
    return None if per_device is None else f"{per_device}x{steps}" if steps != 1 else str(per_device)


def _plain(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _attempt(attempt: "Attempt") -> tuple[object, ...]:
    began, ended = unix(attempt.get("started_at")), unix(attempt.get("ended_at"))
    took = duration(ended - began) if began is not None and ended is not None else "-"
    failure = attempt.get("failure_code")
    why = one_line(f"{failure}: {attempt.get('failure_message') or ''}") if failure else None
    start = attempt.get("start_step")
    return str(attempt.get("no")), attempt.get("state"), attempt.get("node"), attempt.get("device"), start, took, why


@app.command("cancel")
def cancel(jobs: PLURAL, as_json: Json = False, quiet: Quiet = False) -> None:
    """Cancel jobs that have not ended. What was trained so far is not published."""
    api = config.client()
    cancelled = [api.cancel_job(refs.job(api, job)["id"]) for job in jobs]
    if as_json:
        json_out(cancelled[0] if len(cancelled) == 1 else cancelled)
        return
    for job in cancelled:
        data(job["id"])
        if not quiet:
            with contextlib.suppress(BrokenPipeError):
                done(f"{job['id']} is {state_of(job)}")


@app.command("why")
def why(job: JobRef, as_json: Json = False) -> None:
    """Say why a job waits, when it will start, and what would help."""
    found = refs.job(config.client(), job)
    wait = found.get("tunery", {}).get("queue")
    if as_json:
        json_out(wait)
        return
    state = state_of(found)
    if wait is None:
        say(f"{found['id']} is {state}: it does not wait for GPUs")
        return
    limit = found.get("tunery", {}).get("scheduling", {}).get("limit_s")
    rows = [
        ("job", found["id"]),
        ("waits", (wait.get("reason") or {}).get("message")),
        ("place", place_of(wait)),
        (
            "starts",
            starts_in(wait.get("estimated_start"))
            or unknown(
                (wait.get("reason") or {}).get("code"), "not known yet: the scheduler forecasts every half minute"
            ),
        ),
        ("asked for", asked_of(found)),
        ("time limit", duration(limit) if limit else None),
    ]
    fields(rows)
    for advice in wait.get("advice") or []:
        first, *rest = wrapped(clean(advice), max(console().width - 4, 40))
        data("\n".join([f"  - {first}", *(f"    {line}" for line in rest)]))


def unknown(code: str | None, otherwise: str) -> str:
    """When it starts, where no time is told."""
    if code in ("too_large", "no_such_place", "no_node", "unavailable", "blocked"):
        return "not before that changes"
    return otherwise


@app.command("priority")
def priority(
    job: JobRef,
    value: Annotated[int, typer.Argument(metavar="N", min=-100, max=100, help="Higher first; 0 is usual.")],
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Move a job before or behind your project's other waiting jobs."""
    api = config.client()
    changed = api.set_priority(refs.job(api, job)["id"], value)
    if as_json:
        json_out(changed)
        return
    data(changed["id"])
    if not quiet:
        done(f"{changed['id']} has priority {value}")


@app.command("delete")
def delete(jobs: PLURAL, as_json: Json = False) -> None:
    """Delete jobs that have ended: events, checkpoints, logs. What they published stays."""
    api = config.client()
    deleted = [api.delete_job(refs.job(api, job)["id"]) for job in jobs]
    if as_json:
        json_out(deleted)
        return
    for answer in deleted:
        data(answer["id"])
    done("deleted")


@app.command("checkpoints")
def checkpoints(job: JobRef, as_json: Json = False, quiet: Quiet = False) -> None:
    """List the checkpoints of a job."""
    api = config.client()
    rows = list(api.checkpoints(refs.job(api, job)["id"]))
    if as_json:
        json_out(rows)
    elif quiet:
        for row in rows:
            data(row["id"])
    elif rows:
        table(("ID", "STEP", "TRAIN LOSS", "EVAL LOSS", "MADE"), [_checkpoint(row) for row in rows])
    else:
        say("no checkpoints yet: one is saved every 10 minutes, or as --save-steps says")


def _checkpoint(row: "Checkpoint") -> tuple[object, ...]:
    metrics = row.get("metrics") or {}
    valid = metrics.get("full_valid_loss", metrics.get("valid_loss"))
    made = ago(row.get("created_at"))
    return row["id"], row.get("step_number"), number(metrics.get("train_loss")), number(valid), made
