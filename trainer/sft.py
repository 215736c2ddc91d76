"""The one place that knows TRL: an SFTTrainer over rows, masks, loss, order and checkpoints of our own."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch.utils.data import Sampler
from transformers import TrainerCallback
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from trainer import checkpoints
from trainer.callbacks import Loop
from trainer.data import Example
from trainer.failures import TrainingFailed
from trainer.scoring import collate, score
from tunery.contracts.spec import TrainingSpec
from tunery.states import FailureCode


class SupervisedTrainer(SFTTrainer):
    """SFTTrainer's loop. `tokens` counts all non-padding tokens processed since the job began."""

    # Our loss is the sum over a micro-batch divided by the loss tokens of the whole optimiser batch, so the loop
    # must not divide again: 1 x 8 and 8 x 1 are then the same step.
    loss_is_scaled_for_ga = True

    def __init__(self, *, loop: Loop, **kwargs: Any) -> None:
        self.loop = loop
        super().__init__(**kwargs)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The micro-batch's share of the optimiser batch's mean loss."""
        assert num_items_in_batch is not None, "the loop must count the loss tokens of the optimiser batch"
        result = score(model, inputs)
        self.loop.count(inputs["attention_mask"].sum(), result)
        return result.nll_sum / num_items_in_batch

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Stop at the first loss that is not a number, before it reaches the weights."""
        loss = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):
            step = self.state.global_step + 1
            raise TrainingFailed(FailureCode.NON_FINITE_LOSS, f"The loss of step {step} is {loss.item()}.")
        return loss

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return EpochOrder(self.loop.rows, self.args.seed, self._epoch_now)

    def _epoch_now(self) -> int:
        return self.state.global_step // steps_per_epoch(self.loop.rows, self.args)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.loop.save(self)

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        return self.loop.evaluate(self.model, self.control)

    def _determine_best_metric(self, metrics: Any, trial: Any) -> bool:
        return False

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        checkpoints.load_adapter(Path(resume_from_checkpoint), self.model)  # pyright: ignore[reportArgumentType]

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            checkpoints.load_optimizer(Path(checkpoint), self)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            checkpoints.load_generators(Path(checkpoint))


class EpochOrder(Sampler[int]):
    """A permutation of the rows that seed and epoch alone decide, so that a resumed run sees the same order."""

    def __init__(self, rows: int, seed: int, epoch: Any) -> None:
        self._rows, self._seed, self._epoch = rows, seed, epoch

    def __len__(self) -> int:
        return self._rows

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator()
        generator.manual_seed((self._seed << 20) + self._epoch())
        yield from torch.randperm(self._rows, generator=generator).tolist()


def build(
    spec: TrainingSpec,
    model: PeftModel,
    tokenizer: Any,
    train: list[Example],
    loop: Loop,
    *,
    precision: str,
    recompute: bool,
) -> SupervisedTrainer:
    """An SFTTrainer that will run `spec.recipe.training` and nothing that we did not ask for."""
    training = spec.recipe.training
    arguments = SFTConfig(
        output_dir=spec.checkpoints,
        num_train_epochs=training.num_train_epochs,
        max_steps=training.max_steps if training.max_steps > 0 else -1,
        per_device_train_batch_size=training.per_device_train_batch_size,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.lr_scheduler_type,
        warmup_steps=training.warmup_steps,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        max_length=training.max_length,
        seed=training.seed,
        data_seed=training.seed,
        optim=training.optim,
        logging_steps=training.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_strategy="no",  # callbacks.py asks for checkpoints and evaluations
        eval_strategy="no",
        bf16=precision == "bf16",
        fp16=False,
        use_cpu=model.device.type == "cpu",
        gradient_checkpointing=recompute,
        gradient_checkpointing_kwargs={"use_reentrant": False} if recompute else None,
        dataloader_pin_memory=model.device.type == "cuda",
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        packing=False,
        report_to="none",
        disable_tqdm=True,
        push_to_hub=False,
    )
    rows = Dataset.from_dict({"input_ids": [e.input_ids for e in train], "labels": [e.labels for e in train]})
    pad = tokenizer.pad_token_id
    return SupervisedTrainer(
        loop=loop,
        model=model,
        args=arguments,
        train_dataset=rows,
        processing_class=tokenizer,
        data_collator=lambda batch: collate([Example(row["input_ids"], row["labels"]) for row in batch], pad),
        callbacks=[_typed(loop)],
    )


def steps_per_epoch(rows: int, arguments: Any) -> int:
    """Optimiser steps in one pass; a last, smaller batch counts as one."""
    batches = -(-rows // arguments.per_device_train_batch_size)
    return max(-(-batches // arguments.gradient_accumulation_steps), 1)


def total_steps(rows: int, arguments: Any) -> int:
    """Optimiser steps of the whole job."""
    if arguments.max_steps > 0:
        return arguments.max_steps
    return -int(-arguments.num_train_epochs * steps_per_epoch(rows, arguments) // 1)


def _typed(loop: Loop) -> TrainerCallback:
    return loop
