"""What the supervisor says: progress, and the children's log lines with a coloured name before each."""

import os
import sys
from pathlib import Path
from typing import TextIO

_COLOURS = {"api": 36, "scheduler": 35, "node": 32, "postgres": 34, "valkey": 31, "s3": 33, "tunery": 1}
_LARGEST_READ = 256 * 1024


def wants_colour(stream: TextIO) -> bool:
    environ = os.environ
    return stream.isatty() and not environ.get("NO_COLOR") and not environ.get("CI") and environ.get("TERM") != "dumb"


class Console:
    """Everything goes to stderr: stdout is for data."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stderr
        self.colour = wants_colour(self.stream)

    def say(self, text: str, name: str = "tunery") -> None:
        label = f"{name:<9} "
        if self.colour:
            label = f"\x1b[{_COLOURS.get(name, 0)}m{label}\x1b[0m"
        lines = "".join(f"{label}| {line}\n" for line in text.splitlines() or [""])
        self._write(lines)

    def plain(self, text: str) -> None:
        self._write(text + "\n")

    def _write(self, text: str) -> None:
        try:
            self.stream.write(text)
            self.stream.flush()
        except (BrokenPipeError, ValueError):  # a closed terminal is no reason to stop serving
            pass


class Tail:
    """New lines of one log file, by name: rotation truncates the file, and reading then begins anew."""

    def __init__(self, name: str, path: Path, lines: int = 0) -> None:
        self.name, self.path = name, path
        self._rest = b""
        self._offset = self._size()
        self.last = self._last(lines) if lines else []

    def rewind(self) -> None:
        """Read from the beginning."""
        self._offset, self._rest = 0, b""

    def read(self) -> list[str]:
        size = self._size()
        if size < self._offset:
            self._offset, self._rest = 0, b""
        if size == self._offset:
            return []
        with self.path.open("rb") as file:
            file.seek(self._offset)
            chunk = file.read(_LARGEST_READ)
        self._offset += len(chunk)
        *whole, self._rest = (self._rest + chunk).split(b"\n")
        return [line.decode(errors="replace") for line in whole]

    def _last(self, lines: int) -> list[str]:
        if self._offset == 0:
            return []
        with self.path.open("rb") as file:
            file.seek(max(0, self._offset - _LARGEST_READ))
            text = file.read(self._offset - file.tell()).decode(errors="replace")
        return text.splitlines()[-lines:]

    def _size(self) -> int:
        try:
            return self.path.stat().st_size
        except FileNotFoundError:
            return 0
