"""Following jobs: `watch`, `wait`, `events`, `logs`. Ctrl-C leaves; it never stops a job."""

import itertools
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from tunery.cli import config, refs
from tunery.cli.failures import Exit, Failure
from tunery.cli.jobs import PLURAL, state_of
from tunery.cli.options import JobRef, Json, Quiet
from tunery.cli.show import clock
from tunery.cli.terminal import clean, data, decorated, json_line, json_out, paint, say
from tunery.states import TERMINAL

if TYPE_CHECKING:
    from tunery.client import Client
    from tunery.client.shapes import Event, Job, LogChunk

POLL_S = 1.0
PATIENCE_S = 300.0
"""A server that is away for less than this (an upgrade, a cut line) does not end a watch."""
LOOK_BACK = 300
"""A watch that begins late shows what is among this many newest events."""


def register(app: typer.Typer) -> None:
    app.command("watch")(watch)
    app.command("wait")(wait)
    app.command("events")(events)
    app.command("logs")(logs)


def watch(
    job: JobRef,
    exit_status: Annotated[
        bool, typer.Option("--exit-status", help="Exit 3 if the job fails, 10 if it is cancelled.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Follow a job with live progress until it ends. Ctrl-C detaches; the job continues."""
    api = config.client()
    ended = follow(api, refs.job(api, job)["id"], live=True)
    if as_json:
        json_out(ended)
    if exit_status:
        raise typer.Exit(outcome(ended))


def wait(
    jobs: PLURAL,
    timeout: Annotated[str | None, typer.Option(metavar="2h", help="Give up after so long: exit 8.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Wait until jobs have ended. Exit 0 only if all succeeded, 3 if one failed, 10 if one was cancelled."""
    deadline = time.monotonic() + seconds(timeout) if timeout else None
    api = config.client()
    ids = list(dict.fromkeys(refs.job(api, job)["id"] for job in jobs))
    with detaching(" ".join(ids)):
        ended = [_until_ended(api, job_id, deadline, quiet) for job_id in ids]
    if as_json:
        json_out(ended)
    else:
        for job in ended:
            data(job["id"] if quiet else f"{job['id']}  {state_of(job)}")
    codes = {outcome(job) for job in ended} - {Exit.OK}
    raise typer.Exit(min(codes, default=Exit.OK))


def outcome(job: "Job") -> Exit:
    return {"failed": Exit.JOB_FAILED, "cancelled": Exit.JOB_CANCELLED}.get(state_of(job), Exit.OK)


def follow(api: "Client", job_id: str, *, live: bool, quiet: bool = False) -> "Job":
    """Until the job has ended; what is seen on the way goes to stderr."""
    from tunery.cli import watch_view

    with detaching(job_id):
        if not live:
            ended = _until_ended(api, job_id, None, quiet)
            if not quiet:
                watch_view.conclude(ended, watch_view.Seen())
            return ended
        feed = Feed(api, job_id)
        with watch_view.view(animated=decorated(sys.stderr)) as screen:
            ended = poll(api, job_id, lambda job: screen.update(job, feed.new()))
        watch_view.conclude(ended, screen.seen)
        return ended


def poll(api: "Client", job_id: str, look: "Callable[[Job], None]", deadline: float | None = None) -> "Job":
    """Shows the job to `look` again and again; the last one, which is returned, has ended."""
    from tunery.client.errors import ServerError, Unreachable

    away_since: float | None = None
    while True:
        try:
            job = api.job(job_id)
        except (Unreachable, ServerError) as error:
            if away_since is None:
                away_since = time.monotonic()
                say(paint(f"{clock(None)}  {error}; the job is not affected, trying again", dim=True))
            elif time.monotonic() - away_since > PATIENCE_S:
                raise
        else:
            away_since = None
            look(job)
            if state_of(job) in TERMINAL:
                return job
        if deadline is not None and time.monotonic() >= deadline:
            raise _timed_out(job_id)
        time.sleep(POLL_S)


def _until_ended(api: "Client", job_id: str, deadline: float | None, quiet: bool) -> "Job":
    told: list[str] = []

    def look(job: "Job") -> None:
        if not quiet and [state_of(job)] != told:
            told[:] = [state_of(job)]
            say(f"{clock(None)}  {job_id}  {state_of(job)}")

    return poll(api, job_id, look, deadline)


def _timed_out(job_id: str) -> Failure:
    return Failure(
        f"{job_id} has not ended yet",
        why="the time given with --timeout is over; the job continues",
        fix=f"tunery jobs wait {job_id}",
        code="wait_timeout",
        exit_code=Exit.WAIT_TIMEOUT,
        request_id=job_id,
        reference="job",
    )


@contextmanager
def detaching(job_id: str) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        say(f"\ndetached; the job continues: `tunery jobs cancel {job_id}` to stop it")
        raise typer.Exit(Exit.INTERRUPTED) from None


class Feed:
    """New events since the last look, oldest first. The API lists newest first and has no `since`."""

    def __init__(self, api: "Client", job_id: str, look_back: int = LOOK_BACK) -> None:
        self._api = api
        self._look_back = look_back
        self._job_id = job_id
        self._newest: str | None = None

    def new(self) -> "list[Event]":
        from tunery.client.errors import ServerError, Unreachable

        fresh: list[Event] = []
        try:
            rows = self._api.events(self._job_id)
            for event in rows if self._newest else itertools.islice(rows, self._look_back):
                if event["id"] == self._newest:
                    break
                fresh.append(event)
        except (Unreachable, ServerError):
            return []  # nothing is lost: the next look begins at the same event
        if fresh:
            self._newest = fresh[0]["id"]
        return fresh[::-1]


def events(
    job: JobRef,
    following: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job has ended.")] = False,
    number: Annotated[int, typer.Option("-n", min=1, help="The newest so many.")] = 50,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON array; with --follow, one object per line.")
    ] = False,
) -> None:
    """Print a job's events, oldest first."""
    api = config.client()
    job_id = refs.job(api, job)["id"]
    if not following:
        rows = list(itertools.islice(api.events(job_id, page_size=min(number, 100)), number))[::-1]
        if as_json:
            json_out(rows)
        else:
            _print_events(rows)
        return
    with detaching(job_id):
        feed = Feed(api, job_id, look_back=number)
        show = _print_lines if as_json else _print_events
        poll(api, job_id, lambda _: show(feed.new()))


def _print_lines(rows: "list[Event]") -> None:
    for event in rows:
        json_line(event)


def _print_events(rows: "list[Event]") -> None:
    for event in rows:
        level = event.get("level", "info")
        colour = {"warn": "yellow", "error": "red"}.get(level)
        shown = paint(f"{level:<5}", colour, dim=level == "info", out=True)
        data(f"{paint(clock(event.get('created_at')), dim=True, out=True)}  {shown}  {clean(event.get('message', ''))}")


def logs(
    job: JobRef,
    following: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job has ended.")] = False,
    number: Annotated[int | None, typer.Option("-n", min=0, help="The last so many lines.")] = None,
    attempt: Annotated[int | None, typer.Option(min=1, help="Which attempt; else the newest.")] = None,
    as_json: Json = False,
) -> None:
    """Print what the trainer printed."""
    api = config.client()
    found = refs.job(api, job)
    first = _log_so_far(api, found["id"], attempt)
    if as_json:
        json_out(first)
        return
    text = first.get("text", "")
    if number is not None:
        text = "".join(text.splitlines(keepends=True)[-number:] if number else [])
    _write(text)
    if following:
        with detaching(found["id"]):
            _follow_log(api, found["id"], first, pinned=attempt is not None)
    elif not first.get("text"):
        say(f"no log yet: the job is {state_of(found)}")


def _log_so_far(api: "Client", job_id: str, attempt: int | None, offset: int = 0) -> "LogChunk":
    """All pieces from `offset` to the present end, as one."""
    from tunery.client.errors import NotFound

    whole: LogChunk = {"object": "tunery.log", "offset": offset, "next_offset": offset, "text": "", "complete": False}
    parts: list[str] = []
    while True:
        try:
            piece = api.log(job_id, attempt=attempt, offset=whole.get("next_offset", 0))
        except NotFound:
            # No attempt has started. One that was asked for by number has to exist.
            if attempt is not None:
                raise
            return whole
        parts.append(piece.get("text", ""))
        attempt = attempt or piece.get("attempt")
        moved = piece.get("next_offset", 0) > whole.get("next_offset", 0)
        whole |= {"next_offset": piece.get("next_offset", 0), "complete": piece.get("complete", False)}
        if attempt is not None:
            whole["attempt"] = attempt
        if not moved or whole.get("complete"):
            whole["text"] = "".join(parts)
            return whole


def _follow_log(api: "Client", job_id: str, last: "LogChunk", *, pinned: bool) -> None:
    """To the end of the job, across attempts: one that was lost is followed by the next."""

    def look(job: "Job") -> None:
        nonlocal last
        current = last.get("attempt")
        if not last.get("complete"):
            last = _log_so_far(api, job_id, current, last.get("next_offset", 0))
            _write(last.get("text", ""))
        newest = max((found.get("no", 0) for found in job.get("tunery", {}).get("attempts") or []), default=0)
        if last.get("complete") and not pinned and newest > (current or 0):
            say(paint(f"-- attempt {newest} --", dim=True))
            last = _log_so_far(api, job_id, newest)
            _write(last.get("text", ""))

    if not (pinned and last.get("complete")):
        poll(api, job_id, look)


def _write(text: str) -> None:
    if text:
        sys.stdout.write(clean(text) if sys.stdout.isatty() else text)
        sys.stdout.flush()


_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400}


def seconds(text: str) -> float:
    """`90`, `90s`, `15m`, `2h`, `1h30m`."""
    pieces = re.findall(r"(\d+(?:\.\d+)?)([smhd]?)", text)
    if not pieces or "".join(number + unit for number, unit in pieces) != text.replace(" ", ""):
        raise typer.BadParameter(f"{text!r} is not a duration such as 90s, 15m or 2h", param_hint="--timeout")
    return sum(float(number) * _UNITS[unit] for number, unit in pieces)
