"""What a proxy can be told to do.

A fault of the connection (latency, throttle, refuse, hold, blackhole) acts at once, on open connections too. A fault
of one exchange (reset, truncate, corrupt, replay, http_error, drop_reply) is chosen when its request comes: `on` is a
regular expression that the request must contain, `fraction` a probability, `times` how often at most.
"""

from dataclasses import dataclass
from typing import Literal

Ways = Literal["both", "requests", "replies"]
SLOW_DOWN = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Slow down</Message></Error>"
INTERNAL = SLOW_DOWN.replace(b"SlowDown", b"InternalError")


@dataclass(frozen=True)
class Fault:
    latency_s: float = 0
    jitter_s: float = 0
    bytes_per_s: float | None = None
    refuse: bool = False
    hold: Ways | None = None
    blackhole: Ways | None = None
    reset_after: int | None = None
    reset_request_after: int | None = None
    truncate_after: int | None = None
    corrupt: bool = False
    requests: int = 1
    answer: tuple[int, bytes] | None = None
    drop_reply: bool = False
    on: str | None = None
    fraction: float = 1
    times: int | None = None

    @property
    def of_exchange(self) -> bool:
        one = (self.reset_after, self.reset_request_after, self.truncate_after, self.answer)
        return any(given is not None for given in one) or self.corrupt or self.requests > 1 or self.drop_reply


PASS = Fault()


def latency(seconds: float, jitter_s: float = 0) -> Fault:
    """Every block, in both directions, comes so much later."""
    return Fault(latency_s=seconds, jitter_s=jitter_s)


def throttle(bytes_per_s: float) -> Fault:
    return Fault(bytes_per_s=bytes_per_s)


def refuse() -> Fault:
    """Nobody is there: open connections are reset, new ones at once."""
    return Fault(refuse=True)


def hold(ways: Ways = "both") -> Fault:
    """A partition that heals in time: bytes wait, none is lost."""
    return Fault(hold=ways)


def blackhole(ways: Ways = "both") -> Fault:
    """A partition that outlasts TCP: bytes vanish, and nobody learns that the other end has closed. A connection
    that lost bytes is reset when the fault is lifted."""
    return Fault(blackhole=ways)


def reset(after: int = 0, *, on: str | None = None, times: int | None = None, fraction: float = 1) -> Fault:
    """RST after so many bytes of the reply."""
    return Fault(reset_after=after, on=on, times=times, fraction=fraction)


def reset_upload(after: int, *, on: str | None = None, times: int | None = None, fraction: float = 1) -> Fault:
    """RST, to both ends, after so many bytes of the request's body. HTTP."""
    return Fault(reset_request_after=after, on=on, times=times, fraction=fraction)


def truncate(after: int, *, on: str | None = None, times: int | None = None, fraction: float = 1) -> Fault:
    """An orderly end after so many bytes of the reply."""
    return Fault(truncate_after=after, on=on, times=times, fraction=fraction)


def corrupt(*, on: str | None = None, times: int | None = None, fraction: float = 1) -> Fault:
    """One byte of the reply's body is another, and S3's own checksum of it is gone, as from a store that keeps none:
    the client library must not find out, or nobody would see what we do ourselves. HTTP."""
    return Fault(corrupt=True, on=on, times=times, fraction=fraction)


def replay(requests: int = 2, *, on: str | None = None, times: int | None = None, fraction: float = 1) -> Fault:
    """The server gets the request so often; the client, the last reply. HTTP."""
    return Fault(requests=requests, on=on, times=times, fraction=fraction)


def http_error(
    status: int, body: bytes = b"", *, on: str | None = None, times: int | None = None, fraction: float = 1
) -> Fault:
    """The proxy itself answers; the server hears nothing. 200 with an error body is one too. HTTP."""
    return Fault(answer=(status, body), on=on, times=times, fraction=fraction)


def drop_reply_to(pattern: str, *, times: int | None = 1, fraction: float = 1) -> Fault:
    """The server does what the request says, and the connection is reset instead of the reply."""
    return Fault(drop_reply=True, on=pattern, times=times, fraction=fraction)
