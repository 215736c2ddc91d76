"""What this host can train on. Without a GPU that is one honest CPU device."""

import os
import platform
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunery.nodes import Device

GIB = 1 << 30


def devices(cpu_devices: int = 1) -> list[Device]:
    """GPUs as NVML sees them, in its order; else the CPU, as so many devices with equal parts of its memory.

    Usable memory leaves 5 %, at least 1 GiB, to others.
    """
    return _nvidia() or _cpus(cpu_devices)


@dataclass(frozen=True)
class Reading:
    """Of one GPU, now. `utilization` is the share of NVML's last sampling period in which a kernel ran."""

    index: int
    uuid: str
    name: str
    used_bytes: int
    total_bytes: int
    utilization: float


def readings(uuids: Sequence[str] | None = None) -> list[Reading]:
    """Of some GPUs, whatever happens to the others, or of all. None where there is no NVIDIA driver.

    Raises pynvml.NVMLError if one of them does not answer.
    """
    import pynvml

    try:
        pynvml.nvmlInit()  # counted by the library: each init has its shutdown
    except pynvml.NVMLError:
        return []
    try:
        if uuids is not None:
            return [_reading(pynvml.nvmlDeviceGetHandleByUUID(uuid)) for uuid in uuids]
        return [_reading(pynvml.nvmlDeviceGetHandleByIndex(index)) for index in range(pynvml.nvmlDeviceGetCount())]
    finally:
        pynvml.nvmlShutdown()


def keep_driver_open() -> None:
    """Until this process ends: whoever reads every second need not wait for the library each time."""
    import pynvml

    with suppress(pynvml.NVMLError):
        pynvml.nvmlInit()


def _reading(handle: Any) -> Reading:
    import pynvml

    index, uuid = int(pynvml.nvmlDeviceGetIndex(handle)), str(pynvml.nvmlDeviceGetUUID(handle))
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    try:
        busy = int(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu) / 100
    except pynvml.NVMLError:  # a GPU in MIG mode does not say
        busy = float("nan")
    name = str(pynvml.nvmlDeviceGetName(handle))
    return Reading(index, uuid, name, int(memory.used), int(memory.total), busy)


def _nvidia() -> list[Device]:
    import pynvml  # nvidia-ml-py; here, because its import looks for a driver

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        found = []
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            total = int(pynvml.nvmlDeviceGetMemoryInfo(handle).total)
            usable = total - max(GIB, total // 20)
            uuid, name = str(pynvml.nvmlDeviceGetUUID(handle)), str(pynvml.nvmlDeviceGetName(handle))
            found.append(Device(uuid, index, "cuda", name, total, usable))
        return found
    finally:
        pynvml.nvmlShutdown()


def minors(uuids: Sequence[str] | None = None) -> list[int]:
    """The N of `/dev/nvidiaN` of some GPUs, or of all; empty on a host without any."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        chosen = [one for one in handles if uuids is None or str(pynvml.nvmlDeviceGetUUID(one)) in uuids]
        return [int(pynvml.nvmlDeviceGetMinorNumber(one)) for one in chosen]
    finally:
        pynvml.nvmlShutdown()


def _cpus(number: int) -> list[Device]:
    if number == 1:
        return [Device("cpu", 0, "cpu", f"{_cpu_name()} x {usable_cores()}", _main_memory(), usable_memory())]
    name, total, usable = _cpu_name(), _main_memory() // number, usable_memory() // number
    return [Device(f"cpu-{place}", place, "cpu", f"{name}, part {place}", total, usable) for place in range(number)]


def usable_memory() -> int:
    """Bytes of main memory that a trainer may have."""
    total = _main_memory()
    return total - max(GIB, total // 20)


def _main_memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def usable_cores() -> int:
    return len(os.sched_getaffinity(0))


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
