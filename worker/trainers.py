"""The seam to whatever trains: a process of the attempt's own, or an engine that holds many attempts.

Both speak the same lines over the attempt's socket, so a supervisor need not know which it has. They differ in how
an attempt begins (a process is started; an engine is told) and in how it ends (a process is killed; an engine is
only disconnected, because it holds other people's attempts).
"""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Protocol

from tunery.contracts.channel import send_line
from tunery.contracts.events import Attach
from tunery.failpoints import VARIABLES as FAILPOINTS
from tunery.states import FailureCode
from worker import inventory, processes
from worker.workspace import Work, Workspace

_PASSED_ON = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "CUDA_HOME", "TUNERY_TICK_TIMEOUT_S", *FAILPOINTS)
"""Of the supervisor's environment a trainer sees only these: no secret has a name here."""


class Trainer(Protocol):
    """Whatever trains one attempt."""

    lost: FailureCode
    """What to call it when it goes away without an outcome."""

    def start(self) -> None:
        """Begin; the trainer then connects to the attempt's socket. Raises OSError if it cannot be reached."""
        ...

    def exit_code(self) -> int | None:
        """How its process ended; None while it lives, and always for an engine."""
        ...

    def end(self) -> bool:
        """Make sure that nothing runs for this attempt. False if something would not die."""
        ...


class DedicatedTrainer:
    """`python -P -m trainer spec.json` in a session of its own, with an allow-listed environment."""

    lost = FailureCode.TRAINER_CRASHED

    def __init__(self, work: Work, workspace: Workspace, module: str, threads: int | None) -> None:
        self._work = work
        self._workspace = workspace
        self._module = module
        self._threads = threads
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Must be called from the main thread: the parent-death signal follows the thread that forked."""
        with self._workspace.log.open("ab") as log:
            self._process = subprocess.Popen(
                # -P: a json.py among a user's files is not the standard library's
                [sys.executable, "-P", "-m", self._module, str(self._workspace.spec)],
                cwd=self._workspace.root,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=processes.die_with_parent(),
            )

    def exit_code(self) -> int | None:
        return self._process.poll() if self._process else None

    def end(self) -> bool:
        return processes.end_all(str(self._work.attempt_id))

    def _environment(self) -> dict[str, str]:
        root = Path(__file__).parent.parent
        visible = ",".join(uuid for kind, uuid in self._work.devices if kind == "cuda")
        return {name: os.environ[name] for name in _PASSED_ON if name in os.environ} | {
            processes.ATTEMPT: str(self._work.attempt_id),
            "TUNERY_SUPERVISOR_PID": str(os.getpid()),
            "PYTHONPATH": str(root),
            "PYTHONUNBUFFERED": "1",
            "HOME": str(self._workspace.root),
            "TMPDIR": str(self._workspace.root / "tmp"),
            "CUDA_VISIBLE_DEVICES": visible,
            "OMP_NUM_THREADS": str(self._threads or inventory.usable_cores()),
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "DO_NOT_TRACK": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTORCH_ALLOC_CONF": "expandable_segments:True",
        }


class EngineTrainer:
    """An engine on this node: told to attach the attempt; it detaches when the attempt's connection closes."""

    lost = FailureCode.ENGINE_LOST

    def __init__(self, engine_socket: str, workspace: Workspace) -> None:
        self._engine = engine_socket
        self._workspace = workspace

    def start(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as engine:
            engine.settimeout(10)
            engine.connect(self._engine)
            send_line(engine, Attach(spec=str(self._workspace.spec)))

    def exit_code(self) -> int | None:
        return None

    def end(self) -> bool:
        return True


def choose(work: Work, workspace: Workspace, module: str, threads: int | None) -> Trainer:
    if work.engine_socket is not None:
        return EngineTrainer(work.engine_socket, workspace)
    return DedicatedTrainer(work, workspace, module, threads)
