"""`spec.json`: everything a trainer needs to know about one attempt.

A `Recipe` is what a user asked for with every `auto` resolved; the job stores it. A `TrainingSpec` is that
recipe together with one attempt's files. Field names are Hugging Face's (`TrainingArguments`, `LoraConfig`).
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

SPEC_VERSION = 1


class Frozen(BaseModel):
    """Immutable, and a field that nobody reads is an error rather than a silent default."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class LoraSpec(Frozen):
    """A LoRA adapter (Hu et al. 2021, arXiv:2106.09685). `modules_to_save` trains whole modules beside it."""

    type: Literal["lora"] = "lora"
    r: Annotated[int, Field(ge=1, le=1024)] = 16
    lora_alpha: Annotated[float, Field(gt=0)] = 32
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    bias: Literal["none", "all", "lora_only"] = "none"
    use_rslora: bool = False
    use_dora: bool = False
    modules_to_save: tuple[str, ...] | None = None


class TrainingArgs(Frozen):
    """Optimisation settings. `warmup_steps` below 1 is a share of all steps; lengths are in tokens."""

    num_train_epochs: Annotated[float, Field(gt=0, le=100)] = 3
    max_steps: Annotated[int, Field(ge=-1)] = -1
    per_device_train_batch_size: Annotated[int, Field(ge=1, le=256)] = 4
    gradient_accumulation_steps: Annotated[int, Field(ge=1, le=1024)] = 2
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 2e-4
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt"] = (
        "cosine"
    )
    warmup_steps: Annotated[float, Field(ge=0)] = 0.05
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    max_length: Annotated[int, Field(ge=16, le=1_048_576)] = 2048
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 42
    logging_steps: Annotated[int, Field(ge=1)] = 1
    eval_steps: Annotated[int, Field(ge=0)] = 0
    """Evaluate every so many steps; 0 means only before and after training."""
    save_steps: Annotated[int, Field(ge=0)] = 0
    """Checkpoint every so many steps; 0 leaves it to `save_interval_s`."""
    save_interval_s: Annotated[float, Field(gt=0)] = 600
    """At least one checkpoint in so many seconds, whatever `save_steps` says."""
    optim: Literal["adamw_torch"] = "adamw_torch"
    precision: Literal["auto", "bf16", "fp32"] = "auto"


class EvaluationArgs(Frozen):
    """What is measured on the held-out rows before and after training, besides their loss."""

    samples: Annotated[int, Field(ge=0, le=20)] = 3
    """So many held-out prompts are answered greedily by the base and by the tuned model."""
    exact_match: bool = False
    """Answer every held-out prompt greedily and count the answers that equal the expected text."""
    max_new_tokens: Annotated[int, Field(ge=1, le=2048)] = 64


class Recipe(Frozen):
    """A resolved request: what to train and how. Stored with the job and shown to its owner."""

    method: Literal["supervised"] = "supervised"
    adapter: LoraSpec = LoraSpec()
    training: TrainingArgs = TrainingArgs()
    evaluation: EvaluationArgs = EvaluationArgs()


class BaseModelRef(Frozen):
    """The base model on this node's disk. `hub_id` is what the adapter's config will name."""

    name: str
    hub_id: str
    revision: str
    source: str
    license: str
    parameters: int
    path: str


class DataRef(Frozen):
    """Normalised rows (`tunery.datasets`): one JSON object a line, already checked."""

    train: str
    validation: str | None = None
    train_sha256: str
    validation_sha256: str | None = None


class Lineage(Frozen):
    """Where an adapter came from; written into `tunery.json` beside it."""

    project_id: str
    job_id: str
    attempt_id: str
    attempt_no: int
    model_name: str
    training_file: str
    validation_file: str | None = None
    tunery_version: str
    lock_sha256: str | None = None
    image: str | None = None


class TrainingSpec(Frozen):
    """One attempt's whole instruction. Paths are absolute; `socket` is where events go and commands come from."""

    version: Literal[1] = 1
    socket: str
    base: BaseModelRef
    data: DataRef
    recipe: Recipe
    lineage: Lineage
    resume: str | None = None
    """Directory of a verified checkpoint to continue from."""
    checkpoints: str
    output: str


class _AnyVersion(BaseModel):
    version: int


class OtherVersion(ValueError):
    """The spec was written by another release: whoever wrote it and whoever reads it do not belong together."""


def read_spec(path: Path) -> TrainingSpec:
    """The spec that a supervisor wrote.

    Raises:
        OtherVersion: it is of another version than this code's.
        pydantic.ValidationError, OSError: it is no spec, or cannot be read.
    """
    written = path.read_bytes()
    if (found := _AnyVersion.model_validate_json(written).version) != SPEC_VERSION:
        raise OtherVersion(
            f"the spec has version {found}, this trainer reads version {SPEC_VERSION}: node and trainer are of "
            "different releases; restart the node (docs/upgrade.md)"
        )
    return TrainingSpec.model_validate_json(written)
