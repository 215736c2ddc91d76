"""Every error has four parts: what, why, fix, reference. And every kind has an exit code of its own."""

import errno
import shutil
import sys
import textwrap
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import TYPE_CHECKING, Any, NoReturn

import typer

from tunery.cli.terminal import clean, paint, say

if TYPE_CHECKING:
    from tunery.client.errors import APIError, TuneryError

DOCS = "docs/errors.md"
SHOWN_REASONS = 20


class Exit(IntEnum):
    OK = 0
    OTHER = 1
    USAGE = 2
    JOB_FAILED = 3
    DENIED = 4
    NOT_FOUND = 5
    INVALID = 6
    LIMITED = 7
    WAIT_TIMEOUT = 8
    UNREACHABLE = 9
    JOB_CANCELLED = 10
    INTERRUPTED = 130


class Failure(Exception):
    """What a command raises when it cannot go on."""

    def __init__(
        self,
        what: str,
        *,
        why: str | list[str],
        fix: str,
        code: str,
        exit_code: Exit,
        docs: str | None = None,
        request_id: str | None = None,
        reference: str = "request",
    ) -> None:
        super().__init__(what)
        self.what = what
        self.why = [why] if isinstance(why, str) else why
        self.fix = fix
        self.code = code
        self.exit_code = exit_code
        self.docs = docs or f"{DOCS}#{code}"
        self.request_id = request_id
        self.reference = reference


def explain(failure: Failure) -> None:
    room = _room()
    width, tag = min(room, 96), f"[{clean(failure.code)}]"
    *before, last = folded(f"error: {clean(failure.what)}", room, "       ")
    gap, shown = width - len(last) - len(tag), paint(tag, dim=True)
    last += " " * max(gap, 2) + shown if gap >= 2 or len(last) + 2 + len(tag) <= room else f"\n       {shown}"
    head = "\n".join([*before, last])
    say(f"{paint('error:', 'red', bold=True)}{head[6:]}")
    for reason in failure.why[:SHOWN_REASONS]:
        say("\n".join(folded(f"  {clean(reason)}", room, "  ")))
    if len(failure.why) > SHOWN_REASONS:
        say(f"  and {len(failure.why) - SHOWN_REASONS:,} more")
    fix = "\n".join(folded(f"fix:   {clean(failure.fix)}", room, "       "))
    say(f"{paint('fix:', 'green')}{fix[4:]}")
    docs, asked = f"docs:  {clean(failure.docs)}", f"{failure.reference}: {clean(failure.request_id)}"
    if failure.request_id:
        docs += f"     {asked}" if len(docs) + 5 + len(asked) <= room else f"\n       {asked}"
    say(paint(docs, dim=True))


def _room() -> int:
    """Columns of the terminal; elsewhere lines are as long as they are."""
    return shutil.get_terminal_size((96, 24)).columns if sys.stderr.isatty() else 10_000


def folded(text: str, room: int, indent: str) -> list[str]:
    """Lines of a text that is too long, the later ones indented. Nothing of it is lost, and no word is broken."""
    if len(text) <= room:
        return [text]
    options = {"break_long_words": False, "break_on_hyphens": False, "subsequent_indent": indent}
    return textwrap.wrap(text, max(room, 40), drop_whitespace=True, **options)


@contextmanager
def explained() -> Iterator[None]:
    """The edge of the program: whatever goes wrong inside leaves as four parts and an exit code."""
    try:
        yield
    except Failure as failure:
        _leave(failure)
    except KeyboardInterrupt:
        say("\ninterrupted")
        raise typer.Exit(Exit.INTERRUPTED) from None
    except OSError as error:
        if error.errno == errno.EPIPE:
            raise
        _leave(_from_os(error))
    except Exception as error:
        translated = _from_client(error)
        if translated is None:
            raise
        _leave(translated)


def _leave(failure: Failure) -> NoReturn:
    explain(failure)
    raise typer.Exit(failure.exit_code)


def _from_os(error: OSError) -> Failure:
    where = f"{error.filename}: " if error.filename else ""
    return Failure(
        "a file or folder could not be used",
        why=f"{where}{error.strerror or error}",
        fix="Check that the path exists, that you may use it, and that the disk has room.",
        code="local_file",
        exit_code=Exit.OTHER,
    )


def _from_client(error: Exception) -> Failure | None:
    # An error of the client can only exist once its module is loaded; `--help` must not load it to say so.
    if "tunery.client.errors" not in sys.modules:
        return None
    from tunery.client.errors import APIError, TuneryError

    if isinstance(error, APIError):
        return from_api(error)
    return _from_transport(error) if isinstance(error, TuneryError) else None


def _from_transport(error: "TuneryError") -> Failure:
    from tunery.client.errors import CorruptDownload, Unreachable

    if isinstance(error, Unreachable):
        return Failure(
            f"cannot reach {error.url.removesuffix('/v1')}",
            why=error.reason,
            fix=_how_to_reach(error.url),
            code="unreachable",
            exit_code=Exit.UNREACHABLE,
        )
    if isinstance(error, CorruptDownload):
        return Failure(
            f"{error.name} arrived damaged; nothing was kept",
            why=[f"expected  {error.expected}", f"received  {error.actual}"],
            fix="Run the command again; if it repeats, the stored file is damaged: tell your operator.",
            code="corrupt_download",
            exit_code=Exit.OTHER,
        )
    return Failure(
        "the answer did not come from a Tunery API",
        why=str(error),
        fix="Check the address: --api-url, TUNERY_API_URL, or `tunery login` to store another.",
        code="not_the_api",
        exit_code=Exit.OTHER,
    )


def _how_to_reach(url: str) -> str:
    host = urllib.parse.urlsplit(url).hostname or ""
    if host == "localhost" or host.startswith("127."):
        return "tunery up     (or --api-url URL for a server elsewhere)"
    return "Check the address and your network; --api-url or TUNERY_API_URL choose another server."


_EXIT_OF = {400: 6, 401: 4, 403: 4, 404: 5, 413: 6, 422: 6, 429: 7}
_FIX_OF = {
    400: "Correct the named field and run the command again.",
    401: "tunery login     (keys are made by your administrator, or by `tunery up`)",
    403: "Ask an administrator of the project for a key with the missing scope.",
    404: "Look at what there is with the matching `list` command; ids belong to one project.",
    409: "Look at the present state with `show`, then decide again.",
    413: "Send a smaller file.",
    422: "Correct the named field and run the command again.",
    429: "Wait a little and run the command again; `tunery whoami` shows whose limit it is.",
}
_OURS = "The fault is the server's. Try again; if it repeats, send the request id to your operator."


def from_api(error: "APIError") -> Failure:
    exit_code = Exit.UNREACHABLE if error.status >= 500 else Exit(_EXIT_OF.get(error.status, 1))
    return Failure(
        error.message,
        why=_reasons(error),
        fix=error.fix or _FIX_OF.get(error.status, _OURS),
        code=error.code or error.type or f"http_{error.status}",
        exit_code=exit_code,
        docs=error.docs,
        request_id=error.request_id,
    )


def _reasons(error: "APIError") -> list[str]:
    if error.errors:
        return [reason(item) for item in error.errors]
    said = {
        401: "the server did not accept the key",
        403: "the key is good, but may not do this",
        404: "it does not exist, or belongs to another project",
        429: "a limit is reached; nothing was submitted",
    }
    if error.param:
        return [f"parameter: {error.param}"]
    return [said.get(error.status, f"the server answered HTTP {error.status}")]


def reason(item: Any) -> str:
    """`train.jsonl:17   messages[2].role is "bot"`, from whichever keys a server names a row with."""
    if not isinstance(item, dict):
        return str(item)
    message = item.get("message") or item.get("msg") or ", ".join(f"{key}={value}" for key, value in item.items())
    line, file = item.get("line") or item.get("row"), item.get("file")
    at = None if line is None else f"{file}:{line}" if file else f"line {line}"
    named = item.get("param") or item.get("path") or item.get("loc")
    if isinstance(named, list | tuple):
        named = ".".join(str(part) for part in named)
    return "  ".join(str(part) for part in (at or file, named, message) if part)
