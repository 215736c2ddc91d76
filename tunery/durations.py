"""How long jobs take: learned from runs of the same base model, method and GPU class, else from FLOPs.

First whichever is there: runs on the job's class; where it names none or has none, runs on any class; a closed form
for the classes that the deployment has, the middle one for p50 and the slowest for p90.
"""

import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median_low
from typing import Any, Self, cast

from sqlalchemy import select
from sqlalchemy.orm import Session

from tunery import observations
from tunery.contracts.spec import Recipe
from tunery.estimate import memory, places, time
from tunery.estimate.memory import Kind
from tunery.estimate.places import Ask, Device
from tunery.estimate.time import Seconds
from tunery.models import BaseModel, Job
from tunery.observations import Speeds


@dataclass(frozen=True, slots=True)
class Work:
    """What is left of a job, as far as its duration goes."""

    base_model_id: uuid.UUID
    card: dict[str, Any]
    recipe: Recipe
    tokens: int
    """Of the whole training."""
    ask: Ask
    left: float = 1.0
    """Share that is still to be trained."""

    @classmethod
    def of(cls, job: Job, card: dict[str, Any]) -> Self:
        return cls(
            job.base_model_id,
            card,
            Recipe.model_validate(job.recipe),
            job.estimated_tokens or 0,
            Ask(job.gpus, job.gpu_class, job.node_labels or {}),
            _left(job.progress),
        )


def expected(session: Session, job: Job) -> tuple[float, float]:
    """Seconds that a job will hold its GPUs from now on, loading included: median, and what nine of ten keep.

    Of a job whose rows have not been checked: its limit, both times.
    """
    return of_jobs(session, [job])[job.id]


def of_ids(session: Session, ids: Sequence[uuid.UUID]) -> dict[uuid.UUID, tuple[float, float]]:
    """`expected` of thousands of jobs: four queries, however many they are; whole rows are not read."""
    columns = (Job.id, Job.base_model_id, Job.gpus, Job.gpu_class, Job.node_labels, Job.recipe, Job.estimated_tokens)
    query = select(*columns, Job.progress, Job.limit_s).where(Job.id.in_(ids))
    return of_jobs(session, cast("Iterable[Job]", session.execute(query)))


def of_jobs(session: Session, jobs: Iterable[Job]) -> dict[uuid.UUID, tuple[float, float]]:
    """`expected` of jobs that are at hand."""
    jobs = list(jobs)
    wanted = {job.base_model_id for job in jobs}
    query = select(BaseModel.id, BaseModel.card).where(BaseModel.id.in_(wanted))
    cards = dict(session.execute(query).tuples().all())
    speeds, devices = observations.speeds(session), observations.devices(session)
    known: dict[tuple[Any, ...], tuple[Seconds, Seconds]] = {}
    found: dict[uuid.UUID, tuple[float, float]] = {}
    for job in jobs:
        if job.recipe is None or job.estimated_tokens is None:
            found[job.id] = (job.limit_s, job.limit_s)
            continue
        # thousands of jobs are a few kinds of work: the parts are looked up once a kind
        work = Work.of(job, cards.get(job.base_model_id) or {})
        kind = (job.base_model_id, job.gpus, job.gpu_class, tuple(sorted(work.ask.labels.items())), _shape(work.recipe))
        if (parts := known.get((*kind, work.tokens))) is None:
            parts = known[*kind, work.tokens] = _parts(work, speeds, devices)
        found[job.id] = _sum(*parts, work.left)
    return found


def of_work(session: Session, work: Work) -> tuple[float, float]:
    """As `expected`, of what has no row yet."""
    return _sum(*_parts(work, observations.speeds(session), observations.devices(session)), work.left)


def basis(session: Session, work: Work) -> int:
    """How many past runs speak for the duration of such work; 0: it is a closed form."""
    speeds = observations.speeds(session)
    return found.samples if (found := _learned(work, speeds)) else 0


def tokens(recipe: Recipe, rows: int, size: int) -> int:
    """Tokens of the whole training, from the rows' number and their bytes in all."""
    training = recipe.training
    a_row = max(1.0, min(training.max_length, size / max(rows, 1) / memory.BYTES_PER_TOKEN))
    return (
        round(a_row * steps(recipe, rows) * _batch(recipe))
        if training.max_steps > 0
        else round(a_row * rows * training.num_train_epochs)
    )


def steps(recipe: Recipe, rows: int) -> int:
    """Optimiser steps."""
    training = recipe.training
    return (
        training.max_steps
        if training.max_steps > 0
        else max(1, round(rows * training.num_train_epochs / _batch(recipe)))
    )


def _parts(work: Work, speeds: Speeds, devices: Sequence[Device]) -> tuple[Seconds, Seconds]:
    """Loading, and the whole training."""
    if (speed := _learned(work, speeds)) is not None:
        a_token = time.measured(speed.token_s_p50, speed.token_s_p90, speed.samples)
        load = time.measured(speed.load_s_p50, speed.load_s_p90, speed.samples)
        return load, a_token.times(work.tokens / work.ask.gpus)
    trained = memory.lora_parameters(work.card, work.recipe.adapter)
    flops = work.tokens * time.token_flops(work.card, memory.method_of(work.recipe), trained)
    a_row = max(1, work.recipe.training.max_length // 8)
    count = max(1, round(work.tokens / (_batch(work.recipe) * a_row)))
    places_ = places.suitable(devices, work.ask) or list(devices)
    kinds: set[tuple[str, Kind]] = {(one.gpu_class, "cpu" if one.kind == "cpu" else "cuda") for one in places_}
    guesses = [time.training(flops, count, name, kind, work.ask.gpus) for name, kind in kinds or {("", "cuda")}]
    guess = Seconds(median_low(one.p50 for one in guesses), max(one.p90 for one in guesses))
    return time.loading(2 * work.card["parameters"]), guess


def _learned(work: Work, speeds: Speeds) -> observations.Speed | None:
    method = memory.method_of(work.recipe)
    on_class = speeds.get((work.base_model_id, method, work.ask.gpu_class)) if work.ask.gpu_class else None
    return on_class or speeds.get((work.base_model_id, method, None))


def _sum(load: Seconds, train: Seconds, left: float) -> tuple[float, float]:
    both = load + train.times(left)
    return both.p50, max(both.p50, both.p90)


def _left(progress: dict[str, Any] | None) -> float:
    step, total = (progress or {}).get("step") or 0, (progress or {}).get("total_steps") or 0
    return max(0.0, 1 - step / total) if total else 1.0


def _batch(recipe: Recipe) -> int:
    return recipe.training.per_device_train_batch_size * recipe.training.gradient_accumulation_steps


def _shape(recipe: Recipe) -> tuple[Any, ...]:
    return recipe.adapter.r, recipe.adapter.target_modules, _batch(recipe), recipe.training.max_length
