"""Programs that hold secrets keep them from other processes of the same user."""

import ctypes
import sys

_PR_SET_DUMPABLE = 4


def hide_from_same_user() -> None:
    """Close /proc/<pid>/environ, mem and ptrace of this process to everybody but root; no core dump either.

    Children that execute a program are ordinary again. Elsewhere than on Linux nothing happens: there is no /proc.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
