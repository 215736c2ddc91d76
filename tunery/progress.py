"""What a trainer says, made durable: one fenced transaction a batch, and a batch sent twice is stored once."""

import math
import uuid
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from tunery import events, leases
from tunery.contracts.events import Checkpoint as CheckpointSaid
from tunery.contracts.events import Eval, Event, FileEntry, Metrics, Phase, Sample, Started, Warning
from tunery.events import Entry
from tunery.ids import CHECKPOINT, encode
from tunery.leases import Held
from tunery.models import Checkpoint, MetricChunk, MetricSeries

MAX_SERIES = 200
"""Distinct metric names of one job; more are dropped, because names cost more than points."""

MAX_EPOCHS = 200
"""So many are kept by their time; more are counted as steps alone."""

OPENAI_NAMES = {
    "train/loss": "train_loss",
    "train/mean_token_accuracy": "train_mean_token_accuracy",
    "train/learning_rate": "learning_rate",
    "train/grad_norm": "grad_norm",
    "train/epoch": "epoch",
    "train/tokens_per_second": "tokens_per_second",
    "eval/loss": "valid_loss",
    "eval/mean_token_accuracy": "valid_mean_token_accuracy",
    "eval/exact_match": "valid_exact_match",
}


def ingest(session: Session, attempt_id: uuid.UUID, fence: int, said: Sequence[Event]) -> None:
    """Store a batch of events, in the order of their numbers, each once. Raises leases.Fenced."""
    held = leases.hold(session, attempt_id, fence)
    once = {event.seq: event for event in said if event.seq > held.attempt.last_event_seq}
    fresh = [once[seq] for seq in sorted(once)]
    if not fresh:
        return
    leases.mark_running(session, held)
    entries = [entry for event in fresh if (entry := _entry(event)) is not None]
    for event in fresh:
        _note(held, event)
    if held.attempt.first_step_at is None and any(isinstance(event, Metrics) for event in fresh):
        held.attempt.first_step_at = func.now()
    store_points(session, held, [(event.step, event.values) for event in fresh if isinstance(event, Metrics | Eval)])
    events.append(session, held.job, entries)
    held.attempt.last_event_seq = fresh[-1].seq


def store_checkpoint(
    session: Session, attempt_id: uuid.UUID, fence: int, said: CheckpointSaid, prefix: str, files: Sequence[FileEntry]
) -> None:
    """Record a checkpoint whose objects are stored and verified. Raises leases.Fenced."""
    held = leases.hold(session, attempt_id, fence)
    row = {
        "project_id": held.job.project_id,
        "job_id": held.job.id,
        "attempt_id": attempt_id,
        "step": said.step,
        "object_prefix": prefix,
        "files": [file.model_dump() for file in files],
        "bytes": sum(file.bytes for file in files),
        "metrics": json_safe(said.metrics),
    }
    checkpoint = Checkpoint(**row)
    same = (Checkpoint.job_id == held.job.id, Checkpoint.step == said.step, Checkpoint.deleted_at.is_(None))
    if session.scalar(select(Checkpoint.id).where(*same)):
        return  # a retry after a lost reply
    session.add(checkpoint)
    session.flush()
    data = {"kind": "checkpoint", "step": said.step, "id": encode(CHECKPOINT, checkpoint.id)}
    events.append(session, held.job, [Entry(f"Checkpoint created at step {said.step}", data=data)])


def discard_checkpoint(session: Session, held: Held) -> None:
    """The checkpoint this attempt was to continue from is damaged: an older one, or none, serves the next attempt."""
    if held.attempt.resume_checkpoint_id is not None:
        session.get_one(Checkpoint, held.attempt.resume_checkpoint_id).deleted_at = func.now()
        text = f"The checkpoint at step {held.attempt.start_step} is damaged and was discarded"
        events.append(session, held.job, [Entry(text, level="warn")])


def json_safe(values: dict[str, float]) -> dict[str, Any]:
    """JSON has no NaN and no Infinity: as strings they survive, and nothing that was measured is lost."""
    return {name: value if math.isfinite(value) else str(value) for name, value in values.items()}


def _entry(event: Event) -> Entry | None:
    at = datetime.fromtimestamp(event.time, UTC) if event.time else None
    match event:
        case Started():
            data = {"kind": "started"} | event.model_dump(mode="json", exclude={"seq", "time", "type", "protocol"})
            where = f"{event.device} in {event.precision}"
            start = f"; resumed at step {event.start_step}" if event.start_step else ""
            return Entry(f"Fine-tuning started on {where}{start}", data=data, at=at)
        case Phase():
            return Entry(
                f"Phase: {event.phase}", data={"kind": "phase", "phase": event.phase, "step": event.step}, at=at
            )
        case Metrics():
            named = {OPENAI_NAMES.get(name, name): value for name, value in event.values.items()}
            data = {"step": event.step, "total_steps": event.total_steps} | json_safe(named)
            loss = data.get("train_loss")
            shown = f", training loss={loss:.4f}" if isinstance(loss, float) else ""
            return Entry(f"Step {event.step}/{event.total_steps}{shown}", type="metrics", data=data, at=at)
        case Eval():
            data = {"kind": "eval", "when": event.when, "step": event.step, "values": json_safe(event.values)}
            shown = ", ".join(f"{name} {value:.4g}" for name, value in event.values.items())
            return Entry(f"Evaluation {event.when} training: {shown}", data=data, at=at)
        case Sample():
            data = {"kind": "sample"} | event.model_dump(include={"model", "index", "prompt", "expected", "output"})
            return Entry(f"Sample {event.index + 1} answered by the {event.model} model", data=data, at=at)
        case Warning():
            return Entry(event.message, level="warn", data={"kind": "warning", "code": event.code}, at=at)
        case _:
            return None


def _note(held: Held, event: Event) -> None:
    """Keep the newest numbers on the job's own row, where lists and progress lines find them."""
    progress = dict(held.job.progress or {})
    progress["step"] = max(event.step, progress.get("step", 0) if not isinstance(event, Started) else 0)
    match event:
        case Started():
            held.attempt.details = event.model_dump(mode="json", exclude={"seq", "time", "type"})
            progress |= {"total_steps": event.total_steps, "attempt": held.attempt.no}
            progress["epoch_clock"] = None  # what lies between two attempts is no training
        case Phase():
            progress["phase"] = event.phase
            _note_epochs(progress, event)
        case Metrics():
            safe = json_safe(event.values)
            progress["total_steps"] = event.total_steps
            progress["loss"] = safe.get("train/loss", progress.get("loss"))
            progress["tokens_per_second"] = safe.get("train/tokens_per_second", progress.get("tokens_per_second"))
            progress["tokens"] = event.tokens
            progress["gpu_memory_bytes"] = safe.get("system/gpu_memory_bytes", progress.get("gpu_memory_bytes"))
            _note_speed(progress, event)
            _note_epochs(progress, event)
        case Eval():
            safe = json_safe(event.values)
            progress["eval_loss"] = safe.get("eval/loss", progress.get("eval_loss"))
            if event.when == "before":
                progress["eval_before"] = safe
            elif event.when == "after":
                progress["eval_after"] = safe
        case _:
            pass
    held.job.progress = progress


def _note_speed(progress: dict[str, Any], event: Metrics) -> None:
    """Seconds a step, smoothed; what an ETA is made from."""
    last_step, last_time = progress.get("speed_step"), progress.get("speed_time")
    if last_step is not None and last_time is not None and event.step > last_step:
        seconds = (event.time - last_time) / (event.step - last_step)
        before = progress.get("seconds_per_step")
        progress["seconds_per_step"] = seconds if before is None else 0.7 * before + 0.3 * seconds
    progress["speed_step"], progress["speed_time"] = event.step, event.time


def _note_epochs(progress: dict[str, Any], event: Phase | Metrics) -> None:
    """Seconds of training in each pass over the rows, in all attempts together: steps done twice took their time twice.

    The clock stands still outside the phase `training`. A pass is over with the first numbers of the next one, or with
    the last step.
    """
    clock, training = progress.get("epoch_clock"), not isinstance(event, Phase) or event.phase == "training"
    if clock is not None:
        progress["epoch_s"] = progress.get("epoch_s", 0.0) + max(0.0, event.time - clock)
    progress["epoch_clock"] = event.time if training else None
    if isinstance(event, Phase) or not math.isfinite(at := event.values.get("train/epoch", math.nan)):
        return
    took = list(progress.get("epoch_seconds", []))
    over = min(int(at) if event.step < event.total_steps else math.ceil(at), MAX_EPOCHS) - len(took)
    if over > 0:  # several at once, where an epoch is shorter than the pause between two numbers
        progress["epoch_seconds"] = took + [round(progress.get("epoch_s", 0.0) / over, 3)] * over
        progress["epoch_s"] = 0.0


def store_points(session: Session, held: Held, said: Iterable[tuple[int, Mapping[str, float]]]) -> None:
    """Numbers of steps, each in the series of its name. Of a second one for a series and step nothing is kept."""
    points: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for step, values in said:
        for name, value in values.items():
            points[name[:200]].append((step, value))
    if not points:
        return
    ids = _series(session, held, sorted(points))
    rows = [
        {
            "project_id": held.job.project_id,
            "series_id": ids[name],
            "attempt_no": held.attempt.no,
            "first_step": series[0][0],
            "steps": [step for step, _ in series],
            "vals": [value for _, value in series],
        }
        for name, series in points.items()
        if name in ids
    ]
    if rows:
        session.execute(insert(MetricChunk).values(rows).on_conflict_do_nothing())


def _series(session: Session, held: Held, names: Sequence[str]) -> dict[str, int]:
    mine = MetricSeries.job_id == held.job.id
    known = {row.name: row.id for row in session.execute(select(MetricSeries.name, MetricSeries.id).where(mine))}
    new = [name for name in names if name not in known][: max(0, MAX_SERIES - len(known))]
    if new:
        rows = [{"project_id": held.job.project_id, "job_id": held.job.id, "name": name} for name in new]
        made = insert(MetricSeries).values(rows).on_conflict_do_nothing().returning(MetricSeries.name, MetricSeries.id)
        known |= {row.name: row.id for row in session.execute(made)}
    return known


def checkpoints(
    session: Session, project_id: uuid.UUID, job_id: uuid.UUID, *, after: uuid.UUID | None, limit: int
) -> tuple[list[Checkpoint], bool]:
    """A job's stored checkpoints, newest first; and whether there are more."""
    query = (
        select(Checkpoint)
        .where(Checkpoint.project_id == project_id, Checkpoint.job_id == job_id, Checkpoint.deleted_at.is_(None))
        .order_by(Checkpoint.step.desc())
        .limit(limit + 1)
    )
    if after is not None:
        step = select(Checkpoint.step).where(Checkpoint.project_id == project_id, Checkpoint.id == after)
        query = query.where(Checkpoint.step < step.scalar_subquery())
    rows = list(session.scalars(query))
    return rows[:limit], len(rows) > limit


def checkpoint_of(session: Session, checkpoint_id: uuid.UUID) -> Checkpoint:
    return session.get_one(Checkpoint, checkpoint_id)
