"""What this host can train on. Without a GPU that is one honest CPU device."""

import os
import platform
from pathlib import Path

from tunery.nodes import Device

GIB = 1 << 30


def devices() -> list[Device]:
    """GPUs as NVML sees them, in its order; else the CPU. Usable memory leaves 5 %, at least 1 GiB, to others."""
    return _nvidia() or [_cpu()]


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


def _cpu() -> Device:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    usable = total - max(GIB, total // 20)
    return Device("cpu", 0, "cpu", f"{_cpu_name()} x {usable_cores()}", total, usable)


def usable_cores() -> int:
    return len(os.sched_getaffinity(0))


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
