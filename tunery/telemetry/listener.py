"""The operations listener of a program: `/livez`, `/readyz` and `/metrics`, for operators and not for tenants.

It is a port of its own, on loopback unless told otherwise: how many jobs wait, how full the disks are and which
routes are slow is nobody's business who only has a key.
"""

import json
import threading
from collections.abc import Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import structlog
from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, CollectorRegistry, disable_created_metrics, generate_latest
from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from tunery import __version__
from tunery.settings import OpsSettings
from tunery.telemetry.health import Health

log = structlog.get_logger(__name__)

disable_created_metrics()  # a second series for each counter, which nothing reads


class Dependencies(Collector):
    """Readiness as numbers, for alerts."""

    def __init__(self, program: str, health: Health) -> None:
        self._program, self._health = program, health

    def describe(self) -> Iterable[Metric]:
        return ()  # registering asks nothing

    def collect(self) -> Iterable[Metric]:
        report = self._health.report()
        build = InfoMetricFamily("tunery_build", "The program and its version.")
        build.add_metric([], {"program": self._program, "version": __version__})
        yield build
        yield GaugeMetricFamily("tunery_ready", "Whether /readyz answers 200.", value=float(report.ready))
        parts = GaugeMetricFamily("tunery_dependency_up", "Whether what /readyz asks works.", labels=["dependency"])
        for name in report.parts:
            parts.add_metric([name], float(name not in report.failing))
        yield parts


def listen(program: str, settings: OpsSettings, health: Health, collectors: Iterable[Collector] = ()) -> None:
    """Serve in the background until the process ends. A port that is taken is told, and keeps nothing from running."""
    if settings.ops_port == 0:
        return
    for collector in (Dependencies(program, health), *collectors):
        REGISTRY.register(collector)
    try:
        server = ThreadingHTTPServer((settings.ops_host, settings.ops_port), _handler(health, REGISTRY))
    except OSError as error:
        log.error("no operations listener", port=settings.ops_port, error=str(error), fix="set TUNERY_OPS_PORT")
        return
    server.daemon_threads = True
    # nobody calls shutdown(): a long poll interval means that an idle listener never wakes up
    threading.Thread(target=server.serve_forever, args=(3600,), name="operations", daemon=True).start()
    log.info("operations listener", host=settings.ops_host, port=settings.ops_port)


def _handler(health: Health, registry: CollectorRegistry) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = 5
        server_version, sys_version = "tunery", ""

        def do_GET(self) -> None:
            match self.path.partition("?")[0]:
                case "/livez" | "/healthz":
                    self._json(200, {"status": "ok"})
                case "/readyz":
                    report = health.report()
                    self._json(200 if report.ready else 503, report.body())
                case "/metrics":
                    self._send(200, CONTENT_TYPE_LATEST, generate_latest(registry))
                case _:
                    self._json(404, {"error": "There is /livez, /readyz and /metrics."})

        def _json(self, status: int, body: object) -> None:
            self._send(status, "application/json", json.dumps(body).encode())

        def _send(self, status: int, kind: str, body: bytes) -> None:
            self.send_response(status)
            self.send_header("content-type", kind)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            log.debug("operations request", path=self.path[:100], said=format % args)

    return Handler
