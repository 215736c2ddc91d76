"""How busy an attempt's devices are and how much memory is in use there, told to the job every few seconds.

A GPU is asked once a second and averaged. A CPU device is the processor time of the trainer's processes, counted by
the kernel, as a share of the cores that it may use. Nothing that goes wrong here stops any training.
"""

import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import structlog

from tunery import samples
from tunery.contracts.events import Event, Metrics
from tunery.db import Sessions, transaction
from tunery.leases import Fenced
from tunery.samples import Sample
from tunery.settings import NodeSettings
from worker import inventory, processes
from worker.workspace import Work

log = structlog.get_logger(__name__)

_LOOK_S = 1.0
_MOST_FAILED_LOOKS = 10
"""In a row. A driver that fails so often is not asked again."""
_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Reading:
    """Since the reading before. `utilization` is the mean of the devices, 0 to 1; `memory_bytes` their sum."""

    utilization: float
    memory_bytes: int


class Source(Protocol):
    """Whatever can say how busy devices are."""

    def look(self) -> None:
        """Once a second: what is only known of a moment."""
        ...

    def take(self) -> Reading | None:
        """What was seen since the last call; None if nothing can be said."""
        ...


class Gpus:
    """As NVML sees whole devices: where attempts share one, all of them together."""

    def __init__(self, uuids: Sequence[str]) -> None:
        self._uuids = uuids
        self._opened = False
        self._busy: list[float] = []
        self._memory = 0

    def look(self) -> None:
        if not self._opened:  # here, on the sampler's thread: a driver may hang
            inventory.keep_driver_open()
            self._opened = True
        seen = inventory.readings(self._uuids)
        busy = [one.utilization for one in seen if one.utilization == one.utilization]  # one in MIG mode does not say
        self._memory = sum(one.used_bytes for one in seen)
        if busy:
            self._busy.append(sum(busy) / len(busy))

    def take(self) -> Reading | None:
        busy, self._busy = self._busy, []
        return Reading(sum(busy) / len(busy), self._memory) if busy else None


class Cpu:
    """The processes of an attempt on `cores` cores, by the kernel's own counters."""

    def __init__(self, attempt_id: str, cores: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._attempt_id, self._cores, self._clock = attempt_id, cores, clock
        self._before = (clock(), 0.0)

    def look(self) -> None:
        pass

    def take(self) -> Reading | None:
        then, spent_then = self._before
        spent, memory = self._spent()
        self._before = now, _ = self._clock(), spent
        if not memory or now <= then:
            return None
        share = max(0.0, spent - spent_then) / (now - then) / self._cores
        return Reading(min(1.0, share), memory)

    def _spent(self) -> tuple[float, int]:
        """Seconds on a core by all of them, and bytes resident. A child's seconds are its parent's once it is gone."""
        ticks = pages = 0
        for pid in processes.marked(self._attempt_id):
            with suppress(OSError, ValueError, IndexError):
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                ticks += sum(int(field) for field in fields[11:15])
                pages += int(fields[21])
        return ticks / _TICKS, pages * _PAGE


def source_of(work: Work, settings: NodeSettings) -> Source | None:
    """None for an attempt inside an engine: what others do there cannot be told from what it does."""
    if work.engine_socket is not None:
        return None
    gpus = [uuid for kind, uuid in work.devices if kind == "cuda"]
    if gpus:
        return Gpus(gpus)
    return Cpu(str(work.attempt_id), settings.trainer_threads or inventory.usable_cores())


class Sampler:
    """A thread of its own: neither a slow driver nor a slow database delays anything else."""

    def __init__(self, work: Work, sessions: Sessions, settings: NodeSettings, source: Source | None) -> None:
        self._work, self._sessions, self._settings, self._source = work, sessions, settings, source
        self._device = "GPU" if any(kind == "cuda" for kind, _ in work.devices) else "CPU"
        self._training = threading.Event()
        self._over = threading.Event()
        self._low: list[float] = []
        """Readings of an episode of too little use: each came one pause after the one before."""
        self._low_since = 0.0
        self._thread = threading.Thread(target=self._run, name="sampler", daemon=True)

    def start(self) -> None:
        if self._source is not None:
            self._thread.start()

    def hear(self, event: Event) -> None:
        """From the first step on a device that does little is worth a word."""
        if isinstance(event, Metrics):
            self._training.set()

    def finish(self) -> None:
        """No sample is begun after this. Does not wait: the one on its way may hang in a driver or a database."""
        self._over.set()

    def _run(self) -> None:
        assert self._source is not None
        due = time.monotonic() + self._settings.sample_s
        failed = 0
        try:
            self._source.take()
            while not self._over.wait(min(_LOOK_S, self._settings.sample_s)):
                try:
                    self._source.look()
                    failed = 0
                except Exception:  # a driver may fail in any way it likes: then this look is missing
                    failed += 1
                    if failed == _MOST_FAILED_LOOKS:
                        raise
                if time.monotonic() < due:
                    continue
                due = time.monotonic() + self._settings.sample_s
                if (reading := self._source.take()) is not None:
                    self._tell(self.judge(reading, time.monotonic()))
        except Fenced:
            return  # the keeper finds out for itself, and acts
        except Exception:
            log.warning("no more samples of this attempt", exc_info=True)

    def judge(self, reading: Reading, now: float) -> Sample:
        """The reading, and how long the devices have done too little by now."""
        below = self._settings.underused_below
        if reading.utilization >= below or not self._training.is_set():
            self._low.clear()
            return Sample(reading.utilization, reading.memory_bytes, device=self._device)
        if not self._low:
            self._low_since = now - self._settings.sample_s
        self._low.append(reading.utilization)
        mean, low_s = sum(self._low) / len(self._low), now - self._low_since
        return Sample(reading.utilization, reading.memory_bytes, low_s, mean, self._device)

    def _tell(self, sample: Sample) -> None:
        limits: dict[str, Any] = {
            "below": self._settings.underused_below,
            "after_s": self._settings.underused_after_s,
        }
        try:
            with transaction(self._sessions) as session:
                samples.store(session, self._work.attempt_id, self._work.fence, sample, **limits)
        except Fenced:
            raise
        except Exception as error:  # noqa: BLE001 - the next one tells more
            log.info("a sample was not stored", error=str(error)[:200])
