"""Jobs as their owners see them: submitting, reading, listing. Their state moves in `tunery.leases` alone."""

import hashlib
import os
import secrets
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import ColumnElement, TextClause, func, select, text
from sqlalchemy.orm import Session

from tunery import __version__, adapters, budgets, catalogue, events, files, ids, needs, recipes, tasks, usage, wake
from tunery.contracts.scheduling import JobView
from tunery.errors import Conflict, Invalid, NotFound, QuotaExceeded
from tunery.estimate.places import Ask
from tunery.events import Entry
from tunery.models import Attempt, BaseModel, Dataset, File, Job, Node, QueueView
from tunery.recipes import Extension, Hyperparameters
from tunery.states import TERMINAL, AttemptState, JobState
from tunery.tenancy import Identity

LEAST_LIMIT_S = 60.0
"""A job that has used up its time limit, or nearly, still gets so long."""


@dataclass(frozen=True)
class Request:
    """What a user asked for, already parsed; `auto` values still stand."""

    model: str
    training_file: str
    validation_file: str | None = None
    suffix: str | None = None
    seed: int | None = None
    metadata: dict[str, str] | None = None
    hyperparameters: Hyperparameters = field(default_factory=Hyperparameters)
    extension: Extension = field(default_factory=Extension)


def submit(
    session: Session,
    who: Identity,
    request: Request,
    *,
    max_live: int,
    max_bytes: int = 1 << 50,
    max_gpus: int = 64,
    traceparent: str | None = None,
) -> Job:
    """Accept a job: its row, its first event and the task that checks its rows, in one transaction.

    `max_gpus`: what one job may ask for. `traceparent`: the trace that everything done for this job belongs to.

    Raises:
        NotFound: the model or a file does not exist in this project.
        Invalid: the model is not ready, a file's purpose is not `fine-tune`, a name is unusable, or no node could
            ever give what it asks for.
        Forbidden: it is `urgent`, and the key is not an operator's.
        QuotaExceeded: the project has `max_live` unfinished jobs, or no room for what the job would store, or too
            little left of its month's budget.
    """
    model = _usable_model(session, who, request.model)
    place, timing = request.extension.resources, request.extension.scheduling
    refuse_impossible(session, who, request.extension, model, max_gpus)
    training = _usable_file(session, who, request.training_file, "training_file")
    validation = None
    if request.validation_file is not None:
        validation = _usable_file(session, who, request.validation_file, "validation_file")
    _within_quota(session, who, max_live)
    usage.refuse_if_full(session, who.project_id, max_bytes)
    job_id = ids.uuid7()
    job = Job(
        id=job_id,
        organization_id=who.organization_id,
        project_id=who.project_id,
        base_model_id=model.id,
        model=request.model,
        training_file_id=training.id,
        validation_file_id=validation.id if validation else None,
        suffix=request.suffix,
        seed=_seed(request),
        user_metadata=request.metadata,
        request={
            "hyperparameters": request.hyperparameters.model_dump(),
            "tunery": request.extension.model_dump(exclude_unset=True),
        },
        hyperparameters=request.hyperparameters.model_dump(),
        model_name=f"ft:{model.name}:{_slug(who.organization)}:{request.suffix or ''}:{ids.short(job_id)}",
        gpus=place.gpus,
        gpu_class=place.gpu_class,
        node_labels=dict(place.node_labels),
        shareable=place.shareable,
        priority=timing.priority,
        urgent=timing.urgent,
        preemptible=timing.preemptible,
        time_limit_s=timing.time_limit,
        platform=platform_identity(),
        traceparent=traceparent,
    )
    session.add(job)
    session.flush()
    session.refresh(job)
    budgets.hold(session, job)
    events.append(
        session, job, [Entry(f"Created fine-tuning job: {ids.encode(ids.JOB, job.id)}"), Entry("Validating files")]
    )
    tasks.enqueue(session, tasks.CHECK_DATA, who.project_id, job_id=job.id)
    session.flush()
    return job


def get(session: Session, project_id: uuid.UUID, job_id: uuid.UUID) -> Job:
    """Raises NotFound, also for another project's job."""
    job = session.scalar(select(Job).where(Job.project_id == project_id, Job.id == job_id, Job.deleted_at.is_(None)))
    if job is None:
        raise NotFound(
            "No such fine-tuning job.", param="fine_tuning_job_id", fix="`tunery jobs list` shows this project's jobs."
        )
    return job


def page(
    session: Session,
    project_id: uuid.UUID,
    *,
    after: uuid.UUID | None,
    limit: int,
    metadata: dict[str, str] | None = None,
) -> tuple[list[Job], bool]:
    """This project's jobs, newest first; and whether there are more."""
    query = select(Job).where(Job.project_id == project_id, Job.deleted_at.is_(None))
    query = query.order_by(Job.id.desc()).limit(limit + 1)
    if after is not None:
        query = query.where(Job.id < after)
    if metadata:
        query = query.where(Job.user_metadata.contains(metadata))
    rows = list(session.scalars(query))
    return rows[:limit], len(rows) > limit


def set_priority(session: Session, project_id: uuid.UUID, job_id: uuid.UUID, priority: int) -> Job:
    """Move a job before or behind its project's others. It counts whenever the job waits, now or later.

    Raises:
        NotFound: no such job in this project.
        Conflict: it has ended.
    """
    get(session, project_id, job_id)
    job = lock(session, job_id)
    if JobState(job.state) in TERMINAL:
        raise Conflict(f"The job has already {job.state}; its priority means nothing any more.")
    if job.priority != priority:
        told = f"Priority changed from {job.priority} to {priority}"
        events.append(session, job, [Entry(told, data={"kind": "priority", "priority": priority})])
        job.priority = priority
        wake.scheduler(session)
    return job


def delete(session: Session, project_id: uuid.UUID, job_id: uuid.UUID) -> None:
    """Forget an ended job: its events, metrics, checkpoints and logs. What it published stays.

    Raises:
        NotFound: no such job in this project.
        Conflict: it has not ended.
    """
    job = get(session, project_id, job_id)
    if JobState(job.state) not in TERMINAL:
        fix = f"Cancel it first, and wait until it has stopped: tunery jobs cancel {ids.encode(ids.JOB, job_id)}"
        raise Conflict(f"The job is {job.state}; only a job that has ended can be deleted.", fix=fix)
    session.execute(text("SELECT forget_job(:id)"), {"id": job_id})
    session.expire(job)


@dataclass(frozen=True)
class AttemptView:
    attempt: Attempt
    node: str


def attempts(session: Session, project_id: uuid.UUID, job_id: uuid.UUID) -> list[AttemptView]:
    query = select(Attempt, Node.name).join(Node, Node.id == Attempt.node_id)
    query = query.where(Attempt.project_id == project_id, Attempt.job_id == job_id).order_by(Attempt.no)
    return [AttemptView(attempt, node) for attempt, node in session.execute(query)]


def attempts_of(
    session: Session, project_id: uuid.UUID, job_ids: Sequence[uuid.UUID]
) -> dict[uuid.UUID, list[AttemptView]]:
    """The attempts of several jobs at once, for lists; each job's in order."""
    query = select(Attempt, Node.name).join(Node, Node.id == Attempt.node_id)
    query = query.where(Attempt.project_id == project_id, Attempt.job_id.in_(job_ids)).order_by(Attempt.no)
    found: dict[uuid.UUID, list[AttemptView]] = {}
    for attempt, node in session.execute(query):
        found.setdefault(attempt.job_id, []).append(AttemptView(attempt, node))
    return found


def queue_ranks(session: Session, project_id: uuid.UUID, wanted: Sequence[uuid.UUID]) -> dict[uuid.UUID, int]:
    """Of these jobs, those that wait: their places among this project's waiting jobs, the first one 1."""
    ranked = select(Job.id, func.row_number().over(order_by=_QUEUE_ORDER).label("rank")).where(*_waits(project_id))
    found = ranked.subquery()
    query = select(found.c.id, found.c.rank).where(found.c.id.in_(wanted))
    return dict(session.execute(query).tuples().all())


def waiting_jobs(session: Session, project_id: uuid.UUID, limit: int) -> list[Job]:
    """The first of this project's jobs that wait for GPUs, in its own order."""
    query = select(Job).where(*_waits(project_id), Job.deleted_at.is_(None)).order_by(*_QUEUE_ORDER)
    return list(session.scalars(query.limit(limit)))


_QUEUE_ORDER = (Job.urgent.desc(), Job.priority.desc(), Job.queued_at, Job.id)
"""As the policy takes the jobs of one project."""


def _waits(project_id: uuid.UUID) -> tuple[ColumnElement[bool] | TextClause, ...]:
    assigned = select(Attempt.job_id).where(
        Attempt.project_id == project_id, Attempt.state == AttemptState.ASSIGNED, Attempt.job_id == Job.id
    )
    queued = text(f"jobs.state = '{JobState.QUEUED}'")  # not a parameter: it chooses the index of those that wait
    return Job.project_id == project_id, queued, ~assigned.exists()


def queue_view(session: Session, project_id: uuid.UUID) -> dict[str, Any]:
    """What the scheduler last said of this project's queue; `tunery.waiting` reads it."""
    told = session.scalar(select(QueueView.reasons).where(QueueView.project_id == project_id))
    return told or {}


def view_of(job: Job) -> JobView:
    """A job as the scheduler sees it."""
    return JobView(
        id=job.id,
        organization_id=job.organization_id,
        project_id=job.project_id,
        queued_at=job.queued_at.timestamp(),
        gpus=job.gpus,
        required_bytes=job.required_bytes or 0,
        priority=job.priority,
        urgent=job.urgent,
        limit_s=max(job.limit_s - job.used_s, LEAST_LIMIT_S),
        gpu_class=job.gpu_class,
        labels=frozenset(job.node_labels.items()),
        shareable=job.shareable,
        preemptible=job.preemptible,
        engine_key=job.engine_key,
        engine_bytes=job.engine_bytes or 0,
    )


@dataclass(frozen=True)
class Inputs:
    """What the data check needs to know of a job."""

    job: Job
    training: File
    validation: File | None
    base: BaseModel


def inputs(session: Session, job_id: uuid.UUID) -> Inputs:
    job = session.get_one(Job, job_id)
    validation = session.get_one(File, job.validation_file_id) if job.validation_file_id else None
    return Inputs(
        job, session.get_one(File, job.training_file_id), validation, catalogue.by_id(session, job.base_model_id)
    )


def lock(session: Session, job_id: uuid.UUID) -> Job:
    return session.get_one(Job, job_id, with_for_update=True, populate_existing=True)


def resolve(session: Session, job: Job, base: BaseModel, train: Dataset, validation: Dataset | None) -> recipes.Recipe:
    """Turn every `auto` into a number, now that the rows are known, and write on the job what it needs."""
    asked = Hyperparameters.model_validate(job.request["hyperparameters"])
    extension = Extension.model_validate(job.request["tunery"])
    recipe = recipes.resolve(asked, extension, train.rows, job.seed)
    job.recipe = recipe.model_dump(mode="json")
    job.hyperparameters = recipes.openai_view(recipe)
    job.train_dataset_id = train.id
    job.validation_dataset_id = validation.id if validation else None
    needs.settle(session, job, base, train, validation)
    return recipe


def platform_identity() -> dict[str, str | None]:
    """What a run is reproduced from, beside its own recipe, seed and data: our version, locks and image."""
    return {"tunery": __version__, "lock_sha256": _lock_hash(), "image": os.environ.get("TUNERY_IMAGE")}


def _lock_hash() -> str | None:
    lock = Path(__file__).parent.parent / "constraints.txt"
    return hashlib.sha256(lock.read_bytes()).hexdigest() if lock.exists() else None


def _usable_model(session: Session, who: Identity, name: str) -> BaseModel:
    if name.startswith("ft:"):
        known = adapters.by_model_name(session, who.project_id, name)
        if known is None:
            raise NotFound(f"The model '{name[:80]}' does not exist.", param="model", code="model_not_found")
        raise Invalid(
            "Continuing from a fine-tuned model is not supported yet.",
            param="model",
            fix="Name its base model instead.",
        )
    model = catalogue.get(session, name)
    if model.state != "ready":
        state = "still being imported" if model.state == "importing" else f"not usable: {model.error}"
        raise Invalid(f"The model '{name}' is {state}.", param="model", fix="Wait for its import, or import it again.")
    return model


def _usable_file(session: Session, who: Identity, file_id: str, param: str) -> File:
    file = files.get(session, who.project_id, file_id, param=param, keep=True)
    if file.purpose != "fine-tune":
        fix = "Upload it again with purpose='fine-tune'."
        raise Invalid(f"File '{file_id}' has purpose '{file.purpose}'.", param=param, fix=fix)
    return file


def refuse_impossible(session: Session, who: Identity, asked: Extension, model: BaseModel, max_gpus: int) -> None:
    """What the deployment grants to nobody, to operators only, or cannot have."""
    place = asked.resources
    if asked.scheduling.urgent:
        who.require("admin")
    if place.gpus > max_gpus:
        message = f"{place.gpus} GPUs were asked for; a job may have {max_gpus} here."
        raise Invalid(message, param="tunery.resources.gpus", fix="Ask for fewer, or ask your operator for more.")
    needs.refuse_impossible(session, Ask(place.gpus, place.gpu_class, place.node_labels), model)


def _within_quota(session: Session, who: Identity, max_live: int) -> None:
    # count-then-insert alone lets two requests through; the lock makes submits of one project take turns
    key = func.hashtextextended(f"submit:{who.project_id}", 0)
    session.execute(select(func.pg_advisory_xact_lock(key)))
    live = select(func.count()).select_from(Job).where(Job.project_id == who.project_id, Job.state.not_in(TERMINAL))
    if (session.scalar(live) or 0) >= max_live:
        fix = "Wait for some to finish, or cancel some."
        raise QuotaExceeded(f"This project already has {max_live} unfinished jobs.", fix=fix)


def _seed(request: Request) -> int:
    """One seed, wherever it was given; drawn and told where it was not."""
    training = request.extension.training
    own = training.seed if training is not None and "seed" in training.model_fields_set else None
    if own is not None and request.seed is not None and own != request.seed:
        fix = "Give the seed once, in 'seed'."
        raise Invalid(f"'seed' is {request.seed}, 'tunery.training.seed' is {own}.", param="seed", fix=fix)
    given = own if own is not None else request.seed
    return given if given is not None else secrets.randbelow(2**31)


def _slug(name: str) -> str:
    """A name that can stand between the colons of a model's name."""
    return "".join(letter if letter.isalnum() else "-" for letter in name.lower()).strip("-")[:40] or "org"
