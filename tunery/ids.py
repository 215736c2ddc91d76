"""Ids: UUIDv7 in the database, a prefix and 26 base32 letters on the wire. Both sort by creation time."""

import os
import time
import uuid

from tunery.errors import NotFound

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"  # Crockford's base32: no i, l, o, u
_VALUES = {letter: value for value, letter in enumerate(_ALPHABET)}
_LENGTH = 26

FILE, JOB, EVENT, CHECKPOINT = "file-", "ftjob-", "ftevent-", "ftckpt_"
PROJECT, ORGANIZATION, KEY = "proj_", "org-", "key_"
ADAPTER, ADAPTER_VERSION, ATTEMPT = "adapter-", "adver_", "att_"
NODE, JOIN_TOKEN, GPU, AUDIT = "node_", "jointok_", "gpu_", "audit_"


def uuid7() -> uuid.UUID:
    """A time-ordered UUID (RFC 9562, version 7): 48 bits of milliseconds, 74 random bits."""
    millis = time.time_ns() // 1_000_000
    random = int.from_bytes(os.urandom(10))
    value = (millis & (2**48 - 1)) << 80 | 0x7 << 76 | (random >> 68 & 0xFFF) << 64 | 0b10 << 62 | random & (2**62 - 1)
    return uuid.UUID(int=value)


def encode(prefix: str, value: uuid.UUID) -> str:
    """`ftjob-` and a UUID make the id that users see."""
    number = value.int
    letters = [_ALPHABET[number >> 5 * place & 31] for place in range(_LENGTH)]
    return prefix + "".join(reversed(letters))


def decode(prefix: str, text: str) -> uuid.UUID:
    """The UUID behind an id.

    Raises:
        NotFound: not an id of this kind; to its sender that is the same as an id that does not exist.
    """
    letters = text.removeprefix(prefix)
    if not text.startswith(prefix) or len(letters) != _LENGTH or any(letter not in _VALUES for letter in letters):
        raise NotFound(f"No such object: '{text[:80]}'")
    number = 0
    for letter in letters:
        number = number << 5 | _VALUES[letter]
    if number >= 2**128:
        raise NotFound(f"No such object: '{text[:80]}'")
    return uuid.UUID(int=number)


def short(value: uuid.UUID) -> str:
    """The random tail of an id: ten letters (50 bits), for names that people read."""
    return encode("", value)[-10:]
