"""What happens between two optimiser steps: metrics, evaluations, checkpoints, and stopping when asked."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState

from trainer import checkpoints
from trainer.checkpoints import Progress
from trainer.failures import TrainingFailed
from trainer.scoring import Score
from trainer.session import Session, Stopping
from tunery.contracts.events import Checkpoint, Eval, Metrics
from tunery.contracts.spec import TrainingSpec
from tunery.states import FailureCode

UNSTORED_AT_MOST = 2


class Loop(TrainerCallback):
    """Stands between the training loop and the supervisor.

    `evaluation` scores the held-out rows, or is None where there are none. `progress` is what earlier attempts did.
    """

    def __init__(
        self,
        spec: TrainingSpec,
        session: Session,
        progress: Progress,
        rows: int,
        total_steps: int,
        evaluation: Callable[[Any], dict[str, float]] | None,
    ) -> None:
        self.rows = rows
        self.before = progress.before
        self.last_loss: float | None = None
        self._spec, self._session, self._evaluation = spec, session, evaluation
        self._total_steps = total_steps
        self._saved_step = progress.step
        self._saved_at = time.monotonic()
        self._evaluated: tuple[int, dict[str, float]] = (-1, {})
        self._tokens_before = progress.tokens
        self._tokens = torch.zeros((), dtype=torch.long)
        self._since_log = _SinceLog()

    @property
    def tokens(self) -> int:
        """Non-padding tokens processed since the job's first attempt began."""
        return self._tokens_before + int(self._tokens.item())

    def count(self, tokens: torch.Tensor, result: Score) -> None:
        """Add one micro-batch; stays on the device, so that counting costs no synchronisation."""
        self._tokens = self._tokens.to(tokens.device) + tokens
        self._since_log.add(tokens, result)

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The clock of `train/tokens_per_second` runs in steps only, not in evaluations and checkpoints."""
        self._since_log.start()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Decide what follows this step. Never assigns False: another callback may have asked too."""
        self._since_log.pause()
        self._session.step = state.global_step
        training = self._spec.recipe.training
        stop = self._session.stop
        if stop is not None:
            if not stop.checkpoint:
                raise Stopping(stop.reason)
            control.should_save = control.should_training_stop = True
            return
        last = state.global_step >= self._total_steps
        if self._evaluation and training.eval_steps and state.global_step % training.eval_steps == 0 and not last:
            control.should_evaluate = True
        due = training.save_steps and state.global_step % training.save_steps == 0
        if due or time.monotonic() - self._saved_at >= training.save_interval_s:
            control.should_save = True

    def on_log(
        self,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Send a step's numbers under Hugging Face's names."""
        state.log_history.clear()  # ours are in the events; theirs would grow in memory and in every checkpoint
        if not logs or "loss" not in logs:  # the summary at the end of the loop, which knows nothing new
            return
        if not torch.isfinite(torch.tensor([logs["loss"], logs.get("grad_norm", 0.0)])).all():
            raise TrainingFailed(
                FailureCode.NON_FINITE_LOSS,
                f"Step {state.global_step}: loss {logs['loss']}, gradient norm {logs.get('grad_norm')}.",
            )
        self.last_loss = logs["loss"]
        values = {f"train/{name}": logs[name] for name in ("loss", "learning_rate", "grad_norm") if name in logs}
        values["train/epoch"] = state.epoch or 0.0
        values |= self._since_log.take()
        if torch.cuda.is_available():
            values["system/gpu_memory_bytes"] = float(torch.cuda.memory_reserved())
        self._session.send(Metrics(values=values, tokens=self.tokens, total_steps=self._total_steps))

    def evaluate(self, model: Any, control: TrainerControl) -> dict[str, float]:
        """Score the held-out rows between two steps. A stop in between leaves the scores out, not the checkpoint."""
        assert self._evaluation is not None
        self._session.phase("evaluating")
        try:
            values = self._evaluation(model)
        except Stopping:
            if self._session.stop is None or not self._session.stop.checkpoint:
                raise
            control.should_save = control.should_training_stop = True
            return {}
        self._evaluated = (self._session.step, values)
        self._session.send(Eval(when="during", values=values))
        self._session.phase("training")
        return values

    def save(self, trainer: Any) -> None:
        """Write and announce a checkpoint, unless this step has one or two are still waiting to be stored."""
        step = self._session.step
        if step == self._saved_step:
            return
        stopping = self._session.stop is not None
        if self._session.unstored() >= UNSTORED_AT_MOST and not stopping:
            message = f"No checkpoint at step {step}: {UNSTORED_AT_MOST} earlier ones are still being stored."
            self._session.warn("checkpoint_skipped", message)
            self._saved_at = time.monotonic()  # try again in one interval, not at every step
            return
        self._session.phase("saving")
        folder = Path(self._spec.checkpoints) / f"step-{step}"
        files = checkpoints.save(folder, self._spec, trainer, Progress(step, self.tokens, self.before))
        self._saved_step, self._saved_at = step, time.monotonic()
        self._session.announced(step)
        self._session.send(Checkpoint(path=str(folder), files=files, metrics=self._checkpoint_metrics(step)))
        self._session.phase("training")

    def _checkpoint_metrics(self, step: int) -> dict[str, float]:
        """OpenAI's names, as far as they are known at this step."""
        metrics: dict[str, float] = {"step": step}
        if self.last_loss is not None:
            metrics["train_loss"] = self.last_loss
        if self._since_log.last_accuracy is not None:
            metrics["train_mean_token_accuracy"] = self._since_log.last_accuracy
        evaluated_step, values = self._evaluated
        if evaluated_step == step:
            metrics["valid_loss"] = values["eval/loss"]
            metrics["valid_mean_token_accuracy"] = values["eval/mean_token_accuracy"]
        return metrics


class _SinceLog:
    """Sums since the last `metrics` event."""

    def __init__(self) -> None:
        self.last_accuracy: float | None = None
        self._seconds = 0.0
        self._started: float | None = None
        self._clear()

    def add(self, tokens: torch.Tensor, result: Score) -> None:
        self._tokens = self._tokens.to(tokens.device) + tokens
        self._correct = self._correct.to(tokens.device) + result.correct
        self._loss_tokens = self._loss_tokens.to(tokens.device) + result.tokens

    def start(self) -> None:
        self._started = time.monotonic()

    def pause(self) -> None:
        if self._started is not None:
            self._seconds += time.monotonic() - self._started
            self._started = None

    def take(self) -> dict[str, float]:
        """Non-padding tokens a second of step time, and token accuracy over the loss tokens; then start again."""
        self.last_accuracy = float(self._correct.item() / max(self._loss_tokens.item(), 1))
        rate = float(self._tokens.item() / self._seconds) if self._seconds else 0.0
        self._seconds = 0.0
        self._clear()
        return {"train/mean_token_accuracy": self.last_accuracy, "train/tokens_per_second": rate}

    def _clear(self) -> None:
        self._tokens = self._correct = self._loss_tokens = torch.zeros((), dtype=torch.long)
