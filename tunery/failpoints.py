"""Places at which a test can make a program die, wait or fail. Nothing happens unless both variables are set.

    TUNERY_FAILPOINTS_ALLOWED=1
    TUNERY_FAILPOINT=relay.rung:kill:once,store.part:sleep=2,checkpoint.writing:raise=ENOSPC:nth=3

Actions: `kill` (SIGKILL to oneself), `stop` (SIGSTOP), `sleep=SECONDS`, `raise` or `raise=ERRNO` (an OSError, EIO if
none is named). `nth=N` acts on the Nth passage of a process alone. `once` acts once, however many processes pass: it
leaves a file in TUNERY_FAILPOINT_DIR, so that a restarted program gets through.

A name that is not in POINTS, or a failpoint that is not allowed, stops the program: a typing error must not look like
a fault survived, and a variable left behind must not hurt a real deployment in silence.
"""

import errno
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

VARIABLES = ("TUNERY_FAILPOINT", "TUNERY_FAILPOINTS_ALLOWED", "TUNERY_FAILPOINT_DIR")
POINTS = frozenset(
    {
        "store.part",  # api, node: some bytes of an object are on their way
        "upload.stored",  # api: the file is in the object store, and not in the database
        "request.committed",  # api: what a request wrote is durable, and its caller does not know
        "assign.made",  # scheduler: inside the transaction that assigns
        "budget.settled",  # scheduler: inside the transaction that alerts and blocks
        "relay.rung",  # scheduler: a message is out, and not marked as sent
        "attempt.claimed",  # supervisor: behind the claim
        "events.written",  # supervisor: inside the transaction that stores a batch of events
        "checkpoint.uploaded",  # supervisor: the objects are stored, the row is not
        "checkpoint.recorded",  # supervisor: a checkpoint is to be resumed from, and the trainer does not know
        "result.uploaded",  # supervisor: the adapter is stored, not published
        "result.published",  # supervisor: published, and nothing cleaned up
        "task.checked",  # node: rows are checked and stored, and not recorded
        "checkpoint.writing",  # trainer: some files of a checkpoint are on the disk
        "folder.synced",  # trainer: a checkpoint or a result is on the disk, under a temporary name
        "folder.renamed",  # trainer: it is complete, and nobody was told
    }
)


@dataclass
class Failpoint:
    name: str
    action: str
    value: str = ""
    nth: int = 0
    latch: Path | None = None
    passed: int = field(default=0)

    def act(self) -> None:
        self.passed += 1
        if self.nth and self.passed != self.nth:
            return
        if self.latch is not None:
            try:
                self.latch.touch(exist_ok=False)
            except FileExistsError:
                return
        match self.action:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            case "sleep":
                time.sleep(float(self.value))
            case _:
                number = getattr(errno, self.value or "EIO")
                raise OSError(number, f"failpoint {self.name}: {os.strerror(number)}")


def parse(environ: Mapping[str, str]) -> dict[str, Failpoint]:
    """What the environment asks for. Exits the program if that cannot or may not be."""
    wanted = environ.get("TUNERY_FAILPOINT", "")
    if not wanted:
        return {}
    if environ.get("TUNERY_FAILPOINTS_ALLOWED") != "1":
        raise SystemExit(
            "TUNERY_FAILPOINT is set and TUNERY_FAILPOINTS_ALLOWED=1 is not: this program will not fail on purpose. "
            "Unset TUNERY_FAILPOINT; only tests set both."
        )
    return {point.name: point for point in (_point(text.strip(), environ) for text in wanted.split(","))}


def _point(text: str, environ: Mapping[str, str]) -> Failpoint:
    name, action, *options = f"{text}:".split(":")
    action, _, value = action.partition("=")
    usable = {"kill": not value, "stop": not value, "sleep": _is_number(value), "raise": hasattr(errno, value or "EIO")}
    if name not in POINTS or not usable.get(action):
        raise SystemExit(f"TUNERY_FAILPOINT: '{text}' is no failpoint; see tunery/failpoints.py for names and actions.")
    point = Failpoint(name, action, value)
    for option in filter(None, options):
        if option == "once" and environ.get("TUNERY_FAILPOINT_DIR"):
            point.latch = Path(environ["TUNERY_FAILPOINT_DIR"]) / name
        elif option.startswith("nth=") and option[4:].isdigit():
            point.nth = int(option[4:])
        else:
            raise SystemExit(f"TUNERY_FAILPOINT: '{option}' is neither nth=N nor once with TUNERY_FAILPOINT_DIR set.")
    return point


def _is_number(text: str) -> bool:
    return text.replace(".", "", 1).isdigit()


_ARMED = parse(os.environ)


def reach(name: str) -> None:
    """The program is at this point. Costs one look into an empty dictionary."""
    if (point := _ARMED.get(name)) is not None:
        point.act()
