"""A trainer without torch that speaks the real protocol, for tests of everything around it.

    python -P -m tests.fake_trainer spec.json          one attempt, like `trainer`
    python -P -m tests.fake_trainer --engine SOCKET    an engine: takes attempts on SOCKET, trains each in a thread

How it behaves is the job's suffix: `ok`, `slow` (0.1 s a step), `slow-start` (likewise, unless it resumes), `crash-N`
(dies before step N on its first attempt that starts below it), `hang-N` (says nothing from step N on, likewise),
`crash-always`, `reject` (the user's fault), `deaf` (ignores every command), `flood`, `other-release` (speaks another
version of the protocol), `out-of-memory`, `binary`, `endless-line`.
"""

import contextlib
import os
import re
import signal
import socket
import sys
import threading
import time
from pathlib import Path

from tunery.contracts.channel import EventWriter, read_lines
from tunery.contracts.events import (
    COMMANDS,
    EXIT_MEMORY,
    EXIT_OK,
    EXIT_OURS,
    EXIT_STOPPED,
    PROTOCOL,
    Attach,
    Checkpoint,
    Eval,
    Failed,
    Finished,
    Metrics,
    Phase,
    Started,
    Stop,
    Stopped,
)
from tunery.contracts.spec import TrainingSpec
from tunery.states import FailureCode
from tunery.storage import manifest


class Run:
    """One attempt's training."""

    def __init__(self, spec: TrainingSpec, in_engine: bool) -> None:
        self.spec, self.in_engine = spec, in_engine
        self.mode = spec.lineage.model_name.split(":")[3]
        self.connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.connection.connect(spec.socket)
        self.events = EventWriter(self.connection)
        self.stop: Stop | None = None
        self.gone = threading.Event()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        for line in read_lines(self.connection):
            command = COMMANDS.validate_json(line)
            if isinstance(command, Stop) and self.mode != "deaf":
                self.stop = command
        self.gone.set()

    def train(self) -> int:
        steps = self.spec.recipe.training.max_steps
        start = int((Path(self.spec.resume) / "step").read_text()) if self.spec.resume else 0
        self.events.send(Phase(phase="loading", step=start))
        if self.mode == "reject":
            self.events.send(Failed(code=FailureCode.INVALID_TARGETS, message="no module is called 'nose'"))
            return self._close(64)
        self.events.send(
            Started(
                device="cpu", precision="fp32", trainable_parameters=1, total_parameters=2, total_steps=steps,
                start_step=start, train_rows=10, eval_rows=0, step=start,
                protocol=PROTOCOL + (self.mode == "other-release"),
            )
        )  # fmt: skip
        if (code := self._go_wrong()) is not None:
            return code
        if not start:
            self.events.send(Eval(when="before", values={"eval/loss": 2.0}))
        for step in range(start + 1, steps + 1):
            if (code := self._step(step, start, steps)) is not None:
                return code
        output = Path(self.spec.output)
        output.mkdir(parents=True)
        (output / "adapter_model.safetensors").write_bytes(b"weights of " + self.spec.lineage.job_id.encode())
        (output / "adapter_config.json").write_text("{}")
        self.events.send(Eval(when="after", values={"eval/loss": 1.0}, step=steps))
        self.events.send(
            Finished(
                path=str(output),
                files=manifest(output),
                tokens=7 * steps,
                metrics={"eval/loss": 1.0},
                peak_memory_bytes=4096,
                step=steps,
            )
        )
        return self._close(EXIT_OK)

    def _go_wrong(self) -> int | None:
        match self.mode:
            case "out-of-memory":
                self.events.send(Failed(code=FailureCode.OUT_OF_MEMORY, message="CUDA out of memory"))
                return self._close(EXIT_MEMORY)
            case "binary":
                self.connection.sendall(b"\x00\xff\xfe\n" * 1000)
                time.sleep(60)
            case "endless-line":
                with contextlib.suppress(OSError):
                    for _ in range(1024):
                        self.connection.sendall(b"x" * (1 << 20))
                time.sleep(60)
        return None

    def _step(self, step: int, start: int, steps: int) -> int | None:
        quick = self.mode in ("ok", "flood") or (self.mode == "slow-start" and start)
        time.sleep(0.002 if quick else 0.1)
        crash = re.fullmatch(r"crash-(\d+)", self.mode)
        if self.mode == "crash-always" or (crash and step == int(crash[1]) and start < int(crash[1]) // 10 * 10):
            print("Traceback: something of ours broke", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        hang = re.fullmatch(r"hang-(\d+)", self.mode)
        if hang and step == int(hang[1]) and start < step // 10 * 10:
            time.sleep(600)
        if self.gone.is_set() and self.in_engine:
            return 0  # detached
        if self.stop is not None:
            if self.stop.checkpoint and step - 1 > start:
                self._save(step - 1)
            self.events.send(Stopped(reason=self.stop.reason, step=step - 1))
            return self._close(EXIT_STOPPED)
        for _ in range(2000 if self.mode == "flood" else 1):
            loss = 2.0 - step / steps if step != 2 else float("nan")
            self.events.send(Metrics(step=step, values={"train/loss": loss}, tokens=7 * step, total_steps=steps))
        if step % self.spec.recipe.training.save_steps == 0 and step < steps:
            try:
                self._save(step)
            except OSError as error:
                self.events.send(Failed(code=FailureCode.DISK_FULL, message=str(error), step=step))
                return self._close(EXIT_OURS)
        return None

    def _save(self, step: int) -> None:
        folder = Path(self.spec.checkpoints) / f"step-{step}"
        if folder.exists():
            return
        folder.mkdir(parents=True)
        (folder / "step").write_text(str(step))
        self.events.send(Checkpoint(path=str(folder), files=manifest(folder), step=step, metrics={"train_loss": 1.5}))

    def _close(self, code: int) -> int:
        self.events.close()
        return code


def engine(path: str) -> None:
    """Take attempts until killed. Says on stdout what it holds, one line a change."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(path)
    listener.listen(8)

    def hold(spec: TrainingSpec) -> None:
        print("attach", spec.lineage.attempt_id, flush=True)
        Run(spec, in_engine=True).train()
        print("detach", spec.lineage.attempt_id, flush=True)

    while True:
        connection, _ = listener.accept()
        for line in read_lines(connection):
            attach = Attach.model_validate_json(line)
            spec = TrainingSpec.model_validate_json(Path(attach.spec).read_text())
            threading.Thread(target=hold, args=(spec,), daemon=True).start()


if __name__ == "__main__":
    if sys.argv[1] == "--engine":
        engine(sys.argv[2])
    sys.exit(Run(TrainingSpec.model_validate_json(Path(sys.argv[1]).read_text()), in_engine=False).train())
