"""Dying with whoever started us: no trainer program outlives its supervisor or its node."""

import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1


def die_with(parent: str | None) -> bool:
    """Ask the kernel to kill us with our parent; False if that parent is gone already. By hand there is none."""
    if parent is None:
        return True
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    return os.getppid() == int(parent)
