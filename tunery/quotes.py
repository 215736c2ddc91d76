"""What a training would take, before it is submitted: time, memory, money and the size of what comes out."""

from dataclasses import dataclass, field
from typing import Any, Literal

from sqlalchemy import select
from sqlalchemy.orm import Session

from tunery import catalogue, datasets, durations, files, needs, observations, recipes
from tunery.durations import Work
from tunery.errors import Invalid
from tunery.estimate import memory, places, shapes
from tunery.estimate.places import Ask, Device
from tunery.ids import uuid7
from tunery.models import GpuClass
from tunery.recipes import Extension, Hyperparameters

Profile = Literal["learned", "seed001"]

SEED001_ROWS_PER_HOUR = 100_000
SEED001_PARAMETERS = 8_000_000_000
"""Of the model that the rule of thumb was made for; others take proportionally longer."""
SEED001_PRICE_PER_HOUR = 0.87
SEED001_BYTES = 2
"""bf16: a parameter of the base, and of the adapter."""
ADAPTER_BYTES = 4
"""A stored parameter of our adapters: fp32."""


@dataclass(frozen=True)
class Request:
    """What is to be trained. Either `model` or `parameters`; either `training_file` or `rows`."""

    model: str | None = None
    parameters: int | None = None
    training_file: str | None = None
    rows: int | None = None
    row_bytes: float = 1200.0
    """Of a row's JSON, on average; used with `rows`."""
    longest_row_bytes: int | None = None
    """None: four times the average."""
    hyperparameters: Hyperparameters = field(default_factory=Hyperparameters)
    extension: Extension = field(default_factory=Extension)
    profile: Profile = "learned"


@dataclass(frozen=True)
class OnClass:
    """The same training on one class of GPU. Money is None where the class has no price."""

    gpu_class: str | None
    gpu_bytes: int
    """On each GPU, with its margin."""
    fits: bool | None
    """None: no such GPU is there to compare with."""
    hours: float
    hours_p90: float
    price_per_hour: float | None
    amount: float | None
    runs: int
    """Past runs that the hours come from; 0: a closed form."""


@dataclass(frozen=True)
class Quote:
    profile: Profile
    model: str | None
    parameters: int
    rows: int
    epochs: float
    tokens: int
    gpus: int
    adapter_parameters: int
    adapter_bytes: int
    classes: tuple[OnClass, ...]
    """The best first: it fits, and costs or takes least."""


@dataclass(frozen=True)
class _Rows:
    count: int
    size: float
    longest: int


def quote(session: Session, project_id: Any, asked: Request) -> Quote:
    """What `asked` would take on each class of GPU that it may run on.

    Raises:
        NotFound: the model or the file does not exist in this project.
        Invalid: neither rows nor a file whose rows have been checked; neither a model nor a size.
    """
    base_id, name, card = _base(session, asked)
    rows = _rows(session, project_id, asked)
    recipe = recipes.resolve(asked.hyperparameters, asked.extension, rows.count, seed=0)
    trained = memory.lora_parameters(card, recipe.adapter)
    tokens = durations.tokens(recipe, rows.count, round(rows.count * rows.size))
    place = asked.extension.resources
    epochs = recipe.training.num_train_epochs
    if asked.profile == "seed001":
        classes, width = (_rule_of_thumb(card["parameters"], rows.count * epochs, place.gpus),), SEED001_BYTES
    else:
        ask = Ask(place.gpus, place.gpu_class, place.node_labels)
        classes, width = _on_classes(session, Work(base_id, card, recipe, tokens, ask), rows.longest), ADAPTER_BYTES
    return Quote(
        profile=asked.profile,
        model=name,
        parameters=card["parameters"],
        rows=rows.count,
        epochs=epochs,
        tokens=tokens,
        gpus=place.gpus,
        adapter_parameters=trained,
        adapter_bytes=width * trained,
        classes=classes,
    )


def rows_known(session: Session, project_id: Any, training_file: str) -> bool:
    """Whether a job has had the rows of this file checked. Raises NotFound."""
    file = files.get(session, project_id, training_file, param="training_file")
    return datasets.find(session, project_id, file.sha256) is not None


def _rule_of_thumb(parameters: int, rows: float, gpus: int) -> OnClass:
    hours = rows / SEED001_ROWS_PER_HOUR * parameters / SEED001_PARAMETERS / gpus
    amount = hours * gpus * SEED001_PRICE_PER_HOUR
    held = SEED001_BYTES * parameters
    return OnClass(None, held, None, hours, hours, SEED001_PRICE_PER_HOUR, amount, runs=0)


def _on_classes(session: Session, work: Work, longest: int) -> tuple[OnClass, ...]:
    devices = observations.devices(session)
    fitting = places.suitable(devices, work.ask)
    names = sorted({one.gpu_class for one in fitting}) or [work.ask.gpu_class]
    prices = dict(session.execute(select(GpuClass.name, GpuClass.price_per_hour)).tuples().all())
    found = [_on_class(session, work, longest, name, fitting, prices) for name in names]
    return tuple(sorted(found, key=lambda one: (one.fits is False, one.amount is None, one.amount or 0, one.hours)))


def _on_class(
    session: Session, work: Work, longest: int, name: str | None, devices: list[Device], prices: dict[str, Any]
) -> OnClass:
    ask = Ask(work.ask.gpus, name, work.ask.labels)
    own = [one for one in devices if name in (None, one.gpu_class)]
    _, held = needs.reserved(session, work.base_model_id, work.card, work.recipe, longest, own, ask)
    largest = places.largest_place(own, ask)
    here = Work(work.base_model_id, work.card, work.recipe, work.tokens, ask)
    p50, p90 = durations.of_work(session, here)
    price = float(prices[name]) if name is not None and prices.get(name) is not None else None
    return OnClass(
        gpu_class=name,
        gpu_bytes=held,
        fits=None if not devices else largest is not None and held <= largest,
        hours=p50 / 3600,
        hours_p90=p90 / 3600,
        price_per_hour=price,
        amount=None if price is None else p50 / 3600 * work.ask.gpus * price,
        runs=durations.basis(session, here),
    )


def _base(session: Session, asked: Request) -> tuple[Any, str | None, dict[str, Any]]:
    if asked.model is not None:
        base = catalogue.ready_one(session, asked.model)
        return base.id, base.name, base.card or {}
    if asked.parameters is None:
        fix = "Name a base model, or say how many parameters it has."
        raise Invalid("Neither 'model' nor 'parameters' was given.", param="model", fix=fix)
    return uuid7(), None, shapes.of_size(asked.parameters)  # nothing was ever learned of this one


def _rows(session: Session, project_id: Any, asked: Request) -> _Rows:
    if asked.training_file is None:
        if asked.rows is None:
            fix = "Name a training file whose rows have been checked, or say how many rows there are."
            raise Invalid("Neither 'training_file' nor 'rows' was given.", param="rows", fix=fix)
        return _Rows(asked.rows, asked.row_bytes, asked.longest_row_bytes or round(4 * asked.row_bytes))
    file = files.get(session, project_id, asked.training_file, param="training_file")
    known = datasets.find(session, project_id, file.sha256)
    if known is not None:
        return _Rows(known.rows, known.bytes / known.rows, known.max_row_bytes)
    if asked.rows is None:
        fix = "Say in 'rows' how many there are; the first job on this file has them checked."
        raise Invalid("The rows of this file have not been checked yet.", param="rows", fix=fix)
    size = file.bytes / asked.rows
    return _Rows(asked.rows, size, asked.longest_row_bytes or round(4 * size))
