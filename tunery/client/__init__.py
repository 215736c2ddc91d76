"""A small typed client of the Tunery API: retries, pages, streams, and errors that say what to do."""

import urllib.parse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self, cast

from tunery.client.errors import (
    APIError,
    BadRequest,
    Conflict,
    CorruptDownload,
    Forbidden,
    NotFound,
    NotTheAPI,
    RateLimited,
    ServerError,
    TuneryError,
    Unauthorized,
    Unreachable,
)
from tunery.client.shapes import (
    Adapter,
    Admission,
    AuditEntry,
    BaseModel,
    Checkpoint,
    Estimate,
    Event,
    File,
    FileEntry,
    Gpu,
    GpuClass,
    Identity,
    Job,
    JoinToken,
    LogChunk,
    Model,
    Node,
    Organization,
    Project,
    ProjectName,
    Queue,
    QueueSimulation,
)
from tunery.client.transport import OnBytes, OnRetry, Params, Transport

__all__ = [
    "APIError",
    "BadRequest",
    "Client",
    "Conflict",
    "CorruptDownload",
    "Forbidden",
    "NotFound",
    "NotTheAPI",
    "RateLimited",
    "ServerError",
    "TuneryError",
    "Unauthorized",
    "Unreachable",
]

_JOBS = "/fine_tuning/jobs"


class Client:
    """One server, one key. Lists are iterators that fetch the next page only when it is asked for."""

    def __init__(
        self,
        base_url: str,
        api_key: str,
        *,
        timeout_s: float = 60.0,
        max_retries: int = 2,
        on_retry: OnRetry | None = None,
    ) -> None:
        self._http = Transport(base_url, api_key, timeout_s=timeout_s, max_retries=max_retries, on_retry=on_retry)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    @property
    def base_url(self) -> str:
        """With `/v1`: what an OpenAI client takes as its `base_url`."""
        return self._http.base_url

    def whoami(self) -> Identity:
        return cast("Identity", self._get("/whoami"))

    def storage_usage(self) -> dict[str, Any]:
        return self._get("/usage/storage")

    def usage(self, month: str | None = None) -> dict[str, Any]:
        """GPU time of `2026-11`, or of this month."""
        return self._get("/usage", {"month": month})

    def stream_usage(self, month: str | None, write: Any) -> None:
        """The same as CSV."""
        wanted = {"format": "csv"} | ({"month": month} if month else {})
        self._http.stream(f"/usage?{urllib.parse.urlencode(wanted)}", write)

    def budget(self, project: str | None = None) -> dict[str, Any]:
        """Of the key's own project, or, with the scope `admin`, of any."""
        return self._get(f"/projects/{_segment(project)}/budget" if project else "/budget")

    def set_budget(self, project: str, body: Mapping[str, Any]) -> dict[str, Any]:
        return self._http.call("PUT", f"/projects/{_segment(project)}/budget", json=dict(body))

    def delete_budget(self, project: str) -> dict[str, Any]:
        return self._http.call("DELETE", f"/projects/{_segment(project)}/budget")

    # Files

    def upload_file(self, path: Path, *, purpose: str = "fine-tune", on_bytes: OnBytes | None = None) -> File:
        return cast("File", self._http.upload("/files", path, {"purpose": purpose}, on_bytes))

    def files(self, *, purpose: str | None = None, page_size: int = 100) -> Iterator[File]:
        return cast("Iterator[File]", self._pages("/files", page_size, {"purpose": purpose}))

    def file(self, file_id: str) -> File:
        return cast("File", self._get(f"/files/{_segment(file_id)}"))

    def delete_file(self, file_id: str) -> dict[str, Any]:
        return self._http.call("DELETE", f"/files/{_segment(file_id)}")

    def download_file(self, file: File, target: Path, *, on_bytes: OnBytes | None = None) -> None:
        """Checks the length, and the hash where the server tells it."""
        self._http.download(
            f"/files/{_segment(file['id'])}/content",
            target,
            sha256=file.get("tunery", {}).get("sha256"),
            size=file.get("bytes"),
            on_bytes=on_bytes,
        )

    def stream_file(self, file_id: str, write: Any) -> None:
        self._http.stream(f"/files/{_segment(file_id)}/content", write)

    # Jobs

    def create_job(self, body: Mapping[str, Any]) -> Job:
        return cast("Job", self._http.call("POST", _JOBS, json=dict(body)))

    def estimate(self, body: Mapping[str, Any]) -> Estimate:
        """What a job would take; nothing is submitted."""
        return cast("Estimate", self._http.call("POST", "/fine_tuning/estimate", json=dict(body)))

    def jobs(self, *, metadata: Mapping[str, str] | None = None, page_size: int = 50) -> Iterator[Job]:
        """Newest first."""
        wanted = {f"metadata[{key}]": value for key, value in (metadata or {}).items()}
        return cast("Iterator[Job]", self._pages(_JOBS, page_size, wanted))

    def job(self, job_id: str) -> Job:
        return cast("Job", self._get(f"{_JOBS}/{_segment(job_id)}"))

    def cancel_job(self, job_id: str) -> Job:
        return cast("Job", self._http.call("POST", f"{_JOBS}/{_segment(job_id)}/cancel"))

    def set_priority(self, job_id: str, priority: int) -> Job:
        """Among the project's own jobs: -100 to 100, higher first."""
        path = f"{_JOBS}/{_segment(job_id)}/priority"
        return cast("Job", self._http.call("POST", path, json={"priority": priority}))

    def queue(self, *, limit: int = 100) -> Queue:
        """Counts, and the first of this project's waiting jobs in its order."""
        return cast("Queue", self._get("/queue", {"limit": limit}))

    def simulate(self, body: Mapping[str, Any]) -> QueueSimulation:
        """When such a job would start; nothing is submitted."""
        return cast("QueueSimulation", self._http.call("POST", "/queue/simulate", json=dict(body)))

    def delete_job(self, job_id: str) -> dict[str, Any]:
        return self._http.call("DELETE", f"{_JOBS}/{_segment(job_id)}")

    def events(self, job_id: str, *, page_size: int = 100) -> Iterator[Event]:
        """Newest first."""
        return cast("Iterator[Event]", self._pages(f"{_JOBS}/{_segment(job_id)}/events", page_size))

    def checkpoints(self, job_id: str, *, page_size: int = 100) -> Iterator[Checkpoint]:
        return cast("Iterator[Checkpoint]", self._pages(f"{_JOBS}/{_segment(job_id)}/checkpoints", page_size))

    def log(self, job_id: str, *, attempt: int | None = None, offset: int = 0) -> LogChunk:
        """A piece of a trainer's log from `offset` on; the newest attempt's unless told otherwise."""
        params: Params = {"attempt": attempt, "offset": offset}
        return cast("LogChunk", self._get(f"{_JOBS}/{_segment(job_id)}/logs", params))

    # Models and adapters

    def models(self) -> list[Model]:
        """Everything a job may start from or a server may load: base models and tuned ones. Never paged."""
        return self._get("/models").get("data", [])

    def model(self, model_id: str) -> Model:
        return cast("Model", self._get(f"/models/{_segment(model_id)}"))

    def delete_model(self, model_id: str) -> dict[str, Any]:
        return self._http.call("DELETE", f"/models/{_segment(model_id)}")

    def base_models(self, *, page_size: int = 100) -> Iterator[BaseModel]:
        return cast("Iterator[BaseModel]", self._pages("/base_models", page_size))

    def base_model(self, name: str) -> BaseModel:
        return cast("BaseModel", self._get(f"/base_models/{_segment(name)}"))

    def import_base_model(self, body: Mapping[str, Any]) -> BaseModel:
        return cast("BaseModel", self._http.call("POST", "/base_models", json=dict(body)))

    def adapters(self, *, page_size: int = 100) -> Iterator[Adapter]:
        return cast("Iterator[Adapter]", self._pages("/adapters", page_size))

    def adapter(self, name: str) -> Adapter:
        return cast("Adapter", self._get(f"/adapters/{_segment(name)}"))

    def download_adapter_file(
        self, name: str, version: int, file: FileEntry, target: Path, *, on_bytes: OnBytes | None = None
    ) -> None:
        path = f"/adapters/{_segment(name)}/versions/{version}/files/{urllib.parse.quote(file['name'])}"
        self._http.download(path, target, sha256=file["sha256"], size=file["bytes"], on_bytes=on_bytes)

    # Nodes

    def nodes(self, *, page_size: int = 100) -> Iterator[Node]:
        return cast("Iterator[Node]", self._pages("/nodes", page_size))

    def node(self, name_or_id: str) -> Node:
        return cast("Node", self._get(f"/nodes/{_segment(name_or_id)}"))

    def cordon_node(self, name_or_id: str) -> Node:
        return cast("Node", self._http.call("POST", f"/nodes/{_segment(name_or_id)}/cordon"))

    def drain_node(self, name_or_id: str) -> Node:
        return cast("Node", self._http.call("POST", f"/nodes/{_segment(name_or_id)}/drain"))

    def uncordon_node(self, name_or_id: str) -> Node:
        return cast("Node", self._http.call("POST", f"/nodes/{_segment(name_or_id)}/uncordon"))

    def label_node(self, name_or_id: str, labels: Mapping[str, str | None]) -> Node:
        body = {"labels": dict(labels)}
        return cast("Node", self._http.call("PATCH", f"/nodes/{_segment(name_or_id)}", json=body))

    def remove_node(self, name_or_id: str) -> dict[str, Any]:
        return self._http.call("DELETE", f"/nodes/{_segment(name_or_id)}")

    # GPUs, shares, the audit log

    def gpus(self, *, page_size: int = 500) -> Iterator[Gpu]:
        return cast("Iterator[Gpu]", self._pages("/gpus", page_size))

    def gpu_classes(self) -> list[GpuClass]:
        """By name. Never paged."""
        return self._get("/gpu_classes").get("data", [])

    def gpu_class(self, name: str) -> GpuClass:
        return cast("GpuClass", self._get(f"/gpu_classes/{_segment(name)}"))

    def set_gpu_class(self, name: str, changes: Mapping[str, Any]) -> GpuClass:
        return cast("GpuClass", self._http.call("PUT", f"/gpu_classes/{_segment(name)}", json=dict(changes)))

    def projects(self) -> list[ProjectName]:
        """Of the whole deployment. Never paged."""
        return self._get("/projects").get("data", [])

    def project(self, name_or_id: str) -> Project:
        return cast("Project", self._get(f"/projects/{_segment(name_or_id)}"))

    def set_project(self, name_or_id: str, changes: Mapping[str, Any]) -> Project:
        return cast("Project", self._http.call("PATCH", f"/projects/{_segment(name_or_id)}", json=dict(changes)))

    def organization(self, name_or_id: str | None = None) -> Organization:
        """The key's own unless another is named."""
        path = f"/organizations/{_segment(name_or_id)}" if name_or_id else "/organization"
        return cast("Organization", self._get(path))

    def set_organization(self, name_or_id: str, changes: Mapping[str, Any]) -> Organization:
        path = f"/organizations/{_segment(name_or_id)}"
        return cast("Organization", self._http.call("PATCH", path, json=dict(changes)))

    def audit(self, *, target: str | None = None, page_size: int = 100) -> Iterator[AuditEntry]:
        """Newest first."""
        return cast("Iterator[AuditEntry]", self._pages("/audit", page_size, {"target": target}))

    # Joining

    def create_join_token(self, *, expires_in: int) -> JoinToken:
        return cast("JoinToken", self._http.call("POST", "/nodes/tokens", json={"expires_in": expires_in}))

    def join_node(self, *, name: str, version: str, dry_run: bool = False) -> Admission:
        """With a join token as this client's key, which an answer that is lost on its way has used up all the same."""
        body = {"name": name, "version": version, "dry_run": dry_run}
        return cast("Admission", self._http.call("POST", "/nodes/join", json=body))

    def _get(self, path: str, params: Params | None = None) -> dict[str, Any]:
        return self._http.call("GET", path, params=params)

    def _pages(self, path: str, page_size: int, params: Params | None = None) -> Iterator[dict[str, Any]]:
        after: str | None = None
        while True:
            page = self._get(path, {**(params or {}), "limit": page_size, "after": after})
            rows: list[dict[str, Any]] = page.get("data") or []
            yield from rows
            last = rows[-1]["id"] if rows else None
            if not page.get("has_more") or last is None or last == after:
                return
            after = last


def _segment(text: str) -> str:
    return urllib.parse.quote(text, safe="")
