"""Numbers of training: counted by the supervisor, told by the node.

A supervisor has no port. It writes what it has counted to `attempts/<id>.prom`, in Prometheus' text format; when the
node is scraped it adds up the files of the living and its own memory of those that are over. A node that restarts
starts its counters anew, as every process does.
"""

import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from tunery.contracts.events import Eval, Event, Metrics, Phase, Started

_EVERY_S = 5.0
_STEP_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_UPLOAD_BUCKETS = (0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 900)

Key = tuple[str, str, tuple[tuple[str, str], ...]]
"""Family, sample, labels."""

disable_created_metrics()


class Meters:
    """One attempt's counts. `hear` is for one thread; the rest may be called from any."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.registry = own = CollectorRegistry()
        self._steps = Histogram("tunery_train_step_seconds", "One optimizer step.", buckets=_STEP_BUCKETS, registry=own)
        self._tokens = Counter("tunery_train_tokens_total", "Tokens trained on.", registry=own)
        self.uploads = Histogram(
            "tunery_checkpoint_upload_duration_seconds",
            "Storing and verifying a checkpoint.",
            buckets=_UPLOAD_BUCKETS,
            registry=own,
        )
        self.late_renewals = Counter(
            "tunery_lease_renewals_late_total", "Renewals that came later than twice their pause.", registry=own
        )
        self._before: Metrics | None = None
        self._counted: int | None = None
        self._saved = 0.0

    def hear(self, event: Event) -> None:
        match event:
            case Started():
                self._counted = 0 if event.start_step == 0 else None
            case Phase() | Eval():
                self._before = None  # what lies between is no step
            case Metrics():
                self._step(event)
            case _:
                pass

    def _step(self, event: Metrics) -> None:
        """Metrics may be dropped: the time since the last one that came is shared by the steps between."""
        if (before := self._before) is not None and event.step > before.step:
            steps = min(event.step - before.step, 1000)
            for _ in range(steps):
                self._steps.observe(max(0.0, event.time - before.time) / steps)
        if self._counted is not None and event.tokens > self._counted:
            self._tokens.inc(event.tokens - self._counted)
        self._before, self._counted = event, event.tokens

    def save(self, *, now: bool = False) -> None:
        """Every few seconds at most, unless `now`."""
        if not now and time.monotonic() - self._saved < _EVERY_S:
            return
        self._saved = time.monotonic()
        draft = self._path.with_suffix(".part")
        try:
            draft.write_bytes(generate_latest(self.registry))
            draft.replace(self._path)
        except OSError:
            draft.unlink(missing_ok=True)  # a full disk is told elsewhere, and stops no training


class AttemptMeters(Collector):
    """The sum over a node's attempts. `alive` says of an attempt's id whether its supervisor still counts."""

    def __init__(self, folder: Path, alive: Callable[[str], bool]) -> None:
        self._folder, self._alive = folder, alive
        self._over: dict[Key, float] = {}
        self._folding = threading.Lock()

    def describe(self) -> Iterable[Metric]:
        return Meters(self._folder / "none").registry.collect()

    def collect(self) -> Iterable[Metric]:
        families = {family.name: family for family in self.describe()}
        sums = {key: 0.0 for family in families.values() for key in _values(family)}
        self.fold()
        for path in self._folder.glob("*.prom"):
            _add(sums, _read(path))
        _add(sums, self._over)
        for family in families.values():
            family.samples.clear()
        for (name, sample, labels), value in sums.items():
            if name in families:  # a supervisor of another version may count more
                families[name].add_sample(sample, dict(labels), value)
        return families.values()

    def fold(self) -> None:
        """Take over what attempts have counted that are over; also where nobody scrapes, or files would pile up."""
        with self._folding:
            for path in self._folder.glob("*.prom"):
                if not self._alive(path.stem):  # asked before reading: its last word has been written
                    _add(self._over, _read(path))
                    path.unlink(missing_ok=True)


def _read(path: Path) -> dict[Key, float]:
    found: dict[Key, float] = {}
    try:
        for family in text_string_to_metric_families(path.read_text()):
            found |= _values(family)
    except (OSError, ValueError):  # gone meanwhile
        return {}
    return found


def _values(family: Metric) -> dict[Key, float]:
    return {(family.name, one.name, tuple(one.labels.items())): one.value for one in family.samples}


def _add(sums: dict[Key, float], more: dict[Key, float]) -> None:
    for key, value in more.items():
        sums[key] = sums.get(key, 0.0) + value
