"""Ports on loopback, chosen once and remembered."""

import random
import socket

HOST = "127.0.0.1"
_FIRST, _LAST = 20000, 29000
"""Below every ephemeral range: a remembered port cannot be taken by somebody's outgoing connection meanwhile."""


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do; TIME_WAIT is not "in use"
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def choose(taken: set[int], offset: int = 0) -> int:
    """A free port whose neighbour at `offset` is free as well (weed puts gRPC 10000 above HTTP)."""
    for _ in range(1000):
        port = random.randint(_FIRST, _LAST)  # noqa: S311 -- not a secret
        if {port, port + offset}.isdisjoint(taken) and is_free(port) and is_free(port + offset):
            taken |= {port, port + offset}
            return port
    raise OSError(f"no free port on {HOST} between {_FIRST} and {_LAST}")


def remembered(names: list[str], known: dict[str, int], offset: int = 0) -> dict[str, int]:
    """The ports of last time where they are still free, fresh ones for the rest."""
    taken: set[int] = {*known.values()}
    return {
        name: known[name]
        if name in known and is_free(known[name]) and is_free(known[name] + offset)
        else choose(taken, offset)
        for name in names
    }
