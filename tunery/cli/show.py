"""Tables, field lists, and numbers as people read them."""

import time
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

from tunery.cli import terminal
from tunery.cli.terminal import clean, console, data, json_out, say

STATE_COLOUR = {
    "running": "cyan",
    "importing": "cyan",
    "succeeded": "green",
    "ready": "green",
    "processed": "green",
    "up": "green",
    "free": "green",
    "busy": "cyan",
    "drained": "bright_black",
    "cordoned": "yellow",
    "draining": "yellow",
    "unavailable": "bright_black",
    "dirty": "yellow",
    "unhealthy": "red",
    "silent": "red",
    "down": "bright_black",
    "failed": "red",
    "error": "red",
    "queued": "yellow",
    "validating": "yellow",
    "starting": "yellow",
    "pausing": "yellow",
    "paused": "yellow",
    "cancelling": "yellow",
    "cancelled": "bright_black",
}


WHOLE = ("STATE", "STATUS", "VERSION", "POS", "STARTS IN")
"""Columns that say nothing when cut."""


def table(headers: Sequence[str], rows: Iterable[Sequence[object]], *, right: Sequence[str] = ()) -> None:
    """The first column, an id or a name, and those of `WHOLE` are never cut; where it is narrow the others give way."""
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    for number, header in enumerate(headers):
        grid.add_column(
            header,
            no_wrap=True,
            overflow="fold" if number == 0 else "ellipsis",
            justify="right" if header in right else "left",
        )
    cells = [[clean("-" if cell is None else cell) for cell in row] for row in rows]
    for number, header in enumerate(headers):
        if number == 0 or header in WHOLE:
            grid.columns[number].min_width = max([len(header), *(len(row[number]) for row in cells)])
    for row in cells:
        grid.add_row(*(Text(cell, style=STATE_COLOUR.get(cell, "")) for cell in row))
    out = console()
    with out.capture() as captured:
        out.print(grid)
    for line in captured.get().splitlines():
        terminal.data(line.rstrip())


def fields(pairs: Iterable[tuple[str, object]]) -> None:
    """`name  value`, one a line, aligned; what is unknown is left out."""
    known = [(name, clean(value)) for name, value in pairs if value not in (None, "")]
    width = max((len(name) for name, _ in known), default=0)
    for name, value in known:
        colour = STATE_COLOUR.get(value.split(" ")[0])
        shown = terminal.paint(value, colour, out=True) if name == "state" else value
        terminal.data(f"{terminal.paint(name.ljust(width), dim=True, out=True)}  {shown}")


def ago(moment: int | float | str | None) -> str:
    """`3m ago`; a moment may be Unix seconds or RFC 3339."""
    seconds = unix(moment)
    if seconds is None:
        return "-"
    passed = time.time() - seconds
    if passed < 5:
        return "now" if passed > -60 else clock(seconds)
    for unit, length in (("d", 86_400), ("h", 3600), ("m", 60)):
        if passed >= length:
            return f"{int(passed // length)}{unit} ago"
    return f"{int(passed)}s ago"


def unix(moment: int | float | str | None) -> float | None:
    if moment is None or isinstance(moment, int | float):
        return moment
    try:
        return datetime.fromisoformat(moment).timestamp()
    except ValueError:
        return None


def clock(moment: int | float | None) -> str:
    when = datetime.fromtimestamp(moment, UTC) if moment is not None else datetime.now(UTC)
    return when.astimezone().strftime("%H:%M:%S")


def date(moment: int | float | str | None) -> str | None:
    seconds = unix(moment)
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).astimezone().strftime("%Y-%m-%d %H:%M")


def duration(seconds: float | None) -> str:
    """`45s`, `1m 20s`, `2h 05m`."""
    if seconds is None:
        return "-"
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    return f"{whole // 3600}h {whole % 3600 // 60:02d}m"


def size(count: float | None) -> str:
    """Decimal units, as the file manager shows them."""
    if count is None:
        return "-"
    for unit in ("B", "KB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 10 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def money(amount: float | None) -> str | None:
    """Two digits at least, four at most; the currency is the reader's own."""
    if amount is None:
        return None
    whole, _, rest = f"{amount:.4f}".partition(".")
    return f"{whole}.{rest[:2]}{rest[2:].rstrip('0')}"


def parameters(count: int | None) -> str:
    if not count:
        return "-"
    return f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.0f}M"


def number(value: float | str | None, digits: int = 3) -> str:
    """A metric; NaN and infinity travel as strings and are shown as they are."""
    if value is None:
        return "-"
    try:
        return f"{float(value):.{digits}f}"
    except ValueError:
        return str(value)


def rate(per_second: float | str | None) -> str:
    try:
        value = float(per_second or 0)
    except ValueError:
        return ""
    if not 0 < value < float("inf"):
        return ""
    return f"{value / 1000:.1f}k tok/s" if value >= 1000 else f"{value:.0f} tok/s"


def short_id(identifier: str) -> str:
    """For a line that has no room; the whole id is printed where it can be copied."""
    return identifier if len(identifier) <= 22 else identifier[:17] + "…"


def listing(
    rows: Sequence[Any],
    headers: Sequence[str],
    row: Callable[[Any], Sequence[object]],
    empty: str,
    *,
    right: Sequence[str] = (),
    as_json: bool,
    quiet: bool,
) -> None:
    """What every `list` command prints: the API's objects, ids alone, a table, or how to start."""
    if as_json:
        json_out(rows)
    elif quiet:
        for one in rows:
            data(one["id"])
    elif rows:
        table(headers, [row(one) for one in rows], right=right)
    else:
        say(empty)
