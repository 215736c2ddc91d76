"""A trainer that tries everything it should not be able to do, and prints what it got.

Its spec names what to try. The last line that it prints is one JSON object; whatever stands in it was reached.
"""

import json
import os
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any


def main(path: str) -> int:
    wanted = json.loads(Path(path).read_text())
    if wanted["mode"] == "stay":
        return stay(wanted["token"])
    print("key ftk_live_0123456789abcdefghijklmnop and postgresql://tunery:hunter2hunter2@127.0.0.1/x", flush=True)
    got: dict[str, Any] = {
        "uid": os.getuid(),
        "environments": those(wanted["pids"], lambda pid: Path(f"/proc/{pid}/environ").read_bytes()),
        "read": those(wanted["secrets"], lambda one: Path(one).read_bytes()),
        "listed": those(wanted["folders"], lambda one: list(Path(one).iterdir())),
        "reached": those(wanted["addresses"], connect),
        "wrote": those(wanted["folders"], lambda one: (Path(one) / "mine").write_text("x")),
        "tampered": those(["spec.json", "trainer.log", "data"], lambda one: Path(one).rename("gone")),
        "own": Path("checkpoints/step-1").mkdir(parents=True) or Path("tmp/x").write_text("x"),
        "home": tried(lambda: (Path.home() / ".cache").mkdir() or True),
        "signalled": those(wanted["pids"], lambda pid: os.kill(pid, 0) or True),
        "rights": tried(lambda: os.setuid(0) or True) and os.getuid() != wanted["node_uid"],
        "loopback": tried(talk_to_itself),
        "data": len(Path("data/train.jsonl").read_text()),
        "forks": forks(wanted["forks"]),
        "memory": tried(lambda: len(bytearray(wanted["memory"]))),
    }  # fmt: skip
    print(json.dumps(got), flush=True)
    os.kill(os.getpid(), 9) if wanted["mode"] == "killed" else None
    return 64


def those(many: list[Any], what: Callable[[Any], Any]) -> list[Any]:
    return [one for one in many if tried(partial(what, one))]


def tried(what: Callable[[], Any]) -> bool:
    with suppress(OSError, MemoryError):
        return bool(what())
    return False


def connect(address: list[Any]) -> bool:
    with socket.create_connection((address[0], address[1]), timeout=1):
        return True


def talk_to_itself() -> bool:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return connect(list(server.getsockname()))


def forks(most: int) -> int:
    """How many processes it can have beside itself, at most so many."""
    made = []
    with suppress(OSError):
        while len(made) < most:
            if not (pid := os.fork()):
                time.sleep(60)
                os._exit(0)
            made.append(pid)
    for pid in made:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
    return len(made)


def stay(token: str) -> int:
    """Leave a child behind: no mark in its environment, its own session, an orphan."""
    if not os.fork():
        os.setsid()
        if not os.fork():
            os.execve(sys.executable, [sys.executable, "-c", "import time; time.sleep(300)", token], {})
        os._exit(0)
    print("stayed", flush=True)
    time.sleep(300)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
