"""The body of `POST /v1/fine_tuning/jobs`."""

import re
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import Field, PlainValidator, WithJsonSchema, field_validator

from api.schemas.common import In
from tunery import recipes
from tunery.errors import Invalid
from tunery.jobs import Request
from tunery.recipes import Extension

MAX_MULTIPLIER = 5000
"""Times the base rate of 2e-4 this is a learning rate of 1, the most a recipe may say."""
_SUFFIX = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def _auto_or(what: str, sound: Callable[[Any], bool]) -> Any:
    def check(value: Any) -> Any:
        if value == "auto" or (isinstance(value, int | float) and not isinstance(value, bool) and sound(value)):
            return value
        raise ValueError(f"expected 'auto' or {what}")

    return PlainValidator(check)


def _whole(low: int, high: int) -> Callable[[Any], bool]:
    return lambda value: value == int(value) and low <= value <= high if value == value else False


Epochs = Annotated[Any, _auto_or("a whole number from 1 to 50", _whole(1, 50))]
Batch = Annotated[Any, _auto_or("a whole number from 1 to 256", _whole(1, 256))]
Multiplier = Annotated[
    Any, _auto_or(f"a number above 0, at most {MAX_MULTIPLIER}", lambda value: 0 < value <= MAX_MULTIPLIER)
]


def _schema(kind: str, **bounds: float) -> WithJsonSchema:
    return WithJsonSchema({"anyOf": [{"type": "string", "const": "auto"}, {"type": kind, **bounds}], "default": "auto"})


class HyperparametersIn(In):
    """OpenAI's three knobs; `auto` (the default) lets the rows decide."""

    n_epochs: Annotated[Epochs, _schema("integer", minimum=1, maximum=50)] = "auto"
    batch_size: Annotated[Batch, _schema("integer", minimum=1, maximum=256)] = "auto"
    learning_rate_multiplier: Annotated[Multiplier, _schema("number", exclusiveMinimum=0, maximum=MAX_MULTIPLIER)] = (
        "auto"
    )


class SupervisedIn(In):
    hyperparameters: HyperparametersIn | None = None


class MethodIn(In):
    """How to train. Settings of a method other than `type` may be present, and mean nothing."""

    type: str
    supervised: SupervisedIn | None = None
    dpo: Any = None
    reinforcement: Any = None


class JobIn(In):
    """A fine-tuning job in OpenAI's form; everything of ours goes under `tunery`."""

    model: Annotated[str, Field(min_length=1, max_length=256)]
    """Name of a base model; `GET /v1/models` lists them."""
    training_file: Annotated[str, Field(min_length=1, max_length=256)]
    validation_file: Annotated[str | None, Field(max_length=256)] = None
    suffix: str | None = None
    """Becomes part of the model's name, and the name of its adapter: 1 to 64 letters, digits, `.`, `_` or `-`."""
    seed: Annotated[int | None, Field(ge=-(2**63), lt=2**63)] = None
    metadata: Annotated[dict[str, str] | None, Field(max_length=16)] = None
    integrations: list[dict[str, Any]] | None = None
    method: MethodIn | None = None
    hyperparameters: HyperparametersIn | None = None
    """Deprecated by OpenAI and still widely sent; the same as `method.supervised.hyperparameters`."""
    tunery: Extension | None = None
    trainingType: Any = None  # noqa: N815 - Azure's clients send it; it means nothing here

    @field_validator("suffix")
    @classmethod
    def _speakable(cls, suffix: str | None) -> str | None:
        if suffix is not None and not _SUFFIX.fullmatch(suffix):
            raise ValueError(
                "expected 1 to 64 letters, digits, '.', '_' or '-', the first a letter or a digit: "
                "it becomes part of a model's name"
            )
        return suffix

    @field_validator("metadata")
    @classmethod
    def _short(cls, metadata: dict[str, str] | None) -> dict[str, str] | None:
        for key, value in (metadata or {}).items():
            if not 1 <= len(key) <= 64 or len(value) > 512:
                raise ValueError("keys have 1 to 64 characters, values at most 512")
        return metadata


class PriorityIn(In):
    priority: Annotated[int, Field(ge=-100, le=100)]
    """Higher first, among the project's own jobs; 0 is usual."""


def request_of(body: JobIn) -> Request:
    """What the job service understands.

    Raises:
        Invalid: a method or an integration that does not exist here, or hyperparameters that contradict each other.
    """
    if body.integrations:
        kind = str(body.integrations[0].get("type"))[:40]
        fix = "Leave 'integrations' out; `GET .../events` carries every metric."
        raise Invalid(f"The integration '{kind}' is not supported yet.", param="integrations", fix=fix)
    return Request(
        model=body.model,
        training_file=body.training_file,
        validation_file=body.validation_file,
        suffix=body.suffix,
        seed=body.seed,
        metadata=body.metadata,
        hyperparameters=hyperparameters_of(body),
        extension=body.tunery or Extension(),
    )


def hyperparameters_of(body: JobIn) -> recipes.Hyperparameters:
    method = body.method
    if method is not None and method.type != "supervised":
        message = f"The method '{method.type[:40]}' is not supported yet."
        raise Invalid(message, param="method.type", fix="Use 'supervised', or leave 'method' out.")
    nested = method.supervised.hyperparameters if method and method.supervised else None
    chosen: dict[str, Any] = nested.model_dump(exclude_unset=True) if nested else {}
    for name, value in (body.hyperparameters.model_dump(exclude_unset=True) if body.hyperparameters else {}).items():
        if chosen.setdefault(name, value) != value:
            message = f"'hyperparameters.{name}' and 'method.supervised.hyperparameters.{name}' differ."
            raise Invalid(message, param=f"hyperparameters.{name}", fix="Give it once, under 'method'.")
    for name in ("n_epochs", "batch_size"):
        if isinstance(chosen.get(name), float):
            chosen[name] = int(chosen[name])
    return recipes.Hyperparameters(**chosen)
