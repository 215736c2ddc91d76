"""What of the disk a trainer sees: the system's libraries, Python, our code for it, base models, its workspace."""

import importlib.util
import os
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[2]
_TOP = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")
_SYSTEM = (
    "/usr", "/opt", "/nix/store", "/gnu/store", "/sys", "/run/nvidia-persistenced", "/run/opengl-driver",
    "/etc/alternatives", "/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d", "/etc/localtime",
    "/etc/nsswitch.conf", "/etc/passwd", "/etc/group", "/etc/hosts", "/etc/host.conf", "/etc/ssl/openssl.cnf",
    "/etc/ssl/certs", "/etc/nvidia", "/etc/OpenCL", "/etc/vulkan", "/etc/machine-id", "/etc/locale.alias",
)  # fmt: skip
_PACKAGES = ("tunery", "trainer")
_NVIDIA = ("nvidiactl", "nvidia-uvm", "nvidia-uvm-tools", "nvidia-modeset", "nvidia-caps")


def links() -> dict[str, str]:
    """`/bin` and its like where they are links into `/usr`."""
    tops = [Path("/") / name for name in _TOP]
    return {str(top): str(top.readlink()) for top in tops if top.is_symlink()}


def readable(trainer_module: str, more: Iterable[str | Path] = ()) -> list[str]:
    """Paths, each once and none below another. Code is named package by package: a checkout may hold `.tunery`."""
    tops = [Path("/") / name for name in _TOP]
    found = {Path(one) for one in _SYSTEM} | {top for top in tops if top.is_dir() and not top.is_symlink()}
    found |= {Path(sys.prefix), Path(sys.base_prefix), Path(sys.exec_prefix), Path(sys.executable).resolve().parent}
    for entry in _import_paths():
        found |= _of_import_path(entry)
    found |= {ROOT / name for name in _PACKAGES} | _module(trainer_module)
    for name in ("LD_LIBRARY_PATH", "CUDA_HOME"):
        found |= {Path(one) for one in os.environ.get(name, "").split(os.pathsep) if one.startswith("/")}
    found |= {Path(one).absolute() for one in more if one}
    found |= {path.resolve() for path in found}
    return outermost(path for path in found if path.exists() and path != Path("/"))


def nvidia(minors: Iterable[int]) -> list[str]:
    """Device nodes of some GPUs and what they share; empty on a host without any."""
    nodes = [Path("/dev") / name for name in (*_NVIDIA, *(f"nvidia{minor}" for minor in minors))]
    return [str(node) for node in nodes if node.exists()]


def _import_paths() -> list[Path]:
    """Where the interpreter itself looks: not our working directory, nor what somebody's PYTHONPATH adds for us."""
    given = sys.path if sys.flags.safe_path else sys.path[1:]
    ours = {Path(one).absolute() for one in os.environ.get("PYTHONPATH", "").split(os.pathsep) if one}
    return [path for one in given if one and (path := Path(one).absolute()) not in ours]


def _of_import_path(entry: Path) -> set[Path]:
    if all((entry / name).is_dir() for name in _PACKAGES):
        return {entry / name for name in _PACKAGES}
    return {entry}


def _module(name: str) -> set[Path]:
    """The trainer's own package, if it is not ours."""
    found = importlib.util.find_spec(name.partition(".")[0])
    if found is None:
        return set()
    return {Path(place) for place in found.submodule_search_locations or [found.origin or sys.prefix]}


def outermost(paths: Iterable[Path]) -> list[str]:
    """Without those that lie in another."""
    kept: list[Path] = []
    for path in sorted(set(paths)):
        if not any(path.is_relative_to(outer) for outer in kept):
            kept.append(path)
    return [str(path) for path in kept]
