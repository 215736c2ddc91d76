"""What this machine offers and lacks, in about a second. A red line stops `tunery up` and says what to do."""

import contextlib
import importlib.metadata
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from tunery.embedded import binaries, given, ports
from tunery.embedded.checks import Check, Level
from tunery.embedded.home import CHECKOUT, Home
from tunery.embedded.problems import Refused
from tunery.embedded.servers import External

GIB = 1024**3
_LEAST_FREE_BYTES, _COMFORTABLE_BYTES = 1 * GIB, 10 * GIB
_PROBE_S = 60
_OLDEST_GLIBC = (2, 28)
_OLDEST_PYTHON = (3, 11)
_LEAST_OPEN_FILES = 1024
_CGROUP_FILES = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
_NO_GPU = "none seen; jobs train on the CPU, which only suits the demo model"
PROGRAMS = ("api", "scheduler", "worker")


def examine(home: Home, external: External, api_port: int, root: Path = CHECKOUT) -> list[Check]:
    """Every check; none changes anything."""
    probe = _start_probe(home, root)
    return [
        _platform(),
        *_servers(external),
        *given.examine(home, external),
        _programs(root),
        _user(home),
        _disk(home),
        _temporary(),
        _memory(),
        _open_files(),
        _port(home, api_port),
        gpu := _gpu(),
        _torch(gpu),
        *_shared_memory(gpu),
        _isolation(probe),
    ]


def refuse(checks: list[Check]) -> None:
    """Stop at red lines, all of them at once."""
    red = [check for check in checks if check.level is Level.FAIL]
    if red:
        raise Refused(
            f"this machine is not ready: {', '.join(check.name for check in red)}",
            why="\n".join(f"{check.name}: {check.detail}" for check in red),
            fix="; ".join(check.fix for check in red if check.fix) or "see above",
        )


def _platform() -> Check:
    said = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
    if sys.platform not in ("linux", "darwin"):
        return Check("platform", Level.FAIL, f"{said} is not supported", "use Linux, macOS or WSL 2")
    if sys.version_info < _OLDEST_PYTHON:
        return Check("platform", Level.FAIL, f"{said} is too old", "Python 3.11 or later: make PYTHON=python3.12 setup")
    name, version = platform.libc_ver()
    if name == "glibc" and tuple(map(int, version.split(".")[:2])) < _OLDEST_GLIBC:
        return Check("platform", Level.WARN, f"{said}, glibc {version}: the wheels of the servers want 2.28")
    return Check("platform", Level.OK, f"{said}{f', {name} {version}' if name else ''}")


def _servers(external: External) -> Iterator[Check]:
    """Those that would be started here."""
    urls = {"postgres": external.database_url, "valkey": external.redis_url, "s3": external.s3_endpoint_url}
    for name in (name for name, url in urls.items() if not url):
        try:
            yield Check(name, Level.OK, binaries.find(name).origin)
        except Refused as refused:
            yield Check(name, Level.FAIL, refused.why, refused.fix)


def _programs(root: Path) -> Check:
    missing = [name for name in PROGRAMS if not (root / name / "__main__.py").exists()]
    if missing:
        detail = f"{', '.join(missing)} not found in {root}; the wheel on PyPI has only the client"
        return Check("programs", Level.FAIL, detail, "run from a checkout of the repository, or from its image")
    return Check("programs", Level.OK, str(root))


def _user(home: Home) -> Check:
    uid = home.run_as.uid
    if uid is None:
        return Check("user", Level.OK, f"uid {os.geteuid()}")
    if not home.run_as.can_reach(home.data.parent):
        detail = f"uid {uid}, which the servers run as, cannot walk down to {home.data}"
        return Check("user", Level.FAIL, detail, "TUNERY_HOME=/var/lib/tunery, or chmod o+x the folders above")
    moved = "" if home.data == home.root else f"; data in {home.data}, because {home.root} is closed to it"
    return Check("user", Level.OK, f"root; the servers run as uid {uid}{moved}")


def _disk(home: Home) -> Check:
    existing = next(each for each in (home.data, *home.data.parents) if each.exists())
    free = shutil.disk_usage(existing).free
    detail = f"{free / GIB:.1f} GiB free at {existing}"
    if free < _LEAST_FREE_BYTES:
        return Check(
            "disk",
            Level.FAIL,
            detail,
            "free some space, or TUNERY_HOME=<a folder on a larger disk>; a node takes no work here",
        )
    return Check("disk", Level.OK if free > _COMFORTABLE_BYTES else Level.WARN, detail)


def _temporary() -> Check:
    """Uploads pass through it, and so do long socket paths."""
    folder = Path(tempfile.gettempdir())
    free = shutil.disk_usage(folder).free
    detail = f"{free / GIB:.1f} GiB free in {folder}"
    if free < GIB:
        return Check("temporary", Level.WARN, f"{detail}: a large upload may not fit", "free some, or set TMPDIR")
    return Check("temporary", Level.OK, detail)


def _memory() -> Check:
    """A container's limit counts, not its host's memory."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _cgroup_memory()
    detail = f"{min(total, limit or total) / GIB:.1f} GiB, {os.cpu_count()} cores"
    if limit and limit < total:
        detail += f" (a cgroup's limit; the machine has {total / GIB:.1f} GiB)"
    if min(total, limit or total) > 3 * GIB:
        return Check("memory", Level.OK, detail)
    return Check("memory", Level.WARN, detail, "the demo needs 3 GiB; raise the container's limit, or use a larger one")


def _cgroup_memory() -> int | None:
    for path in _CGROUP_FILES:
        with contextlib.suppress(OSError, ValueError):
            return int(Path(path).read_text())
    return None


def _open_files() -> Check:
    """SeaweedFS and the api hold a descriptor for each volume and connection."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = soft == resource.RLIM_INFINITY
    detail = "no limit" if unlimited else f"{soft} at a time"
    if unlimited or soft >= _LEAST_OPEN_FILES:
        return Check("open files", Level.OK, detail)
    return Check("open files", Level.WARN, detail, "ulimit -n 65536, in the shell that runs tunery up")


def _port(home: Home, api_port: int) -> Check:
    if home.holder() is not None or ports.is_free(api_port):
        return Check("port", Level.OK, f"{api_port} for the API")
    fix = "tunery up --port <another>, or end the program that has it"
    return Check("port", Level.FAIL, f"{api_port} is taken by another program", fix)


def _gpu() -> Check:
    if found := _quietly(_nvml):
        return Check("gpu", Level.OK, found)
    return Check("gpu", Level.OK, _NO_GPU)


def _torch(gpu: Check) -> Check:
    """Whether trainers can run at all, and on the GPU where there is one. Asked without importing: that takes 10 s."""
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        fix = "make setup; or pip install 'tunery[node,trainer]' into this environment"
        return Check("torch", Level.WARN, "not installed: every job would fail on this machine's node", fix)
    if version.endswith("+cpu") and gpu.detail != _NO_GPU:
        fix = "install torch's CUDA build: make clean setup, with no CPU build in pip's find-links; or TORCH=host"
        return Check("torch", Level.WARN, f"{version} cannot use the GPU", fix)
    return Check("torch", Level.OK, version)


def _shared_memory(gpu: Check) -> Iterator[Check]:
    """NCCL and data loaders need it; a container's usual 64 MB end in a bus error."""
    if gpu.detail == _NO_GPU or not Path("/dev/shm").exists():  # noqa: S108 - looked at, not written to
        return
    size = shutil.disk_usage("/dev/shm").total  # noqa: S108
    detail = f"{size / GIB:.2f} GiB in /dev/shm"
    if size < GIB:
        yield Check("shared memory", Level.WARN, detail, "docker run --shm-size=2g, or remount it larger")
    else:
        yield Check("shared memory", Level.OK, detail)


def _nvml() -> str | None:
    import pynvml

    pynvml.nvmlInit()
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        names = [pynvml.nvmlDeviceGetName(handle) for handle in handles]
        return f"{', '.join(names)} (driver {pynvml.nvmlSystemGetDriverVersion()})" if names else None
    finally:
        pynvml.nvmlShutdown()


def _quietly(probe: Callable[[], str | None]) -> str | None:
    """No driver, no library, no permission: all of them mean that there is no GPU for us."""
    with contextlib.suppress(Exception):
        return probe()
    return None


def _start_probe(home: Home, root: Path) -> "subprocess.Popen[str] | None":
    """The node's own probe, which starts a child behind every wall it knows: it takes half a second."""
    if not (root / "worker" / "isolation").is_dir():
        return None
    hidden = os.pathsep.join(dict.fromkeys((str(home.root), str(home.data))))
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "worker.isolation"],
        env=os.environ | {"PYTHONPATH": str(root), "TUNERY_TRAINER_HIDDEN": hidden},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def _isolation(probe: "subprocess.Popen[str] | None") -> Check:
    """A process can read what its user can, secrets included, unless walls stand between them."""
    try:
        answer, _ = probe.communicate(timeout=_PROBE_S) if probe else ("", None)
        found = json.loads(answer)
    except (subprocess.TimeoutExpired, ValueError):
        if probe is not None:
            probe.kill()
        return Check("trainer isolated", Level.WARN, "unknown: the probe did not answer", "python -m worker.isolation")
    stand = [layer["name"] for layer in found["layers"] if layer["on"]]
    lack = [layer for layer in found["layers"] if not layer["on"]]
    isolated = found["trainer_isolated"] and found["network_isolated"]
    detail = f"{'yes' if isolated else 'no'}: {', '.join(stand) or 'nothing stands'}"
    if lack:
        detail += "; without " + "; ".join(f"{layer['name']} ({layer['detail']})" for layer in lack)
    if not isolated:
        detail += "; train only data and models you trust"
    fixes = dict.fromkeys(layer["fix"] for layer in lack if layer["fix"])
    return Check("trainer isolated", Level.OK if isolated else Level.WARN, detail, "; ".join(fixes) or None)
