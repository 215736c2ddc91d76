"""How much of the host one trainer may take: a cgroup where one was delegated to us, else rlimits.

Cgroups are only made below folders that `TUNERY_TRAINER_CGROUPS` names, or below one that systemd marked as
delegated: a program that writes anywhere else in that tree fights with whoever keeps it.
"""

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
_NAME = "tunery-{}"
MAX_OPEN_FILES = 65_536
MAX_FILE_BYTES = 1 << 40


def rlimits(*, processes: int | None, data_bytes: int | None) -> dict[str, int]:
    """For the launcher. `processes` counts all of a uid, so it is for a uid of the trainer's own."""
    found = {"CORE": 0, "NOFILE": MAX_OPEN_FILES, "FSIZE": MAX_FILE_BYTES}
    if processes is not None:
        found["NPROC"] = processes
    if data_bytes is not None:
        found["DATA"] = data_bytes
    return found


def parents(named: str) -> list[Path]:
    """Folders in which we may make cgroups: those that were named, else a delegated one of cgroup v2."""
    if named:
        return [Path(one) for one in named.split(os.pathsep) if one]
    own = next((line[3:] for line in _own_cgroups() if line.startswith("0::")), None)
    if own is None or not (_ROOT / "cgroup.controllers").exists():
        return []
    # a delegated cgroup holds either processes or children: systemd's DelegateSubgroup= puts ours one level down
    above = (_ROOT / own.lstrip("/")).parent
    return [above] if _delegated(above) and os.access(above, os.W_OK) else []


def make(folders: Sequence[Path], name: str, memory_bytes: int, processes: int) -> list[Path]:
    """A cgroup in each folder, with whichever of the two limits its controllers know. Version 1 and 2 alike.

    Raises:
        OSError: it could not be made, or knows neither limit.
    """
    made = []
    for folder in folders:
        if (folder / "cgroup.subtree_control").exists():
            with suppress(OSError):  # on already, or not to be had: the limits below tell
                (folder / "cgroup.subtree_control").write_text("+memory +pids")
        group = folder / _NAME.format(name)
        group.mkdir(exist_ok=True)
        made.append(group)
        wanted = {
            "memory.max": memory_bytes,
            "memory.swap.max": 0,
            "memory.oom.group": 1,
            "memory.limit_in_bytes": memory_bytes,
            "pids.max": processes,
        }
        known = [file for file in wanted if (group / file).exists()]
        for file in known:
            (group / file).write_text(str(wanted[file]))
        if not known:
            remove(made)
            raise OSError(f"{folder} has neither the memory nor the pids controller")
    return made


def enter(groups: Sequence[Path]) -> None:
    """Move the calling process. For `preexec_fn`: whatever it starts is born inside."""
    for group in groups:
        descriptor = os.open(group / "cgroup.procs", os.O_WRONLY)
        os.write(descriptor, b"0")
        os.close(descriptor)


def end(groups: Sequence[Path]) -> None:
    """Kill everything inside, where the kernel can (v2), and remove the cgroups."""
    for group in groups:
        with suppress(OSError):
            (group / "cgroup.kill").write_text("1")
    remove(groups)


def remove(groups: Sequence[Path], timeout_s: float = 2) -> None:
    deadline = time.monotonic() + timeout_s
    for group in groups:
        while group.exists():
            try:
                group.rmdir()
            except OSError:  # busy until the last of its processes is gone
                if time.monotonic() > deadline:
                    return
                time.sleep(0.02)


def left(folders: Sequence[Path], name: str) -> list[Path]:
    """Cgroups that an earlier life made for this name."""
    return [group for folder in folders if (group := folder / _NAME.format(name)).exists()]


def _own_cgroups() -> list[str]:
    with suppress(OSError):
        return Path("/proc/self/cgroup").read_text().splitlines()
    return []


def _delegated(folder: Path) -> bool:
    for name in ("user.delegate", "trusted.delegate"):
        with suppress(OSError):
            if os.getxattr(folder, name) == b"1":
                return True
    return False
