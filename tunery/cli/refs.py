"""From what was typed to one object: a whole id, the beginning of one, or `@last`."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, TypeVar

from tunery.cli.failures import Exit, Failure

if TYPE_CHECKING:
    from tunery.client import Client
    from tunery.client.shapes import File, Job

    T = TypeVar("T", Job, File)

SHOWN_MATCHES = 8


def job(api: "Client", ref: str) -> "Job":
    from tunery.client.errors import NotFound

    if ref == "@last":
        return _newest(api)
    try:
        return api.job(_typed(ref, "job"))
    except NotFound:
        match = _unique(ref, "ftjob-", api.jobs(page_size=100))
        if match is None:
            raise
    return api.job(match["id"])


def file(api: "Client", ref: str) -> "File":
    from tunery.client.errors import NotFound

    try:
        return api.file(_typed(ref, "file"))
    except NotFound:
        match = _unique(ref, "file-", api.files())
        if match is None:
            raise
        return match


def _newest(api: "Client") -> "Job":
    for newest in api.jobs(page_size=1):
        return api.job(newest["id"])
    raise Failure(
        "there is no last job",
        why="this project has no jobs yet",
        fix="tunery jobs create -m MODEL -t train.jsonl",
        code="no_jobs",
        exit_code=Exit.NOT_FOUND,
    )


def _typed(ref: str, noun: str) -> str:
    if ref.strip():
        return ref
    raise Failure(
        f"the {noun}'s id is empty",
        why="a variable in your command line may not be set",
        fix=f"tunery {noun}s list",
        code="empty_id",
        exit_code=Exit.USAGE,
    )


def _unique(ref: str, prefix: str, rows: "Iterable[T]") -> "T | None":
    matches = [row for row in rows if row["id"].startswith((ref, prefix + ref))]
    if len(matches) > 1:
        raise Failure(
            f"{ref!r} is the beginning of {len(matches)} ids",
            why=[row["id"] for row in matches[:SHOWN_MATCHES]],
            fix="Type more of the id.",
            code="ambiguous_id",
            exit_code=Exit.USAGE,
        )
    return matches[0] if matches else None
