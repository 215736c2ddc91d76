"""From what a user asked to a complete recipe: every `auto` becomes a number, once the rows are known."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from tunery.contracts.spec import EvaluationArgs, LoraSpec, Recipe, TrainingArgs

BASE_LEARNING_RATE = 2e-4
"""LoRA's usual rate (QLoRA, arXiv:2305.14314, section 4); OpenAI's `learning_rate_multiplier` scales it."""
MAX_MICRO_BATCH = 4

Auto = Literal["auto"]


class Resources(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    gpus: Literal[1] = 1
    """One for now: the trainer that spans devices is not built yet."""


class Extension(BaseModel):
    """The `tunery` object of a job request. Keys that are absent are resolved; unknown ones are refused by name."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    adapter: LoraSpec | None = None
    training: TrainingArgs | None = None
    evaluation: EvaluationArgs | None = None
    resources: Resources = Resources()


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
