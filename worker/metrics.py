"""What a node measures when it is scraped: its devices, as NVML sees them, and its disk."""

import shutil
from collections.abc import Iterable
from pathlib import Path

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from tunery.telemetry.asking import Asked
from worker import inventory

_LABELS = ["gpu", "uuid", "gpu_model"]


class NodeMetrics(Collector):
    def __init__(self, home: Path) -> None:
        self._home = home
        # a sick GPU can make the driver hang: the rest is told all the same
        self._gpus = Asked(inventory.readings)

    def describe(self) -> Iterable[Metric]:
        return ()  # registering asks nothing

    def collect(self) -> Iterable[Metric]:
        try:
            readings = self._gpus.get()
        except Exception:  # noqa: BLE001 - absent numbers are what alerts look for
            readings = []
        used = GaugeMetricFamily("tunery_gpu_memory_used_bytes", "Memory in use, by anybody.", labels=_LABELS)
        total = GaugeMetricFamily("tunery_gpu_memory_bytes", "Memory that the GPU has.", labels=_LABELS)
        busy = GaugeMetricFamily("tunery_gpu_utilization_ratio", "Share of time a kernel ran.", labels=_LABELS)
        for one in readings:
            labels = [str(one.index), one.uuid, one.name]
            used.add_metric(labels, one.used_bytes)
            total.add_metric(labels, one.total_bytes)
            busy.add_metric(labels, one.utilization)
        disk = shutil.disk_usage(self._home)
        free = GaugeMetricFamily("tunery_node_disk_free_bytes", "Free on the disk of the node's home.", value=disk.free)
        size = GaugeMetricFamily("tunery_node_disk_bytes", "Size of that disk.", value=disk.total)
        return used, total, busy, free, size
