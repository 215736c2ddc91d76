"""Why a job waits, in words: each code of the policy's has one sentence, filled with the numbers of the moment."""

from collections.abc import Mapping
from typing import Any

from tunery.contracts.scheduling import Reason, WaitCode

GIB = 1 << 30


def message(reason: Reason) -> str:
    """For the job's owner. Other projects' jobs are counted, never named."""
    numbers = dict(reason.numbers)
    need = _need(numbers)
    match reason.code:
        case WaitCode.NO_NODE:
            return f"{need}; no node is up that has room on its disk"
        case WaitCode.TOO_LARGE:
            return f"{need} on one node, but the largest device that is up has {_gib(numbers['largest'])}"
        case WaitCode.BUSY:
            return f"{need}; {numbers['busy']} of {numbers['total']} suitable devices are busy"
        case _:
            return f"{need}; {reason.code}"


def _need(numbers: Mapping[str, Any]) -> str:
    return f"needs {numbers.get('gpus', 1)} x {_gib(numbers.get('bytes', 0))}"


def _gib(size: Any) -> str:
    return f"{size / GIB:.1f} GiB"
