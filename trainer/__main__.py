"""`python -P -m trainer SPEC`: one attempt, one process. See `tunery.contracts.events` for what it says and hears.

Started by a supervisor (`TUNERY_SUPERVISOR_PID` is set) it dies with it. The parent-death signal is bound to the
thread that started us, so a supervisor starts trainers from a thread that lives as long as they do.
"""

import os
import sys
import traceback
from pathlib import Path

# Before any import that reads them: no network, no telemetry, no threads that a fork would lose.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["DO_NOT_TRACK"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
# CPU threads that wait must sleep: spinning, they halve the speed as soon as anything else wants a core.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from pydantic import ValidationError

from trainer.failures import classify, exit_code, peak_memory_bytes
from trainer.parent import die_with
from trainer.session import Session
from tunery.contracts.events import (
    EXIT_OK,
    EXIT_OURS,
    EXIT_STOPPED,
    EXIT_USER,
    TICK_TIMEOUT_S,
    Failed,
    Finished,
    Stopped,
)
from tunery.contracts.spec import OtherVersion, TrainingSpec, read_spec


def main(arguments: list[str]) -> int:
    """Run the attempt that `arguments[0]`, the path of a spec, describes; returns the exit code."""
    if len(arguments) != 1:
        sys.stderr.write("usage: python -P -m trainer SPEC\n")
        return EXIT_USER
    if not die_with(os.environ.get("TUNERY_SUPERVISOR_PID")):
        return EXIT_STOPPED
    try:
        spec = read_spec(Path(arguments[0]))
    except OtherVersion as error:
        sys.stderr.write(f"{arguments[0]}: {error}\n")
        return EXIT_OURS
    except (OSError, ValidationError) as error:  # without a spec there is no socket to say it on
        sys.stderr.write(f"{arguments[0]}: {error}\n")
        return EXIT_USER
    try:
        session = Session.connect(spec.socket, float(os.environ.get("TUNERY_TICK_TIMEOUT_S", TICK_TIMEOUT_S)))
    except OSError as error:
        sys.stderr.write(f"{spec.socket}: {error}\n")
        return EXIT_OURS
    session.obey_sigterm()
    session.phase("loading")
    outcome = _attempt(spec, session)
    session.send(outcome)
    session.close()
    if isinstance(outcome, Finished):
        return EXIT_OK
    return EXIT_STOPPED if isinstance(outcome, Stopped) else exit_code(outcome.code)


def _attempt(spec: TrainingSpec, session: Session) -> Finished | Stopped | Failed:
    try:
        from trainer.run import run  # torch and its libraries take seconds; the supervisor hears from us before

        return run(spec, session)
    except Exception as error:  # noqa: BLE001 - the process edge: every failure becomes the outcome event
        traceback.print_exc()
        code, message = classify(error)
        return Failed(code=code, message=message, peak_memory_bytes=peak_memory_bytes())


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # not through the interpreter's end: CUDA and thread pools can hang or crash there
