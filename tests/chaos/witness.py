"""The witness of a device: outside the system, and told nothing by it.

`TUNERY_TRAINER_MODULE` is `tests.chaos.watched_fake` or `tests.chaos.watched_real`. Such a trainer takes an exclusive
flock on the files that stand for its devices before it does anything else, and never lets go; the kernel does,
when the process is gone. If a file is taken, two trainers are on one device: the newcomer says so in its log and as
its outcome, and `history` finds it there. A read-only file can be locked, so this works inside whatever sandbox the
trainer runs in.
"""

import fcntl
import os
import runpy
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tunery.contracts.events import EXIT_OURS, Failed
from tunery.contracts.spec import TrainingSpec
from tunery.states import FailureCode

DEVICES = os.environ.get("TUNERY_DEVICES", "")
VIOLATION = "WITNESS: two trainers on one device"
STARTED = "WITNESS: started"


def device_file(uuid: str) -> str:
    """In the folder of the base model, which is the node's own."""
    return f"{uuid}.lock"


def run(module: str, first: Callable[[], None] = lambda: None) -> None:
    """Take the device, do what is to be done `first`, then become the trainer named by `module`."""
    spec = TrainingSpec.model_validate_json(Path(sys.argv[1]).read_bytes())
    line = spec.lineage
    print(STARTED, line.job_id, line.attempt_id, line.attempt_no, time.clock_gettime(time.CLOCK_BOOTTIME), flush=True)
    held = [os.open(Path(spec.base.path) / device_file(uuid), os.O_RDONLY) for uuid in DEVICES.split(",")]
    try:
        for device in held:
            fcntl.flock(device, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(VIOLATION, flush=True)
        _say_so(spec)
        sys.exit(EXIT_OURS)
    first()
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _say_so(spec: TrainingSpec) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(spec.socket)
        said = Failed(code=FailureCode.INTERNAL, message=VIOLATION)
        connection.sendall(said.model_copy(update={"seq": 1, "time": time.time()}).model_dump_json().encode() + b"\n")
