"""Asked from inside, by a real child behind the walls: what can be seen, reached and done. Prints one JSON object.

python -P inside.py '{"node": PID, "modules": [...], "secret": [...], "outside": [...], "cuda": bool}'
"""

import ctypes
import importlib.util
import json
import os
import resource
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any


def main(asked: dict[str, Any]) -> dict[str, Any]:
    status = dict(line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":\t" in line)
    return {
        "uid": os.getuid(),
        "groups": os.getgroups(),
        "no_new_privileges": status["NoNewPrivs"] == "1",
        "capabilities": int(status["CapEff"], 16) | int(status["CapPrm"], 16),
        "filter": status.get("Seccomp") == "2",
        "processes": [int(one.name) for one in Path("/proc").iterdir() if one.name.isdigit()],
        "node_environment": _readable(Path(f"/proc/{asked['node']}/environ")),
        "interfaces": [name for _, name in socket.if_nameindex()],
        "sockets": _internet_sockets(),
        "secrets_read": [path for path in asked["secret"] if _readable(Path(path))],
        "writable": {path: _identity(path) for path in asked["outside"] if os.access(path, os.W_OK)},
        "written_inside": _write(Path.cwd() / "written"),
        "missing": [name for name in asked["modules"] if importlib.util.find_spec(name) is None],
        "core": resource.getrlimit(resource.RLIMIT_CORE)[0],
        "cuda": _cuda() if asked["cuda"] else None,
    }


def _readable(path: Path) -> bool:
    with suppress(OSError):
        if path.is_dir():
            return any(path.iterdir())
        return bool(path.read_bytes())
    return False


def _identity(path: str) -> list[int]:
    """Which folder it really is: one may only look like the one outside."""
    found = Path(path).stat()
    return [found.st_dev, found.st_ino]


def _write(path: Path) -> bool:
    with suppress(OSError):
        path.touch()
        return True
    return False


def _internet_sockets() -> bool:
    with suppress(OSError):
        socket.socket(socket.AF_INET, socket.SOCK_STREAM).close()
        return True
    return False


def _cuda() -> str | None:
    """None if CUDA starts and gives memory on every device that is visible, else what it said."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        return str(error)
    count, context, memory = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p()
    steps = [
        ("cuInit", lambda: driver.cuInit(0)),
        ("cuDeviceGetCount", lambda: driver.cuDeviceGetCount(ctypes.byref(count))),
    ]
    for name, step in steps:
        if code := step():
            return f"{name} says {code}"
    for device in range(count.value):
        if code := driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device):
            return f"no context on device {device}: {code}"
        driver.cuCtxSetCurrent(context)
        if code := driver.cuMemAlloc_v2(ctypes.byref(memory), ctypes.c_size_t(1 << 20)):
            return f"no memory on device {device}: {code}"
        driver.cuMemFree_v2(memory)
        driver.cuDevicePrimaryCtxRelease_v2(device)
    return None if count.value else "it sees no device"


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(json.loads(sys.argv[1]))))
