"""What this machine offers and lacks, in about a second. A red line stops `tunery up` and says what to do."""

import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from urllib.parse import urlsplit

from tunery.embedded import binaries, ports
from tunery.embedded.home import CHECKOUT, Home
from tunery.embedded.problems import Refused
from tunery.embedded.servers import External

GIB = 1024**3
_LEAST_FREE_BYTES, _COMFORTABLE_BYTES = 1 * GIB, 10 * GIB
_PROBE_S = 60
_OLDEST_GLIBC = (2, 28)
PROGRAMS = ("api", "scheduler", "worker")


class Level(StrEnum):
    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True)
class Check:
    name: str
    level: Level
    detail: str
    fix: str | None = None

    def as_json(self) -> dict[str, str | None]:
        return asdict(self)


def examine(home: Home, external: External, api_port: int, root: Path = CHECKOUT) -> list[Check]:
    """Every check; none changes anything."""
    probe = _start_probe(home, root)
    return [
        _platform(),
        *_servers(external),
        _programs(root),
        _user(home),
        _disk(home),
        _memory(),
        _port(home, api_port),
        _gpu(),
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
    name, version = platform.libc_ver()
    if name == "glibc" and tuple(map(int, version.split(".")[:2])) < _OLDEST_GLIBC:
        return Check("platform", Level.WARN, f"{said}, glibc {version}: the wheels of the servers want 2.28")
    return Check("platform", Level.OK, f"{said}{f', {name} {version}' if name else ''}")


def _servers(external: External) -> Iterator[Check]:
    urls = {"postgres": external.database_url, "valkey": external.redis_url, "s3": external.s3_endpoint_url}
    for name, url in urls.items():
        if url:
            yield Check(name, Level.OK, f"yours, at {urlsplit(url).hostname}")
            continue
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
        return Check("disk", Level.FAIL, detail, "free some space, or TUNERY_HOME=<a folder on a larger disk>")
    return Check("disk", Level.OK if free > _COMFORTABLE_BYTES else Level.WARN, detail)


def _memory() -> Check:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Check(
        "memory", Level.OK if total > 3 * GIB else Level.WARN, f"{total / GIB:.1f} GiB, {os.cpu_count()} cores"
    )


def _port(home: Home, api_port: int) -> Check:
    if home.holder() is not None or ports.is_free(api_port):
        return Check("port", Level.OK, f"{api_port} for the API")
    fix = "tunery up --port <another>, or end the program that has it"
    return Check("port", Level.FAIL, f"{api_port} is taken by another program", fix)


def _gpu() -> Check:
    if found := _quietly(_nvml):
        return Check("gpu", Level.OK, found)
    return Check("gpu", Level.OK, "none seen; jobs train on the CPU, which only suits the demo model")


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
