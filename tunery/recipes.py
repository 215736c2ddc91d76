"""From what a user asked to a complete recipe: every `auto` becomes a number, once the rows are known."""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from tunery.contracts.spec import EvaluationArgs, LoraSpec, Recipe, TrainingArgs

BASE_LEARNING_RATE = 2e-4
"""LoRA's usual rate (QLoRA, arXiv:2305.14314, section 4); OpenAI's `learning_rate_multiplier` scales it."""
MAX_MICRO_BATCH = 4

Auto = Literal["auto"]


_PERIOD = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?")
_UNITS_S = (86_400, 3600, 60, 1)
LEAST_LIMIT_S, MOST_LIMIT_S = 60, 90 * 86_400


def seconds_of(given: Any) -> Any:
    """`2h30m`, `90m`, `1d` or `3600s` in seconds; anything else is left for the validation that follows."""
    if not isinstance(given, str):
        return given
    found = _PERIOD.fullmatch(given.strip())
    if found is None or not any(found.groups()):
        raise ValueError("expected seconds, or a period such as '90m' or '2h30m'")
    return float(sum(int(count or 0) * unit for count, unit in zip(found.groups(), _UNITS_S, strict=True)))


def _sound(seconds: float) -> float:
    if not LEAST_LIMIT_S <= seconds <= MOST_LIMIT_S:
        raise ValueError(
            f"expected {LEAST_LIMIT_S} seconds to {MOST_LIMIT_S // 86_400} days; it was {seconds:g} seconds"
        )
    return seconds


Period = Annotated[
    float,
    BeforeValidator(seconds_of),
    AfterValidator(_sound),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "number", "minimum": LEAST_LIMIT_S, "maximum": MOST_LIMIT_S},
                {"type": "string", "pattern": r"^(\d+d)?(\d+h)?(\d+m)?(\d+s)?$", "examples": ["2h30m"]},
            ]
        }
    ),
]
Word = Annotated[str, Field(min_length=1, max_length=63, pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]*$")]
"""Of a label or the name of a class."""


class Resources(BaseModel):
    """Where a job may run."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    gpus: Annotated[int, Field(ge=1, le=64)] = 1
    """All on one node; at most what the deployment allows."""
    gpu_class: Word | None = None
    """Only on GPUs of this class, such as `h100-80gb`; `null` is any."""
    node_labels: Annotated[dict[Word, Word], Field(max_length=16)] = {}
    """Only on nodes that have all of these labels."""
    shareable: bool = False
    """May run beside other shareable jobs of its own project on one GPU."""


class Scheduling(BaseModel):
    """When a job runs."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    priority: Annotated[int, Field(ge=-100, le=100)] = 0
    """Among the project's own jobs; higher first."""
    time_limit: Period | None = None
    """Time that it may hold its GPUs, in seconds or as `2h30m`; `null` is a default that is never a reason to fail."""
    preemptible: bool = True
    """May be stopped at a checkpoint for a job of a project that has had less than its share, and go on later."""
    urgent: bool = False
    """Before every project's jobs; needs a key with the scope `admin`."""


class Extension(BaseModel):
    """The `tunery` object of a job request. Keys that are absent are resolved; unknown ones are refused by name."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    adapter: LoraSpec | None = None
    training: TrainingArgs | None = None
    evaluation: EvaluationArgs | None = None
    resources: Resources = Resources()
    scheduling: Scheduling = Scheduling()


class Hyperparameters(BaseModel):
    """OpenAI's three knobs."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    n_epochs: int | Auto = "auto"
    batch_size: int | Auto = "auto"
    learning_rate_multiplier: float | Auto = "auto"


def resolve(asked: Hyperparameters, extension: Extension, rows: int, seed: int) -> Recipe:
    """The recipe that will run. Our extension's values win over OpenAI's, and both over `auto`."""
    own = extension.training.model_dump(exclude_unset=True) if extension.training else {}
    batch = asked.batch_size if asked.batch_size != "auto" else _auto_batch(rows)
    micro = next(size for size in range(min(batch, MAX_MICRO_BATCH), 0, -1) if batch % size == 0)
    epochs = asked.n_epochs if asked.n_epochs != "auto" else _auto_epochs(rows)
    multiplier = asked.learning_rate_multiplier if asked.learning_rate_multiplier != "auto" else 1.0
    chosen: dict[str, Any] = {
        "num_train_epochs": epochs,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": batch // micro,
        "learning_rate": BASE_LEARNING_RATE * multiplier,
        "seed": seed % 2**32,
    }
    return Recipe(
        adapter=extension.adapter or LoraSpec(),
        training=TrainingArgs(**(chosen | own)),
        evaluation=extension.evaluation or EvaluationArgs(),
    )


def openai_view(recipe: Recipe) -> dict[str, float]:
    """The recipe in OpenAI's three numbers."""
    training = recipe.training
    return {
        "n_epochs": max(1, round(training.num_train_epochs)),
        "batch_size": training.per_device_train_batch_size * training.gradient_accumulation_steps,
        "learning_rate_multiplier": round(training.learning_rate / BASE_LEARNING_RATE, 6),
    }


def _auto_batch(rows: int) -> int:
    """About 0.2 % of the rows, between 8 and 64."""
    return max(8, min(64, 2 ** round(rows * 0.002).bit_length() // 2))


def _auto_epochs(rows: int) -> int:
    """Three times; many rows need fewer."""
    return 3 if rows < 5000 else 2
