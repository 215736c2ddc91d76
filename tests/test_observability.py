"""What operators see of a running deployment: one trace, lines with ids and no secrets, metrics, honest readiness."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from tests.fleet import PEPPER, ROOT, ROWS, Fleet, fleet
from tests.servers import passwords, private_servers
from tunery import ids
from tunery.embedded import ports
from tunery.embedded.readable import readable

CLIENT_TRACE, CLIENT_SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@dataclass
class Collector:
    """An OTLP/HTTP receiver: what an OpenTelemetry collector would be sent."""

    spans: list[tuple[str, Any]] = field(default_factory=list)
    """Service and span."""

    def named(self, name: str) -> list[Any]:
        return [span for _, span in list(self.spans) if span.name == name]


@pytest.fixture(scope="module")
def collector() -> Iterator[tuple[Collector, str]]:
    got = Collector()

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            assert self.path == "/v1/traces" and self.headers["content-type"] == "application/x-protobuf"
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                named = {one.key: one.value.string_value for one in resource.resource.attributes}
                for scope in resource.scope_spans:
                    got.spans += [(named["service.name"], span) for span in scope.spans]
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield got, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@dataclass
class Seen:
    """A deployment that has run one job over two attempts."""

    fleet: Fleet
    ops: dict[str, str]
    job: dict[str, Any]
    key: str
    traced: Collector

    def metrics(self, program: str) -> dict[str, Metric]:
        answer = httpx.get(f"{self.ops[program]}/metrics", trust_env=False, timeout=10)
        assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/plain")
        return {family.name: family for family in text_string_to_metric_families(answer.text)}

    def log_lines(self) -> list[dict[str, Any]]:
        home = self.fleet.home
        paths = [*home.glob("*.log"), *home.glob("*/attempts/*.log")]
        return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def seen(collector: tuple[Collector, str]) -> Iterator[Seen]:
    got, endpoint = collector
    taken: set[int] = set()
    chosen = {name: ports.choose(taken) for name in ("api", "scheduler", "node")}
    with private_servers() as servers, pytest.MonkeyPatch.context() as patch, fleet(on=servers) as running:
        patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "200")
        running.serve_api(OPS_PORT=str(chosen["api"]))
        running.scheduler(OPS_PORT=str(chosen["scheduler"]))
        running.node(OPS_PORT=str(chosen["node"]))
        ops = {name: f"http://127.0.0.1:{port}" for name, port in chosen.items()}
        with running.client() as client:
            key = client.headers["authorization"].removeprefix("Bearer ")
            job = _train(running, client)
        yield Seen(running, ops, job, key, got)


def _train(running: Fleet, client: httpx.Client) -> dict[str, Any]:
    """A job whose trainer is killed once, submitted within a trace of the client's own."""
    rows = client.post("/v1/files", files={"file": ("rows.jsonl", ROWS)}, data={"purpose": "fine-tune"}).json()
    body = {
        "model": "tiny",
        "training_file": rows["id"],
        "suffix": "crash-15",
        "tunery": {"training": {"max_steps": 20, "save_steps": 10}},
    }
    headers = {"traceparent": f"00-{CLIENT_TRACE}-{CLIENT_SPAN}-01", "x-request-id": "request-of-this-test"}
    answer = client.post("/v1/fine_tuning/jobs", json=body, headers=headers)
    assert answer.status_code == 200 and answer.headers["x-request-id"] == "request-of-this-test"
    job = answer.json()
    assert running.ends(ids.decode(ids.JOB, job["id"]), 90) == "succeeded"
    return job


def test_one_trace_leads_from_the_request_to_the_last_step_of_the_second_attempt(seen: Seen) -> None:
    seen.fleet.until(lambda: len(seen.traced.named("tunery.attempt")) == 2, 20)
    seen.fleet.until(lambda: len(seen.traced.named("tunery.job.queue")) == 2, 20)
    trace = bytes.fromhex(CLIENT_TRACE)
    ours = [(service, span) for service, span in list(seen.traced.spans) if span.trace_id == trace]
    assert {service for service, _ in ours} == {"tunery-api", "tunery-scheduler", "tunery-node", "tunery-supervisor"}
    known = {span.span_id for _, span in ours} | {bytes.fromhex(CLIENT_SPAN)}
    assert all(span.parent_span_id in known for _, span in ours), "a span hangs in the air"
    names = {span.name for _, span in ours}
    assert names >= {
        "POST /v1/fine_tuning/jobs", "tunery.job.submit", "tunery.job.validate", "tunery.job.queue",
        "tunery.outbox.ring", "tunery.attempt", "tunery.attempt.claim", "tunery.job.prepare", "tunery.train.loading",
        "tunery.train.steps", "tunery.checkpoint.upload", "tunery.job.settle",
    }  # fmt: skip
    first, second = sorted(seen.traced.named("tunery.job.queue"), key=lambda span: span.start_time_unix_nano)
    assert [link.span_id for link in second.links] == [first.span_id] and not first.links
    assert {span.parent_span_id for span in seen.traced.named("tunery.attempt")} == {first.span_id, second.span_id}
    steps = [_attributes(span) for span in seen.traced.named("tunery.train.steps")]
    assert max(one["tunery.step.last"] for one in steps) == 20
    (request,) = seen.traced.named("POST /v1/fine_tuning/jobs")
    told = _attributes(request)
    assert told["http.request.method"] == "POST" and told["http.response.status_code"] == 200
    killed = [span for span in seen.traced.named("tunery.train.loading") if span.status.code == 2]
    assert len(killed) == 1, "the phase in which the trainer was killed says so"


def _attributes(span: Any) -> dict[str, Any]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in span.attributes}


def test_every_line_is_json_with_the_ids_that_are_known(seen: Seen) -> None:
    seen.fleet.until(lambda: sum(line["message"] == "over" for line in seen.log_lines()) == 2)
    lines = seen.log_lines()
    assert {line["program"] for line in lines} >= {"api", "scheduler", "node", "supervisor"}
    for line in lines:
        assert line["version"] and line["message"] and line["level"] and line["time"].endswith("Z"), line
    (accepted,) = [line for line in lines if line["message"] == "job accepted"]
    assert accepted["request_id"] == "request-of-this-test" and accepted["job"] == seen.job["id"]
    assert accepted["project"].startswith("proj_") and accepted["key"].startswith("key_")
    assigned = [line for line in lines if line["message"] == "attempt assigned"]
    assert [line["no"] for line in assigned] == [1, 2] and assigned[0]["fence"] < assigned[1]["fence"]
    assert all(line["epoch"] >= 1 and line["job"] == seen.job["id"] and line["node"] for line in assigned)
    published = [line for line in lines if line["message"] == "published"]
    assert [(line["job"], line["no"], line["fence"]) for line in published] == [
        (seen.job["id"], 2, assigned[1]["fence"])
    ]
    for line in (accepted, *assigned, *published):
        assert line["trace_id"] == CLIENT_TRACE, line
    started = [line for line in lines if line.get("logger", "").startswith("uvicorn")]
    assert started, "uvicorn's own lines are among them"


def test_no_secret_of_the_deployment_is_in_any_log(seen: Seen) -> None:
    servers = seen.fleet.servers
    secrets = [*passwords().values(), PEPPER, seen.key, servers.s3_root.secret_access_key]
    secrets += [
        servers.s3_node.secret_access_key,
        servers.redis_url,
        servers.admin_url,
        *servers.home.secrets().all().values(),
    ]
    secrets += [seen.fleet.url(role) for role in ("tunery_api", "tunery_scheduler", "tunery_worker")]
    httpx.get(f"{seen.fleet.api_url}/v1/files", headers={"authorization": "Bearer ftk_live_wrong_key"}, trust_env=False)
    home = seen.fleet.home
    text = "".join(path.read_text() for path in [*home.glob("*.log"), *home.glob("*/attempts/*.log")])
    assert len(text) > 1000
    assert [secret[:4] for secret in secrets if len(secret) > 5 and secret in text] == []


def test_wrong_settings_are_named_and_not_quoted() -> None:
    own = {"PATH": os.environ["PATH"], "TUNERY_DATABASE_URL": "postgresql://u:hush-hush@x/y", "TUNERY_LEASE_S": "soon"}
    for program in ("scheduler", "worker"):
        done = subprocess.run(
            [sys.executable, "-m", program], env=own, cwd=ROOT, capture_output=True, text=True, timeout=60
        )
        (line,) = [json.loads(line) for line in done.stderr.splitlines()]
        assert done.returncode == 2 and "TUNERY_LEASE_S" in line["variables"]
        assert "hush" not in done.stderr


def test_lines_for_people() -> None:
    line = {
        "program": "api",
        "version": "1",
        "level": "info",
        "time": "2026-01-02T03:04:05.678901Z",
        "message": "took it",
    }
    shown = readable(json.dumps(line | {"job": "ftjob-1", "why": "two words"}))
    assert shown.endswith('info     api        took it  job=ftjob-1 why="two words"') and ".678 " in shown
    assert readable("LOG:  database system is ready") == "LOG:  database system is ready"
    assert readable('{"half') == '{"half'


# ---- metrics ------------------------------------------------------------------------------------------------------

EXPOSED = {
    "api": {"tunery_http_request_duration_seconds", "tunery_uploaded_bytes"},
    "scheduler": {
        "tunery_jobs", "tunery_jobs_finished", "tunery_jobs_failed", "tunery_job_queue_wait_seconds",
        "tunery_job_duration_seconds", "tunery_jobs_oldest_wait_seconds", "tunery_worker_up",
        "tunery_worker_heartbeat_age_seconds", "tunery_outbox_messages", "tunery_outbox_oldest_age_seconds",
        "tunery_leader_up", "tunery_scheduler_leading", "tunery_scheduler_epoch",
        "tunery_scheduler_pass_duration_seconds", "tunery_attempts_lost", "tunery_storage_bytes",
    },
    "node": {
        "tunery_train_step_seconds", "tunery_train_tokens", "tunery_checkpoint_upload_duration_seconds",
        "tunery_lease_renewals_late", "tunery_gpu_memory_used_bytes", "tunery_gpu_utilization_ratio",
        "tunery_node_disk_free_bytes", "tunery_node_disk_bytes",
    },
}  # fmt: skip
EVERYWHERE = {"tunery_build_info", "tunery_ready", "tunery_dependency_up"}
TENANTS = {"project", "project_id", "organization", "job", "job_id", "key", "user", "attempt"}


@pytest.mark.parametrize("program", EXPOSED)
def test_metrics_have_the_names_and_say_what_they_are(seen: Seen, program: str) -> None:
    found = seen.metrics(program)
    assert found.keys() >= EXPOSED[program] | EVERYWHERE
    for name, family in found.items():
        if name.startswith("tunery_"):
            assert family.documentation and family.type != "unknown", name
            assert not {label for sample in family.samples for label in sample.labels} & TENANTS, name
            counted = [sample.name for sample in family.samples if family.type == "counter"]
            assert all(sample.endswith("_total") for sample in counted), name
    assert {sample.value for sample in found["tunery_dependency_up"].samples} == {1.0}


def test_metrics_tell_what_happened(seen: Seen) -> None:
    ended = ("tunery_jobs_finished_total", "supervised", "succeeded")
    seen.fleet.until(lambda: ended in _values(seen.metrics("scheduler")))
    scheduler = _values(seen.metrics("scheduler"))
    assert scheduler[ended] == 1
    assert scheduler["tunery_job_queue_wait_seconds_count",] == 1
    assert scheduler["tunery_scheduler_leading",] == scheduler["tunery_leader_up",] == 1
    assert scheduler["tunery_jobs", "supervised", "queued"] == 0
    assert scheduler["tunery_storage_bytes", "files"] == len(ROWS)
    assert [value for key, value in scheduler.items() if key[0] == "tunery_worker_up"] == [1]
    node = _values(seen.metrics("node"))
    assert node["tunery_train_tokens_total",] >= 7 * 14, "of an attempt that was killed, what it said before"
    assert node["tunery_train_step_seconds_count",] >= 20
    assert node["tunery_checkpoint_upload_duration_seconds_count",] >= 1
    assert _values(seen.metrics("api"))["tunery_uploaded_bytes_total",] == len(ROWS)


def _values(families: dict[str, Metric]) -> dict[tuple[str, ...], float]:
    return {
        (sample.name, *(sample.labels[name] for name in sorted(sample.labels))): sample.value
        for family in families.values()
        for sample in family.samples
        if family.name.startswith("tunery_")
    }


def test_tenants_see_no_metrics(seen: Seen) -> None:
    with seen.fleet.client() as client:
        assert client.get("/metrics").status_code == 404


def test_every_metric_that_monitoring_names_exists(seen: Seen) -> None:
    known: set[str] = set()
    for program in EXPOSED:
        for family in seen.metrics(program).values():
            known |= {family.name, *(sample.name for sample in family.samples)}
            known |= {f"{family.name}_total"} if family.type == "counter" else set()
            known |= (
                {f"{family.name}_{end}" for end in ("bucket", "sum", "count")} if family.type == "histogram" else set()
            )
    folder = ROOT / "deploy/monitoring"
    for path in (folder / "alerts.yml", folder / "grafana-dashboard.json"):
        named = set(re.findall(r"\btunery_[a-z0-9_]+", path.read_text()))
        assert named and named <= known, f"{path.name}: {named - known}"
    json.loads((folder / "grafana-dashboard.json").read_text())


# ---- readiness ----------------------------------------------------------------------------------------------------


def _stop(pid: int, number: signal.Signals) -> None:
    root = psutil.Process(pid)
    for process in [root, *root.children(recursive=True)]:
        process.send_signal(number)


@pytest.mark.parametrize(
    ("server", "part", "status"), [("valkey", "redis", 200), ("s3", "storage", 503), ("postgres", "database", 503)]
)
def test_a_server_that_hangs_makes_readiness_honest_and_nothing_hang(
    seen: Seen, server: str, part: str, status: int
) -> None:
    api, pid = seen.fleet.api_url, seen.fleet.servers.children[server].pid
    assert pid is not None
    headers = {"authorization": f"Bearer {seen.key}"}
    expected = "degraded" if status == 200 else "not ready"
    # the promise is 2 s; the rest is for a machine that is busy with other tests
    patient = httpx.Client(trust_env=False, timeout=5)
    _stop(pid, signal.SIGSTOP)
    try:
        with ThreadPoolExecutor(60) as pool:
            hanging = [pool.submit(_ignore, f"{api}/v1/files", headers) for _ in range(60)]
            for url in (api, *seen.ops.values()):
                assert patient.get(f"{url}/livez").status_code == 200
            for url in (api, seen.ops["api"], seen.ops["node"]):
                # an answer is kept for a second
                seen.fleet.until(lambda url=url: patient.get(f"{url}/readyz").json()["status"] == expected, 10)
                ready = patient.get(f"{url}/readyz")
                assert ready.status_code == status and ready.json()["parts"][part] != "ok"
            if server != "s3":
                told = patient.get(f"{seen.ops['scheduler']}/readyz")
                assert told.status_code == status and told.json()["parts"][part] != "ok"
            assert patient.get(f"{seen.ops['scheduler']}/metrics").status_code == 200
            _stop(pid, signal.SIGCONT)
            assert all(future.result() is None for future in hanging)
    finally:
        _stop(pid, signal.SIGCONT)
    seen.fleet.until(
        lambda: all(patient.get(f"{url}/readyz").json()["status"] == "ready" for url in (api, *seen.ops.values()))
    )


def _ignore(url: str, headers: dict[str, str]) -> None:
    try:
        httpx.get(url, headers=headers, trust_env=False, timeout=30)
    except httpx.HTTPError:
        pass


def test_a_scheduler_says_whether_it_leads(seen: Seen) -> None:
    told = httpx.get(f"{seen.ops['scheduler']}/readyz", trust_env=False).json()
    assert told["role"] == "leading" and told["epoch"] >= 1 and told["last_pass_age_s"] < 30


def test_a_program_that_drains_says_so_first(seen: Seen, tmp_path: Path) -> None:
    """The last test here: it ends the api."""
    api = seen.fleet.processes[0]
    api.send_signal(signal.SIGTERM)
    assert api.wait(20) == 0
    port, ops = ports.choose(set()), ports.choose(set())
    seen.fleet.api_url = f"http://127.0.0.1:{port}"
    slow = seen.fleet.serve_api(OPS_PORT=str(ops), DRAIN_S="3", API_PORT=str(port))
    slow.send_signal(signal.SIGTERM)
    seen.fleet.until(lambda: httpx.get(f"http://127.0.0.1:{port}/readyz", trust_env=False).status_code == 503, 3)
    assert httpx.get(f"http://127.0.0.1:{port}/livez", trust_env=False).status_code == 200
    assert slow.wait(20) == 0
