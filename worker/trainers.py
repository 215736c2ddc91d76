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
from tunery.settings import NodeSettings
from tunery.states import FailureCode
from worker import inventory, processes
from worker.isolation.cell import Cell
from worker.isolation.host import Ways
from worker.trainer_log import TrainerLog
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
    """`python -P -m trainer spec.json` in a session of its own, behind whatever walls its node found."""

    lost = FailureCode.TRAINER_CRASHED

    def __init__(self, work: Work, workspace: Workspace, settings: NodeSettings, ways: Ways) -> None:
        self._work, self._workspace, self._settings = work, workspace, settings
        self._cell = Cell(str(work.attempt_id), workspace, settings, ways.trainer)
        self._process: subprocess.Popen[bytes] | None = None
        self._log: TrainerLog | None = None

    def start(self) -> None:
        """Must be called from the main thread: the parent-death signal follows the thread that forked."""
        self._log = TrainerLog(self._workspace.log, self._settings.max_log_bytes)
        output = self._log.start()
        follow = processes.die_with_parent()
        # -P: a json.py among a user's files is not the standard library's
        argv = [sys.executable, "-P", "-m", self._settings.trainer_module, str(self._workspace.spec)]
        devices = [uuid for kind, uuid in self._work.devices if kind == "cuda"]
        command = self._cell.open(argv, {processes.ATTEMPT: str(self._work.attempt_id)}, devices)

        def arrange() -> None:
            follow()
            self._cell.enter()

        try:
            self._process = subprocess.Popen(
                command,
                cwd=self._workspace.root,
                env={**self._environment(devices), **self._cell.environment()},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=arrange,
            )
        finally:
            self._log.handed_over()

    def exit_code(self) -> int | None:
        code = self._process.poll() if self._process else None
        return self._cell.exit_code(code) if code is not None else None

    def end(self) -> bool:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()  # with a process namespace, this alone ends everything in it
        gone = processes.end_all(str(self._work.attempt_id), uid=self._cell.uid)
        self._cell.close()
        if self._log is not None:
            self._log.finish()
        return gone

    def _environment(self, devices: list[str]) -> dict[str, str]:
        root = Path(__file__).parent.parent
        return {name: os.environ[name] for name in _PASSED_ON if name in os.environ} | {
            "TUNERY_SUPERVISOR_PID": str(os.getpid()),
            "PYTHONPATH": str(root),
            "PYTHONUNBUFFERED": "1",
            "HOME": str(self._workspace.root),
            "USER": "trainer",  # libraries ask who they are, and an own uid has no entry in the password file
            "LOGNAME": "trainer",
            "TMPDIR": str(self._workspace.root / "tmp"),
            "CUDA_VISIBLE_DEVICES": ",".join(devices),
            "TUNERY_DEVICES": ",".join(uuid for _, uuid in self._work.devices),
            "OMP_NUM_THREADS": str(self._settings.trainer_threads or inventory.usable_cores()),
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


def choose(work: Work, workspace: Workspace, settings: NodeSettings, ways: Ways) -> Trainer:
    if work.engine_socket is not None:
        return EngineTrainer(work.engine_socket, workspace)
    return DedicatedTrainer(work, workspace, settings, ways)
