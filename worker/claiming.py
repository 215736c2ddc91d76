"""Taking an attempt, and reading everything that running it will need, in one short transaction."""

import uuid

from sqlalchemy.orm import Session

from tunery import catalogue, datasets, jobs, leases, nodes, progress
from tunery.contracts.spec import Recipe
from worker.workspace import StoredFiles, Work


def claim(session: Session, attempt_id: uuid.UUID, claimed_by: str, lease_s: float) -> Work | None:
    """The work, or None if the attempt is somebody else's or nobody's any more."""
    held = leases.claim(session, attempt_id, claimed_by, lease_s)
    if held is None:
        return None
    job, attempt = held.job, held.attempt
    inputs = jobs.inputs(session, job.id)
    assert job.train_dataset_id is not None, "a queued job has its rows"
    train = datasets.get(session, job.train_dataset_id)
    validation = datasets.get(session, job.validation_dataset_id) if job.validation_dataset_id else None
    base = catalogue.by_id(session, job.base_model_id)
    checkpoint = progress.checkpoint_of(session, attempt.resume_checkpoint_id) if attempt.resume_checkpoint_id else None
    return Work(
        attempt_id=attempt.id,
        attempt_no=attempt.no,
        fence=attempt.fence,
        job_id=job.id,
        project_id=job.project_id,
        recipe=Recipe.model_validate(job.recipe),
        model_name=job.model_name,
        base_id=base.id,
        base={**(base.card or {}), "name": base.name},
        base_prefix=base.object_prefix or "",
        train=(train.object_key, train.sha256),
        validation=(validation.object_key, validation.sha256) if validation else None,
        training_file=inputs.training.id,
        validation_file=inputs.validation.id if inputs.validation else None,
        resume=StoredFiles(checkpoint.object_prefix, checkpoint.files) if checkpoint else None,
        start_step=attempt.start_step,
        platform=job.platform,
        devices=tuple((gpu.kind, gpu.uuid) for gpu in nodes.devices_of(session, attempt.id)),
        engine_socket=_engine_socket(session, attempt.engine_id),
        traceparent=attempt.traceparent,
    )


def _engine_socket(session: Session, engine_id: uuid.UUID | None) -> str | None:
    if engine_id is None:
        return None
    # an engine that is gone has no socket; connecting to nothing fails as an engine that was lost
    return nodes.engine_socket(session, engine_id) or "/nonexistent"
