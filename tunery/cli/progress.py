"""How far a transfer is: a bar at a terminal, else one line per 10 % or 30 s."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tunery.cli.show import size
from tunery.cli.terminal import console, decorated, say

LINE_EVERY_S = 30.0


class Milestones:
    """Says when a line is due: at each further tenth, or after 30 s without one."""

    def __init__(self) -> None:
        self._tenth = -1
        self._last = 0.0

    def due(self, percent: float) -> bool:
        tenth = int(percent // 10)
        if tenth == self._tenth and time.monotonic() - self._last < LINE_EVERY_S:
            return False
        self._tenth, self._last = tenth, time.monotonic()
        return True


@contextmanager
def transfer(label: str, total: int) -> Iterator[Callable[[int, int], None]]:
    """Yields what the client calls with the bytes moved so far."""
    if decorated(sys.stderr):
        yield from _bar(label, total)
    else:
        yield _lines(label, total)


def _bar(label: str, total: int) -> Iterator[Callable[[int, int], None]]:
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(28),
        TaskProgressColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=console(err=True), transient=True) as progress:
        task = progress.add_task(label, total=total or None)
        yield lambda done, _total: progress.update(task, completed=done)


def _lines(label: str, total: int) -> Callable[[int, int], None]:
    milestones = Milestones()

    def on_bytes(done: int, _total: int) -> None:
        percent = 100 * done / total if total else 0
        if milestones.due(percent):
            say(f"{label}  {percent:3.0f}%  {size(done)} of {size(total)}")

    return on_bytes


@contextmanager
def waiting(text: str) -> Iterator[Callable[[str], None]]:
    """A spinner whose text can change; without a terminal, a line whenever the text does, or every 30 s."""
    if decorated(sys.stderr):
        with console(err=True).status(text, spinner_style="cyan") as status:
            yield lambda update: status.update(update)
        return
    say(text)
    last = [text, time.monotonic()]

    def tell(update: str) -> None:
        if update != last[0] or time.monotonic() - float(last[1]) >= LINE_EVERY_S:
            last[:] = [update, time.monotonic()]
            say(update)

    yield tell
