"""From any exception to the failure code that decides what happens next."""

import errno
import resource
import sys
import traceback

from tunery.contracts.events import EXIT_MEMORY, EXIT_OURS, EXIT_USER
from tunery.states import POLICY, FailureCode, Fault

MESSAGE_CHARACTERS = 2000


class TrainingFailed(Exception):
    """A failure whose cause is known; the message is written for the job's owner."""

    def __init__(self, code: FailureCode, message: str) -> None:
        super().__init__(message)
        self.code, self.message = code, message


def classify(error: BaseException) -> tuple[FailureCode, str]:
    """The failure code of `error`, and a short message that says where it happened."""
    if isinstance(error, TrainingFailed):
        return error.code, error.message
    if _out_of_memory(error):
        return FailureCode.OUT_OF_MEMORY, f"Out of memory: {_first_line(error)}"
    if _disk_full(error):
        return FailureCode.DISK_FULL, f"No space left on the node: {_first_line(error)}"
    tail = "".join(traceback.format_exception(error)[-3:])
    return FailureCode.INTERNAL, f"{type(error).__name__}: {_first_line(error)}\n{tail}"[:MESSAGE_CHARACTERS]


def exit_code(code: FailureCode) -> int:
    """What the process exits with, for a supervisor that got no outcome event."""
    if code is FailureCode.OUT_OF_MEMORY:
        return EXIT_MEMORY
    return EXIT_USER if POLICY[code].fault is Fault.USER else EXIT_OURS


def peak_memory_bytes() -> int:
    """The most memory that this process held at once: on its GPU, or without one its resident memory."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_reserved())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _out_of_memory(error: BaseException) -> bool:
    # By name and text: this module must not import torch, which may be what failed to load.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)


def _disk_full(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return type(error).__name__ == "SafetensorError" and "No space left on device" in str(error)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:500]
