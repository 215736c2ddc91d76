"""Options that many commands share, so that they mean and read the same everywhere."""

from collections.abc import Iterable
from itertools import islice
from typing import Annotated, TypeVar

import typer

from tunery.cli.terminal import say

T = TypeVar("T")

Json = Annotated[bool, typer.Option("--json", help="Print the API's object as one JSON document.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print one id per line, nothing else.")]
Limit = Annotated[int, typer.Option("--limit", "-n", min=1, help="Show so many.")]
All = Annotated[bool, typer.Option("--all", "-a", help="Show all of them.")]
JobRef = Annotated[str, typer.Argument(metavar="JOB", help="A job's id, the beginning of one, or @last.")]
FileRef = Annotated[str, typer.Argument(metavar="FILE_ID", help="A file's id, or the beginning of one.")]


def group(help: str) -> typer.Typer:
    return typer.Typer(help=help, no_args_is_help=True, rich_markup_mode=None, add_completion=False)


def take(rows: Iterable[T], limit: int, everything: bool) -> list[T]:
    """The first `limit`; a list that was cut says so, on stderr."""
    if everything:
        return list(rows)
    found = list(islice(rows, limit + 1))
    if len(found) > limit:
        say(f"showing {limit}; there are more: --limit N or --all")
    return found[:limit]
