"""`POST /v1/fine_tuning/estimate`: what a training would take."""

from typing import Annotated, Literal

from pydantic import Field

from api.schemas.common import In, Out
from api.schemas.job_request import HyperparametersIn
from tunery.quotes import OnClass, Quote, Request
from tunery.recipes import Extension, Hyperparameters


class EstimateIn(In):
    """A training that is not submitted. Give `model` or `parameters`, and `training_file` or `rows`."""

    model: Annotated[str | None, Field(min_length=1, max_length=256)] = None
    parameters: Annotated[int | None, Field(ge=1_000_000, le=10**13)] = None
    """Of a model that is not in the catalogue; the nearest common shape is taken."""
    training_file: Annotated[str | None, Field(max_length=256)] = None
    """Its rows are known once a job on it has had them checked; before that, give `rows` too."""
    rows: Annotated[int | None, Field(ge=1, le=10**10)] = None
    row_bytes: Annotated[float, Field(ge=1, le=10**9)] = 1200
    """Mean bytes of a row's JSON."""
    longest_row_bytes: Annotated[int | None, Field(ge=1, le=10**9)] = None
    hyperparameters: HyperparametersIn = HyperparametersIn()
    tunery: Extension = Extension()
    profile: Literal["learned", "seed001"] = "learned"
    """`learned`: from past runs, else from closed forms. `seed001`: a rule of thumb that knows no GPU."""


class ClassEstimateOut(Out):
    """On one class of GPU. `amount` is null where it has no price; `runs` counts the past runs behind `hours`."""

    gpu_class: str | None
    gpu_bytes: int
    fits: bool | None
    hours: float
    hours_p90: float
    price_per_hour: float | None
    amount: float | None
    runs: int


class EstimateOut(Out):
    """`classes` has the best first: the training fits there, and costs or takes least."""

    object: Literal["tunery.estimate"] = "tunery.estimate"
    profile: str
    model: str | None
    parameters: int
    rows: int
    epochs: float
    tokens: int
    gpus: int
    adapter_parameters: int
    adapter_bytes: int
    classes: list[ClassEstimateOut]


def estimate_request_of(body: EstimateIn) -> Request:
    named = body.hyperparameters.model_dump()
    whole = {name: int(named[name]) for name in ("n_epochs", "batch_size") if isinstance(named[name], float)}
    return Request(
        model=body.model,
        parameters=body.parameters,
        training_file=body.training_file,
        rows=body.rows,
        row_bytes=body.row_bytes,
        longest_row_bytes=body.longest_row_bytes,
        hyperparameters=Hyperparameters(**(named | whole)),
        extension=body.tunery,
        profile=body.profile,
    )


def estimate_out(quote: Quote) -> EstimateOut:
    return EstimateOut(
        profile=quote.profile,
        model=quote.model,
        parameters=quote.parameters,
        rows=quote.rows,
        epochs=quote.epochs,
        tokens=quote.tokens,
        gpus=quote.gpus,
        adapter_parameters=quote.adapter_parameters,
        adapter_bytes=quote.adapter_bytes,
        classes=[_class_out(one) for one in quote.classes],
    )


def _class_out(one: OnClass) -> ClassEstimateOut:
    return ClassEstimateOut(
        gpu_class=one.gpu_class,
        gpu_bytes=one.gpu_bytes,
        fits=one.fits,
        hours=round(one.hours, 4),
        hours_p90=round(one.hours_p90, 4),
        price_per_hour=one.price_per_hour,
        amount=None if one.amount is None else round(one.amount, 4),
        runs=one.runs,
    )
