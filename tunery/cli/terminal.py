"""What goes where: data on stdout, everything for people on stderr, and decoration only for a real terminal."""

import os
import sys
from typing import TYPE_CHECKING, Any, TextIO

import typer

if TYPE_CHECKING:
    from rich.console import Console

_CONTROL = {code: None for code in [*range(0x20), *range(0x7F, 0xA0)] if chr(code) not in "\t\n"}


def decorated(stream: TextIO) -> bool:
    """Colour and animation are for a person at a terminal, and only for one who has not said no."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("CI") or os.environ.get("TERM") == "dumb"
    return stream.isatty() and not plain


def data(text: str) -> None:
    """A result: stdout."""
    typer.echo(text)


def say(text: str = "") -> None:
    """A hint, a state, a progress line: stderr."""
    typer.echo(text, err=True)


def json_out(document: Any) -> None:
    import json

    typer.echo(json.dumps(document, indent=2, ensure_ascii=False))


def json_line(document: Any) -> None:
    import json

    typer.echo(json.dumps(document, ensure_ascii=False))


def paint(text: str, fg: str | None = None, *, bold: bool = False, dim: bool = False, out: bool = False) -> str:
    """For stderr, or for stdout with `out`; unchanged where that stream is not decorated."""
    if not (fg or bold or dim) or not decorated(sys.stdout if out else sys.stderr):
        return text
    return typer.style(text, fg=fg, bold=bold or None, dim=dim or None)


def done(text: str) -> None:
    say(f"{paint('✓', 'green', bold=True)} {text}")


def clean(text: object) -> str:
    """Text that others wrote (names, messages, model output) must not steer the reader's terminal."""
    return str(text).translate(_CONTROL)


def one_line(text: object, width: int = 100) -> str:
    flat = " ".join(clean(text).split())
    return flat if len(flat) <= width else flat[: width - 1] + "…"


def console(*, err: bool = False) -> "Console":
    """Rich, told the same rules. Off a terminal nothing is wrapped or cut: width is the reader's business."""
    from rich.console import Console

    live = decorated(sys.stderr if err else sys.stdout)
    tty = (sys.stderr if err else sys.stdout).isatty()
    return Console(
        stderr=err,
        force_terminal=live,
        no_color=not live,
        color_system="auto" if live else None,
        highlight=False,
        markup=False,
        emoji=False,
        width=None if tty else 10_000,
    )


def utf8_or_replace() -> None:
    """A terminal that cannot show a character gets a `?`, never a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # pyright: ignore[reportAttributeAccessIssue]
