"""One attempt from its spec to its outcome, in the order of the phases that it announces."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel

from trainer import checkpoints, export, model, sft
from trainer.callbacks import Loop
from trainer.checkpoints import Progress
from trainer.data import Prepared, prepare, question, read_rows
from trainer.evaluate import HeldOut, Judge, exact_match
from trainer.failures import peak_memory_bytes
from trainer.session import Session, Stopping
from tunery.contracts.events import Eval, Finished, Sample, Started, Stopped
from tunery.contracts.spec import TrainingSpec
from tunery.states import FailureCode


@dataclass
class Attempt:
    """What the phases hand to each other."""

    spec: TrainingSpec
    session: Session
    device: torch.device
    precision: str
    tokenizer: Any
    network: PeftModel
    train: Prepared
    held_out: HeldOut | None
    progress: Progress
    total_steps: int
    judge: Judge
    after: dict[str, float] = field(default_factory=dict)


def run(spec: TrainingSpec, session: Session) -> Finished | Stopped:
    """Train, evaluate, export; the outcome comes back unsent.

    Raises:
        TrainingFailed: for a failure whose cause is known.
    """
    transformers.utils.logging.set_verbosity_warning()
    tokens = 0
    try:
        attempt = _load(spec, session)
        trainer, loop = _trainer(attempt)
        tokens = attempt.progress.tokens
        _before(attempt, loop)
        _train(attempt, trainer)
        tokens = loop.tokens
        session.check()
        _after(attempt, trainer, loop)
        return _finish(attempt, loop)
    except Stopping:
        assert session.stop is not None
        return Stopped(reason=session.stop.reason, tokens=tokens)


def _load(spec: TrainingSpec, session: Session) -> Attempt:
    session.phase("loading")
    training = spec.recipe.training
    progress = checkpoints.verify(Path(spec.resume), spec) if spec.resume else Progress(0, 0, {})
    session.step = progress.step
    device = model.pick_device()
    precision = model.pick_precision(training.precision, device)
    tokenizer = model.load_tokenizer(spec.base.path)
    session.check()
    code = FailureCode.INVALID_TRAINING_FILE
    train = prepare(read_rows(spec.data.train, code), tokenizer, training.max_length, code)
    _warn_of_cuts(session, train, "training", training.max_length)
    held_out = _held_out(spec, session, tokenizer)
    session.check()
    base = model.load_base(spec.base.path, device, precision)
    base.generation_config = model.generation_config(base, tokenizer, spec.recipe.evaluation.max_new_tokens)
    network = model.add_adapter(base, spec)
    session.check()
    return Attempt(
        spec=spec,
        session=session,
        device=device,
        precision=precision,
        tokenizer=tokenizer,
        network=network,
        train=train,
        held_out=held_out,
        progress=progress,
        total_steps=sft.total_steps(len(train.examples), training),
        judge=Judge(tokenizer, training.per_device_train_batch_size, training.max_length, precision, session.check),
    )


def _held_out(spec: TrainingSpec, session: Session, tokenizer: Any) -> HeldOut | None:
    if spec.data.validation is None:
        return None
    code, training = FailureCode.INVALID_VALIDATION_FILE, spec.recipe.training
    rows = read_rows(spec.data.validation, code)
    prepared = prepare(rows, tokenizer, training.max_length, code)
    _warn_of_cuts(session, prepared, "validation", training.max_length)
    questions = [question(row, tokenizer, index) for index, row in enumerate(rows)]
    return HeldOut(prepared.examples, [one for one in questions if one is not None])


def _warn_of_cuts(session: Session, prepared: Prepared, which: str, max_length: int) -> None:
    if prepared.truncated:
        session.warn("rows_truncated", f"{prepared.truncated} {which} rows were cut to {max_length} tokens.")
    if prepared.dropped:
        message = (
            f"{prepared.dropped} {which} rows were left out: nothing in them is trained within {max_length} tokens."
        )
        session.warn("rows_dropped", message)


def _trainer(attempt: Attempt) -> tuple[sft.SupervisedTrainer, Loop]:
    spec, session, training = attempt.spec, attempt.session, attempt.spec.recipe.training
    held_out = attempt.held_out
    evaluation = (lambda network: attempt.judge.loss(network, held_out.examples)) if held_out else None
    loop = Loop(spec, session, attempt.progress, len(attempt.train.examples), attempt.total_steps, evaluation)
    recompute = model.needs_checkpointing(
        attempt.network.config, _largest_micro_batch(attempt), attempt.precision, attempt.device
    )
    if recompute:
        session.warn("activations_recomputed", "The GPU cannot hold all activations; steps take a third longer.")
    trainer = sft.build(
        spec, attempt.network, attempt.tokenizer, attempt.train.examples, loop,
        precision=attempt.precision, recompute=recompute,
    )  # fmt: skip
    trainable, total = model.count_parameters(attempt.network)
    session.send(
        Started(
            device=model.device_name(attempt.device),
            precision=attempt.precision,
            trainable_parameters=trainable,
            total_parameters=total,
            total_steps=attempt.total_steps,
            start_step=attempt.progress.step,
            train_rows=len(attempt.train.examples),
            eval_rows=len(held_out.examples) if held_out else 0,
            truncated_rows=attempt.train.truncated,
            versions=export.versions(),
        )
    )
    assert training.max_steps <= 0 or attempt.total_steps == training.max_steps
    session.check()
    return trainer, loop


def _largest_micro_batch(attempt: Attempt) -> int:
    """Tokens, padding included, of the longest rows together."""
    longest = max(len(example.input_ids) for example in attempt.train.examples)
    return longest * attempt.spec.recipe.training.per_device_train_batch_size


def _before(attempt: Attempt, loop: Loop) -> None:
    """Score the base model, once in a job's life: a resumed attempt knows the scores from its checkpoint."""
    if attempt.held_out is None or attempt.progress.step:
        return
    with attempt.network.disable_adapter():
        loop.before = _examine(attempt, "base")
    attempt.session.send(Eval(when="before", values=loop.before))


def _train(attempt: Attempt, trainer: sft.SupervisedTrainer) -> None:
    resume = attempt.spec.resume
    if attempt.progress.step >= attempt.total_steps:
        assert resume is not None  # only the evaluation and the export are left
        checkpoints.load_adapter(Path(resume), attempt.network)
        return
    attempt.session.phase("training")
    trainer.train(resume_from_checkpoint=resume)


def _after(attempt: Attempt, trainer: sft.SupervisedTrainer, loop: Loop) -> None:
    """Score the tuned model. A stop in between keeps the training: its last step becomes a checkpoint."""
    if attempt.held_out is None:
        return
    try:
        attempt.after = _examine(attempt, "tuned")
    except Stopping:
        stop = attempt.session.stop
        if stop is not None and stop.checkpoint and trainer.optimizer is not None:
            loop.save(trainer)
        raise
    attempt.session.send(Eval(when="after", values=attempt.after))


def _examine(attempt: Attempt, who: str) -> dict[str, float]:
    """Loss over all held-out rows; answers to all of them for exact match, or else only to the samples."""
    session, wanted, held_out = attempt.session, attempt.spec.recipe.evaluation, attempt.held_out
    assert held_out is not None
    session.phase("evaluating")
    values = attempt.judge.loss(attempt.network, held_out.examples)
    asked = held_out.questions if wanted.exact_match else held_out.questions[: wanted.samples]
    if not asked:
        return values
    session.phase("sampling")
    config = attempt.network.get_base_model().generation_config
    answers = attempt.judge.answers(attempt.network, asked, config)  # pyright: ignore[reportArgumentType]
    if wanted.exact_match:
        values["eval/exact_match"] = exact_match(asked, answers)
    for one in asked[: wanted.samples]:
        session.send(
            Sample(
                model="base" if who == "base" else "tuned",
                index=one.index,
                prompt=one.prompt,
                expected=one.expected,
                output=answers[one.index],
            )
        )
    return values


def _finish(attempt: Attempt, loop: Loop) -> Finished:
    session, spec = attempt.session, attempt.spec
    session.phase("saving")
    facts = {
        "device": model.device_name(attempt.device),
        "precision": attempt.precision,
        "steps": session.step,
        "tokens": loop.tokens,
        "train_rows": len(attempt.train.examples),
        "truncated_rows": attempt.train.truncated,
        "train_loss": loop.last_loss,
        "before": loop.before,
        "after": attempt.after,
        "base_files": model.base_facts(spec.base.path),
    }
    files = export.export(spec, attempt.network, attempt.tokenizer, facts)
    metrics = dict(attempt.after) | {f"{name}_before": value for name, value in loop.before.items()}
    if loop.last_loss is not None:
        metrics["train/loss"] = loop.last_loss
    return Finished(
        path=spec.output, files=files, tokens=loop.tokens, metrics=metrics, peak_memory_bytes=peak_memory_bytes()
    )
