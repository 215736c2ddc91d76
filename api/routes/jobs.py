"""`/v1/fine_tuning/jobs`: submitting, watching and cancelling."""

import uuid
from collections.abc import Sequence
from typing import Annotated

import structlog
from fastapi import APIRouter, Depends, Query, Request
from sqlalchemy.orm import Session

from api import logs, pages, waits
from api.deps import JobId, Scope, SessionDep, SettingsDep, StorageDep, Tenant, TenantDep
from api.documentation import problems
from api.schemas.common import Deleted, Page
from api.schemas.job_request import JobIn, PriorityIn, request_of
from api.schemas.jobs import CheckpointOut, EventOut, JobOut, LogOut, checkpoint_out, event_out, job_out
from tunery import adapters, events, ids, jobs, leases, ledger, progress
from tunery.errors import Invalid
from tunery.jobs import Job
from tunery.storage import Storage
from tunery.telemetry import tracing

log = structlog.get_logger(__name__)
router = APIRouter(prefix="/v1/fine_tuning/jobs", tags=["Fine-tuning"])
READ, WRITE = [Depends(Scope("jobs:read"))], [Depends(Scope("jobs:write"))]
MAX_JOBS, MAX_EVENTS = 100, 1000


@router.post("", dependencies=WRITE, responses=problems(400, 404, 429))
def create_job(
    request: Request, body: JobIn, tenant: TenantDep, session: SessionDep, storage: StorageDep, settings: SettingsDep
) -> JobOut:
    """Submit a job. Its rows are checked first; then it waits for a GPU."""
    limits = {
        "max_live": settings.max_live_jobs,
        "max_bytes": settings.max_project_bytes,
        "max_gpus": settings.max_gpus_per_job,
    }
    with tracing.span("tunery.job.submit") as span:
        trace = span.traceparent or request.state.traceparent
        asked = request_of(body)
        job = jobs.submit(session, tenant.identity, asked, traceparent=trace, **limits)
        span.note({"tunery.job.id": ids.encode(ids.JOB, job.id), "tunery.base_model": job.model})
    structlog.contextvars.bind_contextvars(job=ids.encode(ids.JOB, job.id))
    log.info("job accepted", base_model=job.model)
    return _shown(session, tenant, storage, [job])[0]


@router.get("", dependencies=READ, responses=problems(400))
def list_jobs(
    request: Request,
    tenant: TenantDep,
    session: SessionDep,
    storage: StorageDep,
    after: pages.After = None,
    limit: Annotated[int, pages.limit_query(MAX_JOBS)] = 0,
) -> Page[JobOut]:
    """This project's jobs, newest first. `metadata[key]=value` keeps those that carry the pair."""
    wanted = _metadata(request)
    at = pages.cursor(ids.JOB, after)
    rows, more = jobs.page(session, tenant.project_id, after=at, limit=limit or 20, metadata=wanted)
    return pages.of(_shown(session, tenant, storage, rows), more)


@router.get("/{fine_tuning_job_id}", dependencies=READ, responses=problems(404))
def retrieve_job(job_id: JobId, tenant: TenantDep, session: SessionDep, storage: StorageDep) -> JobOut:
    """One job: state, progress, attempts, and why it waits."""
    return _shown(session, tenant, storage, [jobs.get(session, tenant.project_id, job_id)])[0]


@router.post("/{fine_tuning_job_id}/cancel", dependencies=WRITE, responses=problems(404, 409))
def cancel_job(job_id: JobId, tenant: TenantDep, session: SessionDep, storage: StorageDep) -> JobOut:
    """End a job that waits at once, or ask whoever runs it to stop. Cancelling twice is once."""
    job = leases.cancel(session, tenant.project_id, job_id)
    session.flush()
    session.refresh(job)
    return _shown(session, tenant, storage, [job])[0]


@router.post("/{fine_tuning_job_id}/priority", dependencies=WRITE, responses=problems(400, 404, 409))
def set_job_priority(
    job_id: JobId, body: PriorityIn, tenant: TenantDep, session: SessionDep, storage: StorageDep
) -> JobOut:
    """Move a job before or behind this project's others that wait. Other projects' jobs are not concerned."""
    job = jobs.set_priority(session, tenant.project_id, job_id, body.priority)
    session.flush()
    return _shown(session, tenant, storage, [job])[0]


@router.delete("/{fine_tuning_job_id}", dependencies=WRITE, responses=problems(404, 409))
def delete_job(job_id: JobId, tenant: TenantDep, session: SessionDep) -> Deleted:
    """Delete a job that has ended, with its events, checkpoints and logs. What it published stays."""
    jobs.delete(session, tenant.project_id, job_id)
    return Deleted(id=ids.encode(ids.JOB, job_id), object="fine_tuning.job")


@router.get("/{fine_tuning_job_id}/events", dependencies=READ, responses=problems(400, 404))
def list_job_events(
    job_id: JobId,
    tenant: TenantDep,
    session: SessionDep,
    after: pages.After = None,
    limit: Annotated[int, pages.limit_query(MAX_EVENTS)] = 0,
) -> Page[EventOut]:
    """What happened to a job, newest first."""
    jobs.get(session, tenant.project_id, job_id)
    at = pages.cursor(ids.EVENT, after)
    rows, more = events.page(session, tenant.project_id, job_id, after=at, limit=limit or 20)
    return pages.page(rows, more, event_out)


@router.get("/{fine_tuning_job_id}/checkpoints", dependencies=READ, responses=problems(400, 404))
def list_job_checkpoints(
    job_id: JobId,
    tenant: TenantDep,
    session: SessionDep,
    after: pages.After = None,
    limit: Annotated[int, pages.limit_query(MAX_EVENTS)] = 0,
) -> Page[CheckpointOut]:
    """A job's stored checkpoints, newest first."""
    job = jobs.get(session, tenant.project_id, job_id)
    at = pages.cursor(ids.CHECKPOINT, after)
    rows, more = progress.checkpoints(session, tenant.project_id, job_id, after=at, limit=limit or 10)
    return pages.page(rows, more, lambda row: checkpoint_out(job, row))


@router.get("/{fine_tuning_job_id}/logs", dependencies=READ, responses=problems(400, 404))
def read_job_log(
    job_id: JobId,
    tenant: TenantDep,
    storage: StorageDep,
    attempt: Annotated[int | None, Query(ge=1, lt=2**31, description="Which attempt; else the newest.")] = None,
    offset: Annotated[int, Query(ge=0, lt=10**12, description="From which byte on.")] = 0,
) -> LogOut:
    """A piece of what an attempt's trainer printed. 404 until there has been an attempt."""
    with tenant.transaction() as session:
        jobs.get(session, tenant.project_id, job_id)
        found = logs.choose(jobs.attempts(session, tenant.project_id, job_id), attempt)
    return logs.read(storage, found, offset)


def _shown(session: Session, tenant: Tenant, storage: Storage, rows: Sequence[Job]) -> list[JobOut]:
    """A few queries for a whole page, not four for each of its jobs."""
    wanted: list[uuid.UUID] = [row.id for row in rows]
    attempts = jobs.attempts_of(session, tenant.project_id, wanted)
    told = waits.told(session, tenant.project_id, rows)
    published = adapters.of_jobs(session, tenant.project_id, wanted)
    used = ledger.of_jobs(session, tenant.project_id, wanted)
    return [
        job_out(row, attempts.get(row.id, []), told, published.get(row.id), storage, used.get(row.id)) for row in rows
    ]


def _metadata(request: Request) -> dict[str, str] | None:
    """OpenAI's client sends a dictionary in brackets: `metadata[team]=nlp`."""
    pairs = request.query_params
    if "metadata" in pairs:
        raise Invalid("Invalid 'metadata': expected metadata[key]=value.", param="metadata")
    return {
        name.removeprefix("metadata[").removesuffix("]"): value
        for name, value in pairs.items()
        if name.startswith("metadata[") and name.endswith("]")
    } or None
