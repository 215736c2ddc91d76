"""What a watcher sees: one live line, and above it whatever happened. Without a terminal, lines only."""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tunery.cli.failures import Exit, Failure, explain
from tunery.cli.jobs import progress_of, starts_in, state_of
from tunery.cli.progress import Milestones
from tunery.cli.show import STATE_COLOUR, clock, duration, number, rate, short_id, size
from tunery.cli.terminal import clean, console, done, one_line, paint, say

if TYPE_CHECKING:
    from rich.text import Text

    from tunery.client.shapes import Event, Job, Progress

BAR = 22
SHOWN_SAMPLES = 3


@dataclass
class Seen:
    """What the end is told from."""

    evals: dict[str, dict[str, Any]] = field(default_factory=dict)
    samples: dict[int, dict[str, str]] = field(default_factory=dict)


class PlainView:
    """Lines: states, phases and results as they come; progress at each tenth or every 30 s."""

    def __init__(self) -> None:
        self.seen = Seen()
        self._told: tuple[object, ...] = ()
        self._milestones = Milestones()

    def update(self, job: "Job", events: "Sequence[Event]") -> None:
        for event in events:
            line = told(event, self.seen)
            if line:
                self.say(line)
        queue = job.get("tunery", {}).get("queue") or {}
        now = (state_of(job), (queue.get("reason") or {}).get("code"))
        if now != self._told:
            self._told = now
            self.say(entry(None, state_of(job), waiting_for(job), STATE_COLOUR.get(state_of(job))))
        self.progress(job)

    def say(self, line: str) -> None:
        say(line)

    def progress(self, job: "Job") -> None:
        progress = progress_of(job)
        if state_of(job) == "running" and progress.get("total_steps") and self._milestones.due(percent(progress)):
            say("  ".join(["        ", f"{percent(progress):3.0f}%", *measures(progress)]))


class LiveView(PlainView):
    """The same lines, printed above one that is redrawn."""

    def __init__(self) -> None:
        from rich.live import Live
        from rich.spinner import Spinner

        super().__init__()
        self._console = console(err=True)
        self._job: Job | None = None
        self._spinner = Spinner("dots", style="cyan")
        self.live = Live(
            console=self._console,
            get_renderable=self._line,
            transient=True,
            refresh_per_second=8,
            redirect_stdout=False,
        )

    def say(self, line: str) -> None:
        from rich.text import Text

        self._console.print(Text.from_ansi(line), soft_wrap=True)

    def progress(self, job: "Job") -> None:
        self._job = job

    def _line(self) -> "Text":
        from rich.text import Text

        if self._job is None:
            return Text("")
        spin = self._spinner.render(time.monotonic())
        return live_line(self._job, self._console.width - 1, spin if isinstance(spin, Text) else Text(""))


@contextmanager
def view(*, animated: bool) -> Iterator[PlainView]:
    if not animated:
        yield PlainView()
        return
    screen = LiveView()
    with screen.live:
        yield screen


def live_line(job: "Job", width: int, spin: "Text") -> "Text":
    """Made to fit: what matters least leaves first, so that it never wraps."""
    from rich.text import Text

    line = Text("")
    state, progress = state_of(job), progress_of(job)
    running = state == "running" and bool(progress.get("total_steps"))
    for bar_width, with_id, with_eval in _SHAPES:
        head = Text.assemble(spin, " ")
        if with_id:
            head.append(f"{short_id(job['id'])} ", "bold")
        head.append(state, STATE_COLOUR.get(state, ""))
        parts = _running_parts(progress, bar_width, with_eval) if running else _waiting_parts(job, progress)
        line = Text("  ").join([head, *parts])
        if line.cell_len <= width:
            break
    line.truncate(width, overflow="ellipsis")
    return line


_SHAPES = ((BAR, True, True), (10, True, True), (10, False, True), (10, False, False), (0, False, False))
"""Width of the bar, the job's id, the evaluation: given up in this order. Step, loss, speed and time left stay."""


def _running_parts(progress: "Progress", bar_width: int, with_eval: bool) -> "list[Text]":
    from rich.text import Text

    step, *rest = [part for part in measures(progress) if with_eval or not part.startswith("eval")]
    drawn = [*bar(percent(progress), bar_width), " "] if bar_width else []
    parts = [Text.assemble(f"{step} ", *drawn, f"{percent(progress):.0f}%")]
    phase = progress.get("phase")
    if phase and phase != "training":
        parts.insert(0, Text(phase, style="cyan"))
    return parts + [Text(part) for part in rest]


def _waiting_parts(job: "Job", progress: "Progress") -> "list[Text]":
    from rich.text import Text

    waits = waiting_for(job) or progress.get("phase")
    return [Text(one_line(waits), style="dim")] if waits else []


def bar(done_percent: float, width: int) -> list[tuple[str, str]]:
    halves = round(min(100.0, max(0.0, done_percent)) / 100 * width * 2)
    full, half = divmod(halves, 2)
    return [("━" * full + "╸" * half, "green"), ("━" * (width - full - half), "bright_black")]


def percent(progress: "Progress") -> float:
    total = progress.get("total_steps") or 0
    return progress.get("percent", 100 * progress.get("step", 0) / total if total else 0.0)


def measures(progress: "Progress") -> list[str]:
    shown = [f"step {progress.get('step', 0):,}/{progress.get('total_steps', 0):,}"]
    if progress.get("loss") is not None:
        shown.append(f"loss {number(progress.get('loss'))}")
    if progress.get("eval_loss") is not None:
        shown.append(f"eval {number(progress.get('eval_loss'))}")
    shown += [speed] if (speed := rate(progress.get("tokens_per_second"))) else []
    left = progress.get("eta_seconds")
    return [*shown, f"ETA {duration(left)}"] if left is not None else shown


def waiting_for(job: "Job") -> str:
    queue = job.get("tunery", {}).get("queue") or {}
    if state_of(job) not in ("queued", "paused") or not queue:
        return ""
    position, starts = queue.get("position"), starts_in(queue.get("estimated_start"))
    told = [f"position {position}"] if position else []
    told += [f"starts {starts}"] if starts else []
    return ": ".join(part for part in (", ".join(told), (queue.get("reason") or {}).get("message")) if part)


def entry(moment: float | None, word: str, rest: str, colour: str | None = None) -> str:
    return f"{paint(clock(moment), dim=True)}  {paint(f'{word:<10}', colour)}  {clean(rest)}".rstrip()


def told(event: "Event", seen: Seen) -> str | None:
    """One line for an event, or none: steps are in the live line, and answers wait for the end."""
    content, moment = event.get("data") or {}, event.get("created_at")
    kind = content.get("kind")
    if kind == "sample":
        sample = seen.samples.setdefault(int(content.get("index", 0)), {})
        sample.update({name: str(content[name]) for name in ("prompt", "expected") if name in content})
        sample[str(content.get("model"))] = str(content.get("output", ""))
        return None
    if event.get("type") == "metrics" and kind is None:
        return None
    if kind == "phase":
        return entry(moment, "phase", str(content.get("phase")))
    if kind == "eval":
        values = content.get("values") or {}
        seen.evals[str(content.get("when"))] = values
        return entry(moment, "eval", f"{content.get('when')} training  {evaluated(values)}", "cyan")
    if kind == "checkpoint":
        return entry(moment, "saved", f"checkpoint at step {content.get('step')}")
    level = event.get("level", "info")
    return entry(moment, level, one_line(event.get("message", ""), 300), {"warn": "yellow", "error": "red"}.get(level))


def evaluated(values: dict[str, Any]) -> str:
    names = {"eval/loss": "loss", "eval/exact_match": "exact match", "eval/mean_token_accuracy": "token accuracy"}
    return "  ".join(f"{names[name]} {metric(name, value)}" for name, value in values.items() if name in names)


def metric(name: str, value: Any) -> str:
    """Shares as percentages, losses as they are."""
    if name == "eval/loss" or not isinstance(value, int | float) or not math.isfinite(value):
        return number(value)
    return f"{100 * value:.1f}%"


def conclude(job: "Job", seen: Seen) -> None:
    """How it ended, what came of it, and what to do next."""
    state = state_of(job)
    if state == "failed":
        explain(failed(job))
        return
    began, ended = job.get("created_at"), job.get("finished_at")
    took = f" in {duration(ended - began)}" if began and ended else ""
    if state != "succeeded":
        say(f"{paint('–', 'yellow', bold=True)} {job['id']} {state}{took}")
        return
    _answers(seen)
    done(f"{job['id']} succeeded{took}")
    gained = gains(seen)
    adapter = job.get("tunery", {}).get("adapter") or {}
    name = adapter.get("name")
    version = f"   ({name} v{adapter.get('version')}, {size(adapter.get('bytes'))})" if name else ""
    if gained:
        say(f"  result   {gained}")
    say(f"  adapter  {clean(job.get('fine_tuned_model') or adapter.get('model_name') or '-')}{clean(version)}")
    if name:
        say(f"  next     tunery adapters download {clean(name)}")


def gains(seen: Seen) -> str:
    before, after = seen.evals.get("before", {}), seen.evals.get("after", {})
    names = {"eval/loss": "eval loss", "eval/exact_match": "exact match"}
    both = [name for name in names if name in before and name in after]
    return "   ".join(f"{names[name]} {metric(name, before[name])} → {metric(name, after[name])}" for name in both)


def _answers(seen: Seen) -> None:
    whole = [sample for _, sample in sorted(seen.samples.items()) if "base" in sample and "tuned" in sample]
    for sample in whole[:SHOWN_SAMPLES]:
        say(f"\n  {paint(one_line(sample.get('prompt', '')), bold=True)}")
        for name, colour in (("expected", None), ("base", None), ("tuned", "green")):
            say(f"    {paint(f'{name:<8}', dim=True)}  {paint(one_line(sample.get(name, '')), colour)}")
    if whole:
        say()


def failed(job: "Job") -> Failure:
    from tunery.states import POLICY, FailureCode

    error = job.get("error") or {}
    code = error.get("code") or "failed"
    known = POLICY.get(FailureCode(code)) if code in list(FailureCode) else None
    why = [line for line in (error.get("message") or "the server gave no reason").splitlines() if line.strip()]
    if error.get("param"):
        why.append(f"parameter: {error.get('param')}")
    return Failure(
        f"{job['id']} failed",
        why=why,
        fix=f"{known.fix if known else 'Look at the log and submit it again.'}  Log: tunery jobs logs {job['id']}",
        code=code,
        exit_code=Exit.JOB_FAILED,
        request_id=job["id"],
        reference="job",
    )
