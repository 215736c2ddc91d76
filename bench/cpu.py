"""CPU seconds of a deployment's processes, from /proc: everything below `tunery up`, trainers left out."""

import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path

_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class _Process:
    pid: int
    parent: int
    own_s: float
    reaped_s: float
    """Of its children that have ended and were waited for: a process that comes and goes between two looks."""


def trainers(up: int) -> list[int]:
    """Processes below any supervisor."""
    return [pid for pid, label in _labelled(up, _all()).items() if label == "trainer"]


def seconds(up: int) -> dict[str, float]:
    """CPU seconds so far, by program. `up` is the pid of `tunery up`."""
    known = _all()
    found: dict[str, float] = {}
    for pid, label in _labelled(up, known).items():
        if label != "trainer":
            # a supervisor waits for its trainer, whose time is not the platform's
            more = 0.0 if label == "supervisor" else known[pid].reaped_s
            found[label] = found.get(label, 0.0) + known[pid].own_s + more
    return found


class Sampler:
    """Looks every `every_s` from a thread; `between` gives cores by program over an interval of Unix time."""

    def __init__(self, up: int, every_s: float = 0.5) -> None:
        self._up, self._every_s = up, every_s
        self._samples: list[tuple[float, dict[str, float]]] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Sampler":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def between(self, begin: float, end: float) -> tuple[float, dict[str, float]]:
        """Seconds looked at, and cores by program."""
        inside = [sample for sample in self._samples if begin <= sample[0] <= end]
        (first, before), (last, after) = inside[0], inside[-1]
        took = last - first
        return took, {name: (after[name] - before.get(name, 0.0)) / took for name in sorted(after)}

    def _run(self) -> None:
        while not self._over.wait(self._every_s):
            self._samples.append((time.time(), seconds(self._up)))


def _all() -> dict[int, _Process]:
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            own, reaped = (sum(map(int, fields[at : at + 2])) * _TICK_S for at in (11, 13))
            found[int(entry.name)] = _Process(int(entry.name), int(fields[1]), own, reaped)
    return found


def _labelled(up: int, known: dict[int, _Process]) -> dict[int, str]:
    children: dict[int, list[int]] = {}
    for process in known.values():
        children.setdefault(process.parent, []).append(process.pid)
    labels: dict[int, str] = {}
    waiting = [(up, "tunery up")] if up in known else []
    while waiting:
        pid, label = waiting.pop()
        labels[pid] = label
        waiting += [(child, _label(child, label)) for child in children.get(pid, [])]
    return labels


def _label(pid: int, parent: str) -> str:
    if parent in ("supervisor", "trainer"):
        return "trainer"
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return parent
    programs = {
        "worker.supervisor": "supervisor",
        "worker.standby": "supervisor",
        "worker.ring": "ring",
        "-m worker": "node",
    }
    programs |= {"-m api": "api", "-m scheduler": "scheduler", "-m notifier": "notifier", "valkey": "valkey"}
    programs |= {"weed": "s3", "postgres": "postgres"}
    return next((name for mark, name in programs.items() if mark in words), parent)
