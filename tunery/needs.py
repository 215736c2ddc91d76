"""What a job needs, written on its row: memory and time at the data check, more memory after it ran out of it."""

import uuid
from typing import Any

from sqlalchemy.orm import Session

from tunery import durations, observations
from tunery.contracts.spec import Recipe
from tunery.durations import Work
from tunery.errors import Invalid
from tunery.estimate import correction, memory, places
from tunery.estimate.memory import Kind, Memory
from tunery.estimate.places import Ask, Device
from tunery.models import BaseModel, Dataset, Job

LIMIT_TIMES = 3.0
LEAST_LIMIT_S = 1800.0
"""A job without a limit of its own gets three times its p90, but at least this."""


def refuse_impossible(session: Session, ask: Ask, base: BaseModel) -> None:
    """Refuse what no node that there is could ever give. A deployment without nodes accepts everything.

    Raises:
        Invalid: it says what the largest node has.
    """
    devices = observations.devices(session)
    if not devices:
        return
    fix = "Ask for what a node has, or add a node that has more."
    if ask.gpu_class is not None and not any(one.gpu_class == ask.gpu_class for one in devices):
        known = ", ".join(sorted({one.gpu_class for one in devices}))
        message = f"No node has GPUs of the class '{ask.gpu_class}'; there are: {known}."
        raise Invalid(message, param="tunery.resources.gpu_class", fix=fix)
    fitting = places.suitable(devices, ask)
    if not fitting:
        wanted = ", ".join(f"{name}={value}" for name, value in sorted(ask.labels.items()))
        of_class = f" and GPUs of the class '{ask.gpu_class}'" if ask.gpu_class else ""
        message = f"No node has the labels {wanted}{of_class}."
        raise Invalid(message, param="tunery.resources.node_labels", fix=fix)
    largest = places.largest_place(devices, ask)
    if largest is None:
        message = f"{ask.gpus} GPUs on one node were asked for; the largest node that fits has "
        message += f"{places.most_on_a_node(fitting)}."
        raise Invalid(message, param="tunery.resources.gpus", fix=fix)
    # what is certain before the rows are known: each GPU holds the weights
    weights = min(_weights(base, kind) for kind in _kinds(fitting))
    if weights > largest:
        message = f"The weights of '{base.name}' alone take {_gb(weights)} on each GPU; "
        message += f"the largest device that this job could have has {_gb(largest)}."
        raise Invalid(message, param="model", fix="Choose a smaller base model, or add a node with larger devices.")


def settle(session: Session, job: Job, base: BaseModel, train: Dataset, validation: Dataset | None) -> None:
    """Write on the job what its rows say: memory, tokens, time limit, and what it shares with others of its base."""
    recipe, card = Recipe.model_validate(job.recipe), base.card or {}
    devices = observations.devices(session)
    longest = max(train.max_row_bytes, validation.max_row_bytes if validation else 0)
    needed, job.required_bytes = reserved(session, base.id, card, recipe, longest, devices, ask_of(job))
    job.estimated_bytes = needed.total
    job.estimated_tokens = durations.tokens(recipe, train.rows, train.bytes)
    _, p90 = durations.of_work(session, Work.of(job, card))
    job.limit_s = job.time_limit_s or max(LEAST_LIMIT_S, LIMIT_TIMES * p90)
    job.engine_key = _engine_key(base, recipe, places.suitable(devices, ask_of(job)))
    job.engine_bytes = needed.own if job.engine_key else None


def reserved(
    session: Session,
    base_model_id: uuid.UUID,
    card: dict[str, Any],
    recipe: Recipe,
    longest: int,
    devices: list[Device],
    ask: Ask,
) -> tuple[Memory, int]:
    """The bare estimate on each GPU, and the bytes to reserve for it.

    Without recomputing activations where some device could hold them, else with: trainers decide the same way. Where
    devices of several kinds would do, the kind that needs the most counts.
    """
    method, kinds = memory.method_of(recipe), _kinds(places.suitable(devices, ask))

    def corrected(form: Memory) -> tuple[Memory, int]:
        seen = observations.peaks(session, base_model_id, method, ask.gpu_class, form.total)
        return form, correction.reservation(form.total, seen)

    most = corrected(max((memory.of_recipe(card, recipe, longest, kind=one) for one in kinds), key=lambda m: m.total))
    largest = places.largest_place(devices, ask)
    if largest is None or most[1] <= largest or "cuda" not in kinds:
        return most
    return corrected(memory.of_recipe(card, recipe, longest, checkpointing=True))


def ask_of(job: Job) -> Ask:
    return Ask(job.gpus, job.gpu_class, job.node_labels)


def after_out_of_memory(session: Session, job: Job, peak_bytes: int) -> tuple[bool, str]:
    """An attempt ran out of memory: whether the job gets another try with more, and the numbers in a sentence.

    The first time more is reserved, if any node has a device for it; a second time ends the job.
    """
    job.memory_faults += 1
    reserved = job.required_bytes or 0
    peak = f", and held {_gb(peak_bytes)} at its peak" if peak_bytes else ""
    had = f"It had {_gb(reserved)} reserved on each GPU{peak}."
    if job.memory_faults > 1:
        return False, f"{had} This was its second try, with more memory than the first."
    raised = correction.after_out_of_memory(reserved, peak_bytes)
    largest = places.largest_place(observations.devices(session), ask_of(job)) or 0
    if raised > largest:
        return (
            False,
            f"{had} Another try needs {_gb(raised)}; the largest device that it could have has {_gb(largest)}.",
        )
    job.required_bytes = raised
    return True, f"{had} Now {_gb(raised)} are reserved."


def _kinds(devices: list[Device]) -> list[Kind]:
    """Of devices; a deployment without any is expected to get GPUs."""
    found: list[Kind] = [kind for kind in ("cuda", "cpu") if any(one.kind == kind for one in devices)]
    return found or ["cuda"]


def _weights(base: BaseModel, kind: Kind) -> int:
    return memory.value_bytes("auto", kind) * (base.parameters or 0)


def _engine_key(base: BaseModel, recipe: Recipe, devices: list[Device]) -> str | None:
    """Jobs with equal keys can train over one resident base. None: on kinds of devices that do not agree."""
    kinds = _kinds(devices)
    if len(kinds) > 1 or memory.method_of(recipe) is not memory.Method.LORA:
        return None
    precision = "fp32" if memory.value_bytes(recipe.training.precision, kinds[0]) == 4 else "bf16"
    return f"{base.id}@{base.revision or ''}/{precision}/{kinds[0]}/{memory.Method.LORA}"


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
