"""A trainer's log: objects named after the byte they begin at, read back as one text."""

from collections.abc import Iterator, Sequence

from api.schemas.jobs import LogOut
from tunery.errors import NotFound
from tunery.jobs import Attempt, AttemptView
from tunery.storage import Storage

MAX_BYTES = 256 * 1024
MAX_CHUNKS = 64
"""Objects read for one answer: a quiet trainer leaves many small ones."""


def choose(attempts: Sequence[AttemptView], number: int | None) -> Attempt:
    """The attempt of that number, or the newest. Raises NotFound."""
    found = [view.attempt for view in attempts if number in (None, view.attempt.no)]
    if found and (gone := found[-1].logs_deleted_at) is not None:
        raise NotFound(f"The log of attempt {found[-1].no} was deleted on {gone:%Y-%m-%d}.", param="attempt")
    if found:
        return found[-1]
    if number is None:
        raise NotFound("No attempt has started yet.", param="attempt", fix="Wait until the job runs.")
    raise NotFound(f"The job has no attempt {number}.", param="attempt", fix="`tunery jobs show` lists its attempts.")


def read(storage: Storage, attempt: Attempt, offset: int) -> LogOut:
    """What lies between `offset` and the bytes stored so far, at most `MAX_BYTES` of it."""
    end = min(attempt.log_bytes, offset + MAX_BYTES)
    data = b"".join(_pieces(storage, attempt, offset, end)) if offset < end else b""
    over = attempt.ended_at is not None
    if not (over and offset + len(data) >= attempt.log_bytes):
        data = data[: _whole_letters(data)]
    reached = offset + len(data)
    return LogOut(
        attempt=attempt.no,
        offset=offset,
        next_offset=reached,
        text=data.decode(errors="replace"),
        complete=over and reached >= attempt.log_bytes,
    )


def _pieces(storage: Storage, attempt: Attempt, offset: int, end: int) -> Iterator[bytes]:
    prefix = f"a/{attempt.project_id}/{attempt.id}/logs/"
    for start in _chunks(storage, prefix, offset, end)[:MAX_CHUNKS]:
        skip = max(0, offset - start)
        chunk = (storage.get_bytes(f"{prefix}{start:012}") or b"")[skip : end - start]
        yield chunk
        if start + skip + len(chunk) >= end:
            return


def _chunks(storage: Storage, prefix: str, offset: int, end: int) -> list[int]:
    """Where the chunks begin that hold bytes of [offset, end), the one that contains `offset` first."""
    begins: list[int] = []
    for key in storage.keys(prefix):
        name = key.removeprefix(prefix)
        if not name.isdigit():
            continue
        start = int(name)
        if start >= end:
            break  # keys come in order, and twelve digits sort as numbers do
        if start <= offset:
            begins = [start]
        else:
            begins.append(start)
    return begins


def _whole_letters(data: bytes) -> int:
    """How much of `data` ends on a letter's end: the rest of a cut UTF-8 sequence comes with the next piece."""
    for back in range(1, min(4, len(data)) + 1):
        byte = data[-back]
        if byte & 0xC0 == 0x80:
            continue
        wants = 4 if byte >= 0xF0 else 3 if byte >= 0xE0 else 2 if byte >= 0xC0 else 1
        return len(data) - back if wants > back else len(data)
    return len(data)
