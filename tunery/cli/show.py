"""Tables, field lists, and numbers as people read them."""

import textwrap
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from itertools import pairwise
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


WHOLE = ("ID", "STATE", "STATUS", "VERSION", "POS", "STARTS IN")
"""Columns that say nothing when cut; numbers, which stand at the right, do not either."""
_LEAST, _ID = 8, 33
"""A column is cut to so many letters, and the first one, which holds an id or a name, to an id's length."""
_GAP = 2
_READABLE = 60
"""So much of a sentence has to be seen."""


def table(
    headers: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    right: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> None:
    """Aligned columns. Where they do not fit, long texts are cut, then columns are left out from the right, and named.

    `notes`: a line below each row that has one, cut where it has to be; there are as many as rows, or none.
    """
    from rich.cells import cell_len

    cells = [[_flat(cell) for cell in row] for row in rows]
    natural = [max([cell_len(text) for text in column]) for column in zip(headers, *cells, strict=True)]
    least = [
        min(wide, _ID) if place == 0 else wide if head in WHOLE or head in right else min(wide, max(len(head), _LEAST))
        for place, (head, wide) in enumerate(zip(headers, natural, strict=True))
    ]
    room = console().width
    widths = _fitted(natural, least, room)
    terminal.data(_line(headers, headers, widths, right, header=True))
    for number, row in enumerate(cells):
        terminal.data(_line(headers, row, widths, right))
        if notes and notes[number]:
            terminal.data(terminal.paint(f"    {terminal.one_line(notes[number], room - 4)}", dim=True, out=True))
    if left_out := [head for head in headers[len(widths) :] if head]:
        say(f"no room for {', '.join(left_out)}: --json has everything, and so has a wider terminal")


def last_below(headers: Sequence[str], rows: Sequence[Sequence[object]], *, right: Sequence[str] = ()) -> None:
    """A table whose last column is what people came for: where it has no room beside the rest, it stands below.

    There it is said once where it is the same for several rows in a row.
    """
    cells = [[_flat(cell) for cell in row] for row in (headers, *rows)]
    widths = [max(len(row[place]) for row in cells) for place in range(len(headers))]
    if console().width - sum(widths[:-1]) - _GAP * (len(headers) - 1) >= min(_READABLE, widths[-1]):
        table(headers, rows, right=right)
        return
    told = [row[-1] for row in cells]
    notes = [note if note != before else "" for before, note in pairwise(told)]
    table(headers[:-1], [row[:-1] for row in rows], right=right, notes=notes)
    if not all(notes):
        say("nothing below a line: the same as above it")


def _fitted(natural: Sequence[int], least: Sequence[int], room: int) -> list[int]:
    """The widths of as many columns as there is room for: what is widest gives way first."""
    for shown in range(len(natural), 0, -1):
        widths = list(natural[:shown])
        while sum(widths) + _GAP * (shown - 1) > room:
            widest = max(range(shown), key=lambda place: (widths[place] > least[place], widths[place]))
            if widths[widest] <= least[widest]:
                break
            widths[widest] -= 1
        else:
            return widths
    return list(least[:1])


def _line(
    headers: Sequence[str], cells: Sequence[str], widths: Sequence[int], right: Sequence[str], *, header: bool = False
) -> str:
    from rich.cells import cell_len, set_cell_size

    shown: list[str] = []
    for head, cell, width in zip(headers, cells, widths, strict=False):
        text = cell if cell_len(cell) <= width else set_cell_size(cell, width - 1) + "…"
        fill = " " * (width - cell_len(text))
        if header:
            painted = terminal.paint(text, dim=True, out=True)
        else:
            painted = terminal.paint(text, STATE_COLOUR.get(cell), out=True)
        shown.append(fill + painted if head in right else painted + fill)
    return (" " * _GAP).join(shown).rstrip()


def _flat(cell: object) -> str:
    return "-" if cell is None else " ".join(clean(cell).split())


def fields(pairs: Iterable[tuple[str, object]]) -> None:
    """`name  value`, one a line, aligned; what is unknown is left out. A long value goes on below itself."""
    known = [(name, clean(value)) for name, value in pairs if value not in (None, "")]
    width = max((len(name) for name, _ in known), default=0)
    room = max(console().width - width - _GAP, _ID)
    for name, value in known:
        colour = STATE_COLOUR.get(value.split(" ")[0]) if name == "state" else None
        first, *rest = wrapped(value, room)
        label = terminal.paint(name.ljust(width), dim=True, out=True)
        terminal.data(f"{label}  {terminal.paint(first, colour, out=True)}")
        for line in rest:
            terminal.data(f"{' ' * (width + _GAP)}{line}")


def wrapped(text: str, room: int) -> list[str]:
    """Between words; a word that is longer than `room`, such as an id, stays whole."""
    if len(text) <= room:
        return [text]
    return textwrap.wrap(text, room, break_long_words=False, break_on_hyphens=False) or [""]


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
    below: bool = False,
) -> None:
    """What every `list` command prints: the API's objects, ids alone, a table, or how to start. `below`: see there."""
    if as_json:
        json_out(rows)
    elif quiet:
        for one in rows:
            data(one["id"])
    elif rows:
        (last_below if below else table)(headers, [row(one) for one in rows], right=right)
    else:
        say(empty)
