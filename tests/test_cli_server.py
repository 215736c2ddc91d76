"""A small real HTTP server that answers as the API does, for the tests of the client and the command line.

It holds no test; `Server` is what the others import.
"""

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

KEY = "tk_test_0123456789"
JOB_ID = "ftjob-01j8zq5t8e7c4b6a9d2f"
WEIGHTS = b"weights " * 4096
CONFIG = b'{"peft_type": "LORA"}'

Answer = tuple[int, dict[str, str], bytes]


def reply(document: Any, status: int = 200, **headers: str) -> Answer:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return status, {"content-type": "application/json", **named}, json.dumps(document).encode()


def refuse(status: int, message: str, code: str, **extra: Any) -> Answer:
    headers = extra.pop("headers", {})
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": code, **extra}
    return reply({"error": error}, status, **{"x_request_id": "req_42", **headers})


def page(rows: list[dict[str, Any]], query: dict[str, str]) -> Answer:
    start = next((i + 1 for i, row in enumerate(rows) if row["id"] == query.get("after")), 0)
    limit = int(query.get("limit", 20))
    shown = rows[start : start + limit]
    more = len(rows) > start + limit
    ends = {"first_id": shown[0]["id"] if shown else None, "last_id": shown[-1]["id"] if shown else None}
    return reply({"object": "list", "data": shown, "has_more": more, **ends})


def job(job_id: str = JOB_ID, state: str = "queued", **tunery: Any) -> dict[str, Any]:
    status = {"validating": "validating_files", "starting": "queued"}.get(state, state)
    done = state in ("succeeded", "failed", "cancelled")
    now = int(time.time())
    return {
        "id": job_id,
        "object": "fine_tuning.job",
        "created_at": now - 134,
        "finished_at": now if done else None,
        "model": "smollm2-135m-instruct",
        "fine_tuned_model": "ft:smollm2-135m-instruct:acme:capitals:8e7c4b" if state == "succeeded" else None,
        "status": status,
        "error": None,
        "training_file": "file-abc123",
        "validation_file": None,
        "hyperparameters": {"n_epochs": 3, "batch_size": "auto", "learning_rate_multiplier": "auto"},
        "seed": 7,
        "result_files": [],
        "trained_tokens": None,
        "organization_id": "org-1",
        "metadata": {"team": "nlp"},
        "tunery": {"state": state, "queue": None, "progress": None, "attempts": [], "adapter": None, **tunery},
    }


def progress(step: int, total: int = 40, phase: str = "training") -> dict[str, Any]:
    return {
        "phase": phase,
        "step": step,
        "total_steps": total,
        "loss": 3.2 - step * 0.05,
        "eval_loss": 1.311 if step > 20 else None,
        "tokens_per_second": 2104.5,
        "eta_seconds": 80,
        "percent": 100 * step / total,
    }


ADAPTER = {"id": "adapter-1", "name": "capitals", "version": 1, "model_name": "ft:x", "bytes": 3_100_000}


def event(number: int, message: str = "", level: str = "info", **data: Any) -> dict[str, Any]:
    return {
        "id": f"ftevent-{number:04}",
        "object": "fine_tuning.job.event",
        "created_at": int(time.time()) - 100 + number,
        "level": level,
        "message": message or str(data.get("kind")),
        "type": "message",
        "data": data or None,
    }


def story() -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """A job's life: what each look at it shows, and the events that have come since."""
    sample = {"kind": "sample", "index": 0, "prompt": "Capital of France?", "expected": "Paris"}
    steps = [(job(state="running", progress=progress(step)), []) for step in range(4, 40, 4)]
    return [
        (job(state="validating"), [event(1, "Created fine-tuning job")]),
        (job(state="queued", queue={"reason": {"code": "busy", "message": "needs 1 GPU; 0 free"}, "position": 2}), []),
        (job(state="running", progress=progress(0, phase="loading")), [event(2, kind="phase", phase="loading")]),
        (
            job(state="running", progress=progress(0, phase="evaluating")),
            [
                event(3, kind="eval", when="before", values={"eval/loss": 3.214, "eval/exact_match": 0.125}),
                event(4, **sample, model="base", output="I do not know."),
                event(5, kind="phase", phase="training"),
            ],
        ),
        *steps,
        (
            job(state="succeeded", progress=progress(40), adapter=ADAPTER),
            [
                event(6, kind="checkpoint", step=40),
                event(7, kind="eval", when="after", values={"eval/loss": 1.18, "eval/exact_match": 0.8125}),
                event(8, **sample, model="tuned", output="Paris"),
                event(9, "Fine tuning job successfully completed"),
            ],
        ),
    ]


class Server:
    """Answers from `routes` first, then from what it holds; remembers every request."""

    def __init__(self) -> None:
        self.files: list[dict[str, Any]] = []
        self.jobs: list[dict[str, Any]] = []
        self.events: list[dict[str, Any]] = []
        self.story: Iterator[tuple[dict[str, Any], list[dict[str, Any]]]] | None = None
        self.adapters: list[dict[str, Any]] = []
        self.base_models: list[dict[str, Any]] = []
        self.contents: dict[str, bytes] = {}
        self.log: list[dict[str, Any]] = []
        self.requests: list[tuple[str, str, dict[str, str], bytes]] = []
        self.routes: dict[tuple[str, str], Callable[[], Answer]] = {}
        self.url = ""

    def sent(self, method: str, path: str) -> list[tuple[dict[str, str], bytes]]:
        return [(headers, body) for verb, at, headers, body in self.requests if (verb, at) == (method, path)]

    def answer(self, method: str, path: str, query: dict[str, str], headers: dict[str, str], body: bytes) -> Answer:
        self.requests.append((method, path, headers, body))
        if (method, path) in self.routes:
            return self.routes[method, path]()
        if headers.get("authorization") != f"Bearer {KEY}":
            return refuse(401, "Incorrect API key provided.", "invalid_api_key")
        noun, *rest = path.removeprefix("/v1/").removeprefix("fine_tuning/").split("/")
        handler = getattr(self, f"_{noun}", None)
        found = handler(method, rest, query, body) if handler else None
        return found or refuse(404, f"There is nothing at {path}.", "not_found")

    def _whoami(self, *_: Any) -> Answer:
        key = {"id": "key_1", "name": "laptop", "scopes": ["jobs:write", "files:write"], "expires_at": None}
        project, organization = {"id": "proj_1", "name": "nlp"}, {"id": "org-1", "name": "acme"}
        return reply({"object": "tunery.identity", "organization": organization, "project": project, "key": key})

    def _files(self, method: str, rest: list[str], query: dict[str, str], body: bytes) -> Answer | None:
        if method == "POST":
            return reply(self._store(body))
        if not rest:
            return page(self.files, query)
        found = next((file for file in self.files if file["id"] == rest[0]), None)
        if found is None:
            return None
        if rest[1:] == ["content"]:
            return 200, {"content-type": "application/octet-stream"}, self.contents[rest[0]]
        if method == "DELETE":
            self.files.remove(found)
            return reply({"id": found["id"], "object": "file", "deleted": True})
        return reply(found)

    def _store(self, body: bytes) -> dict[str, Any]:
        name = body.split(b'filename="')[1].split(b'"')[0].decode()
        content = body.split(b"application/jsonl\r\n\r\n")[1].rsplit(b"\r\n--", 1)[0].split(b"\r\n--")[0]
        file = {"id": f"file-new{len(self.files)}", "object": "file", "bytes": len(content), "filename": name}
        file |= {"created_at": int(time.time()), "purpose": "fine-tune", "status": "processed"}
        self.files.insert(0, file)
        self.contents[file["id"]] = content
        return file

    def _jobs(self, method: str, rest: list[str], query: dict[str, str], body: bytes) -> Answer | None:
        if method == "POST" and not rest:
            self.jobs.insert(0, job() | {"model": json.loads(body)["model"]})
            return reply(self.jobs[0])
        if not rest:
            return page(self.jobs, query)
        at = next((i for i, found in enumerate(self.jobs) if found["id"] == rest[0]), None)
        if at is None:
            return None
        if rest[1:] == ["events"]:
            return page(self.events[::-1], query)
        if rest[1:] == ["checkpoints"]:
            return page([], query)
        if rest[1:] == ["logs"]:
            return self._logs(int(query.get("offset", 0)))
        if rest[1:] == ["cancel"]:
            self.jobs[at] = job(rest[0], "cancelled")
        elif self.story and (look := next(self.story, None)):
            self.jobs[at], fresh = look[0] | {"id": rest[0]}, look[1]
            self.events += fresh
        return reply(self.jobs[at])

    def _logs(self, offset: int) -> Answer:
        text = "".join(piece["text"] for piece in self.log)
        piece = text[offset : offset + 40]
        end = offset + len(piece)
        shape = {"object": "tunery.log", "attempt": 1, "offset": offset, "next_offset": end, "text": piece}
        return reply({**shape, "complete": end == len(text)})

    def _base_models(self, method: str, rest: list[str], query: dict[str, str], _: bytes) -> Answer | None:
        if method == "POST":
            self.base_models = [base_model("importing")]
            return reply(self.base_models[0], 202)
        if not rest:
            return page(self.base_models, query)
        found = dict(self.base_models[0]) if self.base_models else None
        self.base_models = [base_model("ready")] if found else []
        return reply(found) if found else None

    def _models(self, _: str, rest: list[str], __: dict[str, str], ___: bytes) -> Answer | None:
        if rest != ["smollm2-135m-instruct"]:
            return None
        return reply({"id": rest[0], "object": "model", "created": 0, "owned_by": "tunery"})

    def _adapters(self, _: str, rest: list[str], query: dict[str, str], __: bytes) -> Answer | None:
        if not rest:
            return page(self.adapters, query)
        if not self.adapters:
            return None
        if len(rest) > 1:
            content = {"adapter_config.json": CONFIG, "adapter_model.safetensors": WEIGHTS}[rest[-1]]
            return 200, {"content-type": "application/octet-stream"}, content
        return reply(self.adapters[0])


def base_model(state: str) -> dict[str, Any]:
    return {
        "id": "smollm2-135m-instruct",
        "object": "tunery.base_model",
        "hub_id": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "revision": "main",
        "source": "demo",
        "license": "apache-2.0",
        "parameters": 134_515_008,
        "bytes": 269_060_552,
        "state": state,
        "error": None,
        "files": [],
        "created_at": int(time.time()) - 300,
    }


def adapter(**damaged: str) -> dict[str, Any]:
    contents = {"adapter_config.json": CONFIG, "adapter_model.safetensors": WEIGHTS}
    files = [
        {"name": name, "bytes": len(content), "sha256": damaged.get("sha256", hashlib.sha256(content).hexdigest())}
        for name, content in contents.items()
    ]
    version = {"id": "adver_1", "object": "tunery.adapter_version", "adapter": "capitals", "version": 1}
    version |= {"model_name": "ft:smollm2-135m-instruct:acme:capitals:8e7c4b", "job_id": JOB_ID}
    version |= {"base_model": "smollm2-135m-instruct", "bytes": 32_789, "sha256": "ab" * 32, "uri": "s3://b/a"}
    version |= {"files": files, "metrics": {"eval/loss": 1.18}, "created_at": int(time.time()) - 60}
    return {"id": "adapter-1", "object": "tunery.adapter", "name": "capitals", "created_at": 1, "versions": [version]}


@contextmanager
def serving() -> Iterator[Server]:
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _do(self) -> None:
            size = int(self.headers.get("content-length", 0))
            body = self._chunks() if "chunked" in self.headers.get("transfer-encoding", "") else self.rfile.read(size)
            parts = urlsplit(self.path)
            query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
            headers = {name.lower(): value for name, value in self.headers.items()}
            status, extra, content = state.answer(self.command, unquote(parts.path), query, headers, body)
            self.send_response(status)
            for name, value in {"content-length": str(len(content)), **extra}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def _chunks(self) -> bytes:
            whole = b""
            while size := int(self.rfile.readline(), 16):
                whole += self.rfile.read(size)
                self.rfile.readline()
            return whole

        do_GET = do_POST = do_DELETE = _do  # noqa: N815

        def log_message(self, format: str, *args: Any) -> None: ...

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{http.server_port}"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        http.shutdown()
        http.server_close()
