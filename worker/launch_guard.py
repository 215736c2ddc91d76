"""Before a trainer starts: is anybody else on its GPU, or anything left of somebody?

A GPU that is not clean is marked `dirty` and gets no work until the node has seen it clean again.
A GPU that is broken is `unhealthy`, also while something runs on it. Without a GPU
nothing is looked at.
"""

import uuid
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from worker import processes

GIB = 1 << 30


@dataclass(frozen=True)
class Usage:
    """One GPU at one moment. Memory in bytes; processes by their pids, as far as the driver tells."""

    total_bytes: int
    used_bytes: int
    pids: tuple[int, ...]


class Driver(Protocol):
    """Whatever can say how a GPU is used; tests put one without a GPU here."""

    def usage(self, device: str) -> Usage | None:
        """By the driver's UUID. None if the GPU does not answer."""
        ...

    def ailment(self, device: str) -> str | None:
        """What makes this GPU unfit for anything; None if it answers and has no error that it cannot correct."""
        ...


class Nvml:
    """The driver's management library."""

    def usage(self, device: str) -> Usage | None:
        import pynvml  # here, because its import looks for a driver

        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError:
            return None
        try:
            handle = pynvml.nvmlDeviceGetHandleByUUID(device)
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
            running = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
            return Usage(int(memory.total), int(memory.used), tuple(int(one.pid) for one in running))
        except pynvml.NVMLError:
            return None
        finally:
            pynvml.nvmlShutdown()

    def ailment(self, device: str) -> str | None:
        """Errors that stay until the GPU is reset or replaced; those of a program alone, such as Xid 13, do not."""
        import pynvml

        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            return f"the driver does not answer: {error}"
        try:
            handle = pynvml.nvmlDeviceGetHandleByUUID(device)
            pynvml.nvmlDeviceGetMemoryInfo(handle)
            wrong, volatile = pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, pynvml.NVML_VOLATILE_ECC
            unsupported = pynvml.nvmlExceptionClass(pynvml.NVML_ERROR_NOT_SUPPORTED)
            # a GPU without ECC, or without rows to spare, says so, and that is no ailment
            with suppress(unsupported):
                if count := int(pynvml.nvmlDeviceGetTotalEccErrors(handle, wrong, volatile)):
                    return f"{count} ECC errors that could not be corrected since it was reset"
            with suppress(unsupported):
                *_, failed = pynvml.nvmlDeviceGetRemappedRows(handle)
                if failed:
                    return "its memory has more broken rows than it can replace"
        except pynvml.NVMLError as error:
            return f"the driver does not answer for it: {error}"
        finally:
            pynvml.nvmlShutdown()
        return None


def problem(usage: Usage | None, ours: Collection[int] = ()) -> str | None:
    """Why nothing should be started on a GPU now; None if nothing is wrong. `ours` may be on it already."""
    if usage is None:
        return "the driver does not answer for it"
    known = [pid for pid in usage.pids if pid in ours]
    foreign = [pid for pid in usage.pids if pid not in ours and (not known or _exists(pid))]
    if foreign:
        return f"{', '.join(map(_name, foreign))} runs on it and belongs to no attempt"
    baseline = max(GIB, usage.total_bytes // 20)  # what the inventory leaves to the driver and to others
    if not known and usage.used_bytes > baseline:
        return f"{usage.used_bytes / GIB:.1f} GiB of its memory are in use by nobody that can be seen"
    return None


def look(driver: Driver, devices: Sequence[tuple[str, str]], neighbours: Collection[uuid.UUID] = ()) -> dict[str, str]:
    """The GPUs among `devices` (kind and UUID) that are not clean, each with the reason."""
    gpus = [device for kind, device in devices if kind == "cuda"]
    if not gpus:
        return {}
    ours = {pid for attempt in neighbours for pid in processes.marked(str(attempt))}
    found = {device: problem(driver.usage(device), ours) for device in gpus}
    return {device: reason for device, reason in found.items() if reason is not None}


def broken(driver: Driver, devices: Sequence[tuple[str, str]]) -> dict[str, str]:
    """The GPUs among `devices` (kind and UUID) that are unfit for anything, each with the reason."""
    found = {device: driver.ailment(device) for kind, device in devices if kind == "cuda"}
    return {device: reason for device, reason in found.items() if reason is not None}


def _exists(pid: int) -> bool:
    """In a container the driver may name processes of the host, ours among them, by numbers that say nothing here."""
    return Path(f"/proc/{pid}").exists()


def _name(pid: int) -> str:
    try:
        return f"process {pid} ({Path(f'/proc/{pid}/comm').read_text().strip()})"
    except OSError:
        return f"process {pid}"
