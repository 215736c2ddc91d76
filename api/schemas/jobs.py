"""Jobs, their events, checkpoints and logs as OpenAI's strict client reads them; ours lie under `tunery`."""

import time
from typing import Any, Literal

from pydantic import Field

from api.schemas.common import Out, unix, unix_or_none
from api.schemas.usage import CostOut, cost_out
from api.schemas.waits import Told, WaitOut, wait_out
from tunery import ids
from tunery.adapters import AdapterVersion
from tunery.events import Event
from tunery.jobs import AttemptView, Job
from tunery.ledger import Used
from tunery.progress import OPENAI_NAMES, Checkpoint
from tunery.states import OPENAI_STATUS, TERMINAL, JobState
from tunery.storage import Storage


class JobErrorOut(Out):
    code: str
    message: str
    param: str | None


class SupervisedOut(Out):
    hyperparameters: dict[str, Any]


class MethodOut(Out):
    type: Literal["supervised"] = "supervised"
    supervised: SupervisedOut


class ProgressOut(Out):
    """The newest numbers. A loss that is not finite is a string: JSON has no NaN."""

    phase: str | None
    step: int
    total_steps: int | None
    loss: float | str | None
    eval_loss: float | str | None
    tokens_per_second: float | str | None
    gpu_memory_bytes: float | str | None
    """Held by the trainer on its GPU by its own count; null where it tells none."""
    gpu_utilization: float | str | None
    """Newest sample: busy share, 0 to 1, the mean of its devices. Of a shared GPU it is everybody's. On a CPU it is
    the processor time of the trainer as a share of the cores it may use."""
    device_memory_bytes: int | None
    """Newest sample: in use on its devices, whoever uses it; on a CPU, what the trainer has resident."""
    sampled_at: int | None
    underused_since: int | None
    """Its devices have been doing less than the node's threshold since then, and an event `gpu_underused` said so; null
    while nothing runs."""
    epoch_seconds: list[float]
    """Training time of each pass over the rows that is over, in order; what was trained twice counts twice."""
    eta_seconds: int | None
    percent: float


class AttemptOut(Out):
    no: int
    state: str
    node: str
    device: str | None
    start_step: int
    started_at: int | None
    ended_at: int | None
    failure_code: str | None
    failure_message: str | None


class JobAdapterOut(Out):
    id: str
    name: str
    version: int
    model_name: str
    bytes: int
    sha256: str
    uri: str


class ResourcesOut(Out):
    """Where it may run. `gpu_bytes`: memory kept for it on each GPU, null until its rows are checked."""

    gpus: int
    gpu_class: str | None
    node_labels: dict[str, str]
    shareable: bool
    gpu_bytes: int | None


class SchedulingOut(Out):
    """When it runs. `limit_s`: how long it may hold its GPUs, as asked for or by default."""

    priority: int
    time_limit: float | None
    preemptible: bool
    urgent: bool
    limit_s: float


class JobExtra(Out):
    """What a job says beyond OpenAI's fields."""

    state: JobState
    queue: WaitOut | None
    """While it waits for GPUs: why, its place, and when it starts."""
    progress: ProgressOut | None
    attempts: list[AttemptOut]
    recipe: dict[str, Any] | None
    """What runs, with every `auto` resolved; null until the rows are checked."""
    resources: ResourcesOut
    scheduling: SchedulingOut
    platform: dict[str, Any]
    adapter: JobAdapterOut | None
    cost: CostOut


class JobOut(Out):
    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    error: JobErrorOut | None
    fine_tuned_model: str | None
    finished_at: int | None
    hyperparameters: dict[str, Any]
    model: str
    organization_id: str
    result_files: list[str]
    seed: int
    status: str
    trained_tokens: int | None
    training_file: str
    validation_file: str | None
    estimated_finish: int | None
    integrations: list[Any]
    metadata: dict[str, str] | None
    method: MethodOut
    user_provided_suffix: str | None
    tunery: JobExtra


class EventOut(Out):
    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: str
    message: str
    type: str
    data: dict[str, Any] | None


class CheckpointOut(Out):
    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    step_number: int
    metrics: dict[str, float]


class LogOut(Out):
    """A piece of one attempt's log; offsets count bytes. Ask again from `next_offset` until `complete`."""

    object: Literal["tunery.log"] = "tunery.log"
    attempt: int = Field(ge=1)
    offset: int
    next_offset: int
    text: str
    complete: bool


def job_out(
    job: Job,
    attempts: list[AttemptView],
    told: Told,
    published: tuple[AdapterVersion, str] | None,
    storage: Storage,
    used: Used | None = None,
) -> JobOut:
    progress = _progress(job)
    eta = progress.eta_seconds if progress else None
    return JobOut(
        id=ids.encode(ids.JOB, job.id),
        created_at=unix(job.created_at),
        error=_error(job),
        fine_tuned_model=job.model_name if job.state == JobState.SUCCEEDED else None,
        finished_at=unix_or_none(job.finished_at),
        hyperparameters=job.hyperparameters,
        model=job.model,
        organization_id=ids.encode(ids.ORGANIZATION, job.organization_id),
        result_files=[],
        seed=job.seed,
        status=OPENAI_STATUS[JobState(job.state)],
        trained_tokens=job.trained_tokens,
        training_file=ids.encode(ids.FILE, job.training_file_id),
        validation_file=ids.encode(ids.FILE, job.validation_file_id) if job.validation_file_id else None,
        estimated_finish=None if eta is None else int(time.time()) + eta,
        integrations=[],
        metadata=job.user_metadata,
        method=MethodOut(supervised=SupervisedOut(hyperparameters=job.hyperparameters)),
        user_provided_suffix=job.suffix,
        tunery=JobExtra(
            state=JobState(job.state),
            queue=wait_out(job, attempts, told),
            progress=progress,
            attempts=[_attempt(view) for view in attempts],
            recipe=job.recipe,
            resources=resources_out(job),
            scheduling=scheduling_out(job),
            platform=job.platform,
            adapter=_adapter(published, storage) if published else None,
            cost=cost_out(used),
        ),
    )


def event_out(event: Event) -> EventOut:
    return EventOut(
        id=ids.encode(ids.EVENT, event.id),
        created_at=unix(event.created_at),
        level=event.level,
        message=event.message,
        type=event.type,
        data=event.data,
    )


_CHECKPOINT_METRICS = {
    name: openai for name, openai in OPENAI_NAMES.items() if openai.startswith(("train_", "valid_"))
} | {"eval/full_loss": "full_valid_loss"}
_KNOWN_TO_OPENAI = {
    "train_loss",
    "train_mean_token_accuracy",
    "valid_loss",
    "valid_mean_token_accuracy",
    "full_valid_loss",
    "full_valid_mean_token_accuracy",
}


def checkpoint_out(job: Job, checkpoint: Checkpoint) -> CheckpointOut:
    named = {_CHECKPOINT_METRICS.get(name, name): value for name, value in checkpoint.metrics.items()}
    known = {
        name: float(value)
        for name, value in named.items()
        if name in _KNOWN_TO_OPENAI and isinstance(value, int | float)
    }
    return CheckpointOut(
        id=ids.encode(ids.CHECKPOINT, checkpoint.id),
        created_at=unix(checkpoint.created_at),
        fine_tuned_model_checkpoint=f"{job.model_name}:ckpt-step-{checkpoint.step}",
        fine_tuning_job_id=ids.encode(ids.JOB, job.id),
        step_number=checkpoint.step,
        metrics={"step": float(checkpoint.step)} | known,
    )


def _error(job: Job) -> JobErrorOut | None:
    if job.error_code is None:
        return None
    return JobErrorOut(code=job.error_code, message=job.error_message or job.error_code, param=job.error_param)


def _progress(job: Job) -> ProgressOut | None:
    if (said := job.progress) is None:
        return None
    step, total = said.get("step", 0), said.get("total_steps")
    percent = 100 * step / total if total else 0
    return ProgressOut(
        phase=None if JobState(job.state) in TERMINAL else said.get("phase"),
        step=step,
        total_steps=total,
        loss=said.get("loss"),
        eval_loss=said.get("eval_loss"),
        tokens_per_second=said.get("tokens_per_second"),
        gpu_memory_bytes=said.get("gpu_memory_bytes"),
        gpu_utilization=said.get("gpu_utilization"),
        device_memory_bytes=said.get("device_memory_bytes"),
        sampled_at=_whole(said.get("sampled_at")),
        underused_since=_whole(said.get("underused_since")) if job.state == JobState.RUNNING else None,
        epoch_seconds=said.get("epoch_seconds", []),
        eta_seconds=_eta_s(job, step, total, said.get("seconds_per_step")),
        percent=100 if job.state == JobState.SUCCEEDED else round(min(percent, 100), 1),
    )


def _whole(seconds: float | None) -> int | None:
    return None if seconds is None else int(seconds)


def _eta_s(job: Job, step: int, total: int | None, seconds_per_step: float | None) -> int | None:
    if job.state != JobState.RUNNING or not total or seconds_per_step is None:
        return None
    return round(max(0, total - step) * seconds_per_step)


def resources_out(job: Job) -> ResourcesOut:
    return ResourcesOut(
        gpus=job.gpus,
        gpu_class=job.gpu_class,
        node_labels=job.node_labels,
        shareable=job.shareable,
        gpu_bytes=job.required_bytes,
    )


def scheduling_out(job: Job) -> SchedulingOut:
    return SchedulingOut(
        priority=job.priority,
        time_limit=job.time_limit_s,
        preemptible=job.preemptible,
        urgent=job.urgent,
        limit_s=job.limit_s,
    )


def _attempt(view: AttemptView) -> AttemptOut:
    attempt = view.attempt
    return AttemptOut(
        no=attempt.no,
        state=attempt.state,
        node=view.node,
        device=(attempt.details or {}).get("device"),
        start_step=attempt.start_step,
        started_at=unix_or_none(attempt.started_at),
        ended_at=unix_or_none(attempt.ended_at),
        failure_code=attempt.failure_code,
        failure_message=attempt.failure_message,
    )


def _adapter(published: tuple[AdapterVersion, str], storage: Storage) -> JobAdapterOut:
    version, name = published
    return JobAdapterOut(
        id=ids.encode(ids.ADAPTER, version.adapter_id),
        name=name,
        version=version.version,
        model_name=version.model_name,
        bytes=version.bytes,
        sha256=version.sha256,
        uri=storage.uri(version.object_prefix),
    )
