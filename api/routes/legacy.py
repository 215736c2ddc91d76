"""`/finetune`: the small shape of an older in-house service, kept for the scripts that still speak it.

It is a thin translation onto the same jobs: what is submitted here is listed by `/v1/fine_tuning/jobs`, and the other
way round.
"""

from typing import Annotated, Any

from fastapi import APIRouter, Depends
from pydantic import BaseModel, ConfigDict, Field

from api.deps import JobId, Scope, SessionDep, SettingsDep, TenantDep
from api.documentation import problems
from api.schemas.common import Out, unix, unix_or_none
from tunery import ids, jobs
from tunery.contracts.spec import LoraSpec, TrainingArgs
from tunery.jobs import AttemptView, Job, Request
from tunery.recipes import Extension
from tunery.states import JobState

router = APIRouter(prefix="/finetune", tags=["Legacy"])

STATUS = {
    JobState.VALIDATING: "pending",
    JobState.STARTING: "queued",
    JobState.PAUSED: "queued",
    JobState.PAUSING: "running",
    JobState.CANCELLING: "cancelled",
    JobState.SUCCEEDED: "completed",
}
"""Where the older names differ from `tunery.state`."""


class LegacyConfig(BaseModel):
    """Its defaults are what a job without a config gets."""

    model_config = ConfigDict(extra="forbid")
    lora_r: Annotated[int, Field(ge=1, le=1024)] = 16
    lora_alpha: Annotated[float, Field(gt=0)] = 32
    epochs: Annotated[float, Field(gt=0, le=100)] = 3
    batch_size: Annotated[int, Field(ge=1, le=256)] = 4
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 2e-4
    max_seq_length: Annotated[int, Field(ge=16, le=1_048_576)] = 2048


class LegacyIn(BaseModel):
    model_config = ConfigDict(extra="forbid")
    base_model: str
    dataset: str
    """Id of a file with purpose `fine-tune`."""
    config: LegacyConfig = LegacyConfig()


class LegacyAccepted(Out):
    job_id: str
    status: str


class LegacyJob(LegacyAccepted):
    user_id: str
    """The project: the tenant that a key opens."""
    base_model: str
    dataset: str
    config: dict[str, Any]
    created_at: int
    started_at: int | None
    completed_at: int | None
    gpu_id: str | None
    """The node that runs it, or ran it last."""
    metrics: dict[str, Any]


@router.post("", dependencies=[Depends(Scope("jobs:write"))], responses=problems(400, 404, 429))
def finetune(body: LegacyIn, tenant: TenantDep, session: SessionDep, settings: SettingsDep) -> LegacyAccepted:
    """Submit a job in the older shape."""
    config = body.config
    training = TrainingArgs(
        num_train_epochs=config.epochs,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=1,
        learning_rate=config.learning_rate,
        max_length=config.max_seq_length,
    )
    adapter = LoraSpec(r=config.lora_r, lora_alpha=config.lora_alpha)
    request = Request(body.base_model, body.dataset, extension=Extension(adapter=adapter, training=training))
    job = jobs.submit(session, tenant.identity, request, max_live=settings.max_live_jobs)
    return LegacyAccepted(job_id=ids.encode(ids.JOB, job.id), status="queued")


@router.get("/{fine_tuning_job_id}", dependencies=[Depends(Scope("jobs:read"))], responses=problems(404))
def finetune_status(job_id: JobId, tenant: TenantDep, session: SessionDep) -> LegacyJob:
    """A job in the older shape."""
    job = jobs.get(session, tenant.project_id, job_id)
    return _legacy(job, jobs.attempts(session, tenant.project_id, job_id))


def _legacy(job: Job, attempts: list[AttemptView]) -> LegacyJob:
    state = JobState(job.state)
    return LegacyJob(
        job_id=ids.encode(ids.JOB, job.id),
        status=STATUS.get(state, state.value),
        user_id=ids.encode(ids.PROJECT, job.project_id),
        base_model=job.model,
        dataset=ids.encode(ids.FILE, job.training_file_id),
        config=job.recipe or job.request["tunery"],
        created_at=unix(job.created_at),
        started_at=unix_or_none(job.started_at),
        completed_at=unix_or_none(job.finished_at),
        gpu_id=attempts[-1].node if attempts else None,
        metrics=job.progress or {},
    )
