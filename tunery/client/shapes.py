"""The API's objects as they arrive. Keys beyond `id` may be absent: an older server is still understood."""

from typing import Any, Literal, Required, TypedDict


class Named(TypedDict, total=False):
    id: str
    name: str


class KeyInfo(TypedDict, total=False):
    id: str
    name: str
    scopes: list[str]
    expires_at: int | None


class Identity(TypedDict, total=False):
    object: str
    organization: Named
    project: Named
    key: KeyInfo


class File(TypedDict, total=False):
    id: Required[str]
    object: str
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: str
    status_details: str | None
    expires_at: int | None
    tunery: dict[str, Any]


class JobError(TypedDict, total=False):
    code: str
    message: str
    param: str | None


class Reason(TypedDict, total=False):
    code: str
    message: str
    numbers: dict[str, Any]


class Ahead(TypedDict, total=False):
    own: int
    others: int | None


class StartTimes(TypedDict, total=False):
    """Unix seconds, or seconds from now; null where it is not known."""

    p50: int | None
    p90: int | None
    not_before: int | None


class Wait(TypedDict, total=False):
    reason: Reason
    position: int | None
    jobs_ahead: Ahead
    estimated_start: StartTimes | None
    advice: list[str]


class QueuedJob(TypedDict, total=False):
    id: Required[str]
    model: str
    suffix: str | None
    created_at: int
    resources: dict[str, Any]
    scheduling: dict[str, Any]
    queue: Wait


class Queue(TypedDict, total=False):
    queued: int
    running: int
    available_gpus: int
    total_gpus: int
    project: dict[str, int]
    jobs: list[QueuedJob]


class QueueSimulation(TypedDict, total=False):
    position: int
    jobs_ahead: Ahead
    starts_in: StartTimes
    estimated_start: StartTimes
    reason: Reason | None
    gpu_bytes: int
    limit_s: float
    cost: dict[str, Any]


class Progress(TypedDict, total=False):
    phase: str | None
    step: int
    total_steps: int
    loss: float | str | None
    eval_loss: float | str | None
    tokens_per_second: float | str | None
    gpu_memory_bytes: float | str | None
    gpu_utilization: float | str | None
    device_memory_bytes: int | None
    sampled_at: int | None
    underused_since: int | None
    epoch_seconds: list[float]
    eta_seconds: int | None
    percent: float


class Attempt(TypedDict, total=False):
    no: int
    state: str
    node: str | None
    device: str | None
    start_step: int | None
    started_at: int | str | None
    ended_at: int | str | None
    failure_code: str | None
    failure_message: str | None


class JobAdapter(TypedDict, total=False):
    id: str
    name: str
    version: int
    model_name: str
    bytes: int
    sha256: str
    url: str


class Resources(TypedDict, total=False):
    gpus: int
    gpu_class: str | None
    node_labels: dict[str, str]
    shareable: bool
    gpu_bytes: int | None


class Scheduling(TypedDict, total=False):
    priority: int
    time_limit: float | None
    preemptible: bool
    urgent: bool
    limit_s: float


class Cost(TypedDict, total=False):
    gpu_seconds: float
    charged_gpu_seconds: float
    amount: float | None
    running: bool


class JobExtra(TypedDict, total=False):
    """What a job says beyond OpenAI's fields."""

    state: str
    queue: Wait | None
    progress: Progress | None
    attempts: list[Attempt]
    recipe: dict[str, Any] | None
    resources: Resources
    scheduling: Scheduling
    adapter: JobAdapter | None
    cost: Cost


class Job(TypedDict, total=False):
    id: Required[str]
    object: str
    created_at: int
    finished_at: int | None
    model: str
    fine_tuned_model: str | None
    status: str
    error: JobError | None
    training_file: str
    validation_file: str | None
    hyperparameters: dict[str, Any]
    seed: int
    trained_tokens: int | None
    metadata: dict[str, str] | None
    user_provided_suffix: str | None
    tunery: JobExtra


class ClassEstimate(TypedDict, total=False):
    gpu_class: str | None
    gpu_bytes: int
    fits: bool | None
    hours: float
    hours_p90: float
    price_per_hour: float | None
    amount: float | None
    runs: int


class Estimate(TypedDict, total=False):
    """`classes` has the best first."""

    object: str
    profile: str
    model: str | None
    parameters: int
    rows: int
    epochs: float
    tokens: int
    gpus: int
    adapter_parameters: int
    adapter_bytes: int
    classes: list[ClassEstimate]


class Event(TypedDict, total=False):
    id: Required[str]
    object: str
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, Any] | None


class Checkpoint(TypedDict, total=False):
    id: Required[str]
    object: str
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    step_number: int
    metrics: dict[str, float]


class LogChunk(TypedDict, total=False):
    object: str
    attempt: int
    offset: int
    next_offset: int
    text: str
    complete: bool


class FileEntry(TypedDict):
    """One file of a model or an adapter; `name` is relative, with forward slashes."""

    name: str
    bytes: int
    sha256: str


class Model(TypedDict, total=False):
    id: Required[str]
    object: str
    created: int
    owned_by: str


class BaseModel(TypedDict, total=False):
    id: Required[str]
    object: str
    hub_id: str
    revision: str
    source: str
    license: str
    parameters: int
    bytes: int
    state: Literal["importing", "ready", "failed"]
    error: str | None
    files: list[FileEntry]
    created_at: int


class AdapterVersion(TypedDict, total=False):
    id: Required[str]
    object: str
    adapter: str
    version: int
    model_name: str
    job_id: str
    base_model: str
    bytes: int
    sha256: str
    uri: str
    files: list[FileEntry]
    metrics: dict[str, float]
    created_at: int


class Adapter(TypedDict, total=False):
    id: Required[str]
    object: str
    name: str
    created_at: int
    versions: list[AdapterVersion]


class Device(TypedDict, total=False):
    index: int
    kind: str
    name: str
    gpu_class: str
    state: str
    total_bytes: int
    usable_bytes: int
    reserved_bytes: int


class Node(TypedDict, total=False):
    id: Required[str]
    object: str
    name: str
    state: str
    labels: dict[str, str]
    attempts: int
    tasks: int
    joined: bool
    version: str
    task_slots: int
    registered_at: int
    last_seen_at: int
    devices: list[Device]
    info: dict[str, Any]


class Gpu(TypedDict, total=False):
    id: Required[str]
    object: str
    node: str
    index: int
    kind: str
    name: str
    gpu_class: str
    state: str
    busy: bool
    total_bytes: int
    usable_bytes: int
    reserved_bytes: int
    attempts: int
    jobs: list[str]


class GpuClass(TypedDict, total=False):
    id: Required[str]
    object: str
    cost: float
    price_per_hour: float | None
    devices: int


class ProjectName(TypedDict, total=False):
    id: Required[str]
    object: str
    name: str
    organization: Named
    status: str
    guarantee: float


class Project(TypedDict, total=False):
    id: Required[str]
    object: str
    name: str
    organization: Named
    status: str
    weight: float
    guarantee: float
    cap: float | None
    max_running_jobs: int | None
    blocked: str | None
    cluster: dict[str, float]


class Organization(TypedDict, total=False):
    id: Required[str]
    object: str
    name: str
    weight: float
    guarantee: float
    cap: float | None


class AuditEntry(TypedDict, total=False):
    id: Required[str]
    object: str
    created_at: int
    action: str
    target: str
    before: dict[str, Any] | None
    after: dict[str, Any] | None
    key: Named
    project_id: str
    request_id: str | None


class JoinToken(TypedDict, total=False):
    id: Required[str]
    token: Required[str]
    created_at: int
    expires_at: int


class Admission(TypedDict, total=False):
    """What a node that joins is told: where the servers are, and its own logins."""

    id: str | None
    name: str
    version: str
    addresses: dict[str, str]
    environment: dict[str, str]
