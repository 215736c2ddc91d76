"""The line that a watcher sees, and numbers as people read them."""

from collections.abc import Iterator

import pytest
from rich.console import Console
from rich.text import Text

from tests.test_cli_server import event, job, progress
from tunery.cli import failures, show
from tunery.cli.failures import Exit, Failure
from tunery.cli.job_follow import seconds
from tunery.cli.show import ago, duration, number, parameters, rate, size
from tunery.cli.terminal import clean
from tunery.cli.watch_view import Seen, bar, live_line, told


@pytest.mark.parametrize("width", range(20, 140, 7))
def test_the_live_line_never_wraps(width: int) -> None:
    running = job(state="running", progress=progress(24, phase="evaluating"))
    assert live_line(running, width, Text("⠋")).cell_len <= width


def test_the_live_line_says_everything_where_there_is_room() -> None:
    line = live_line(job(state="running", progress=progress(24)), 140, Text("⠋")).plain
    assert "running  step 24/40 ━━━━━━━━━━━━━" in line
    assert line.endswith("60%  loss 2.000  eval 1.311  2.1k tok/s  ETA 1m 20s")
    queued = job(state="queued", queue={"reason": {"code": "busy", "message": "needs 1 GPU; 0 free"}, "position": 2})
    assert live_line(queued, 140, Text("⠋")).plain.endswith("queued  position 2: needs 1 GPU; 0 free")


@pytest.mark.parametrize("percent", [-1, 0, 0.1, 33.3, 50, 99.9, 100, 250])
def test_the_bar_keeps_its_length(percent: float) -> None:
    assert sum(len(text) for text, _ in bar(percent, 22)) == 22


def test_values_that_are_no_numbers_are_shown_as_they_are() -> None:
    diverged = progress(24) | {"loss": "NaN", "tokens_per_second": "Infinity", "eta_seconds": None}
    line = live_line(job(state="running", progress=diverged), 140, Text("⠋")).plain
    assert "loss nan" in line
    values = {"eval/loss": "NaN", "eval/exact_match": "Infinity"}
    shown = told(event(1, kind="eval", when="after", values=values), Seen())
    assert shown is not None
    assert shown.endswith("loss nan  exact match inf")


def test_what_others_wrote_cannot_steer_the_terminal() -> None:
    shown = told(event(1, "\x1b[2J\x9b31mhello\r\x07"), Seen())
    assert shown is not None
    assert shown.endswith("[2J31mhello")
    assert clean("a\tb\nc\x1b") == "a\tb\nc"


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A terminal of 60 columns."""
    monkeypatch.setattr(show, "console", lambda: Console(width=60))
    yield


ROWS = [("a" * 33, "queued", "a long model name", "7"), ("b" * 40, "cancelled", "x", "12,000")]


def test_a_narrow_table_cuts_what_may_be_cut_and_says_what_it_left_out(
    narrow: None, capsys: pytest.CaptureFixture[str]
) -> None:
    show.table(("NAME", "STATE", "MODEL", "STEPS", "ID"), [(*row, "id-" * 5) for row in ROWS], right=("STEPS",))
    out, err = capsys.readouterr()
    head, first, second = out.splitlines()
    assert head == f"{'NAME':<33}  STATE      {'MODEL':<8}"[:60].rstrip()
    assert first == f"{'a' * 33}  queued     a long model …" and second == f"{'b' * 32}…  cancelled  x"
    assert err.startswith("no room for STEPS, ID:")


def test_notes_stand_below_their_rows(narrow: None, capsys: pytest.CaptureFixture[str]) -> None:
    show.table(("NAME", "STATE"), [row[:2] for row in ROWS], notes=["because " * 20, "so"])
    out = capsys.readouterr().out.splitlines()
    assert [line[:12] for line in out[2::2]] == ["    because ", "    so"] and len(out[2]) == 60


def test_a_reason_that_several_rows_share_is_said_once(narrow: None, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [("job-" + "x" * 30, "?", why * 30) for why in ("a ", "a ", "b ")]
    show.last_below(("JOB", "STARTS IN", "WHY"), rows)
    out, err = capsys.readouterr()
    assert [line[:5] for line in out.splitlines()] == ["JOB  ", "job-x", "    a", "job-x", "job-x", "    b"]
    assert "the same as above" in err


def test_long_values_go_on_below_themselves(narrow: None, capsys: pytest.CaptureFixture[str]) -> None:
    show.fields([("why", "needs this; " * 8), ("id", "x" * 70)])
    first, second, third = capsys.readouterr().out.splitlines()
    assert first.startswith("why  needs this;") and second.startswith("     ") and len(first) <= 60
    assert third == f"id   {'x' * 70}"


def test_an_error_is_folded_on_a_terminal_and_keeps_its_lines_elsewhere(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    long = Failure("word " * 30 + "end", why="because", fix="do it", code="odd", exit_code=Exit.OTHER)
    failures.explain(long)
    assert capsys.readouterr().err.splitlines()[0] == f"error: {'word ' * 30}end  [odd]"
    monkeypatch.setattr(failures, "_room", lambda: 60)
    failures.explain(long)
    lines = capsys.readouterr().err.splitlines()
    assert max(map(len, lines)) <= 60 and lines[0].startswith("error: word") and lines[1].startswith("       word")


def test_numbers_read_well() -> None:
    assert [size(n) for n in (None, 0, 999, 1000, 120_400, 999_999, 3.1e6, 5e12)] == [
        "-", "0 B", "999 B", "1.0 KB", "120 KB", "1.0 MB", "3.1 MB", "5.0 TB",
    ]  # fmt: skip
    assert [duration(n) for n in (0, 59.6, 80, 7500)] == ["0s", "1m 00s", "1m 20s", "2h 05m"]
    assert [parameters(n) for n in (0, 134_515_008, 8_030_000_000)] == ["-", "135M", "8.0B"]
    assert (number(None), number(1.2345), rate(None), rate(812), rate("NaN")) == ("-", "1.234", "", "812 tok/s", "")
    assert ago("2020-01-01T00:00:00Z").endswith("d ago")
    assert [seconds(text) for text in ("90", "90s", "15m", "1h30m")] == [90, 90, 900, 5400]
