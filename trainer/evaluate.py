"""What the model knows and says on held-out rows: loss, token accuracy, exact match, sample answers."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from trainer.data import Example, Question
from trainer.scoring import collate, score

ANSWERS_AT_ONCE = 16

Check = Callable[[], None]
"""Raises `trainer.session.Stopping` when the work should be left; called between batches."""


@dataclass(frozen=True)
class HeldOut:
    """The validation rows: for the loss, and those that can be answered."""

    examples: list[Example]
    questions: list[Question]


@dataclass(frozen=True)
class Judge:
    """How to evaluate: the tokenizer, the largest batch that fits, the precision, and when to let go."""

    tokenizer: Any
    batch_size: int
    max_length: int
    precision: str
    check: Check

    def loss(self, model: Any, examples: list[Example]) -> dict[str, float]:
        """`eval/loss`: mean over all loss tokens, so long rows count for more. `eval/mean_token_accuracy` likewise."""
        nll = correct = tokens = 0.0
        with _inference(model), self._autocast(model):
            for batch in _batches(_by_length(examples), self.batch_size):
                self.check()
                inputs = collate(batch, self.tokenizer.pad_token_id)
                result = score(model, {name: tensor.to(model.device) for name, tensor in inputs.items()})
                nll += result.nll_sum.item()
                correct += result.correct.item()
                tokens += result.tokens.item()
        return {"eval/loss": nll / max(tokens, 1), "eval/mean_token_accuracy": correct / max(tokens, 1)}

    def answers(self, model: Any, questions: list[Question], config: GenerationConfig) -> dict[int, str]:
        """Answer each question greedily; returns texts by the question's index."""
        texts: dict[int, str] = {}
        ordered = sorted(questions, key=lambda question: len(question.prompt_ids))
        with _inference(model), self._autocast(model):
            for batch in _batches(ordered, ANSWERS_AT_ONCE):
                self.check()
                texts |= self._answer(model, batch, config)
        self.check()  # the last batch may have been cut short
        return texts

    def _answer(self, model: Any, batch: list[Question], config: GenerationConfig) -> dict[int, str]:
        prompts = [question.prompt_ids[-self.max_length :] for question in batch]
        longest = max(map(len, prompts))
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts], device=model.device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.device)
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=config,
            stopping_criteria=StoppingCriteriaList([_LetGo(self.check)]),
        )
        texts = self.tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)
        return {question.index: text.strip() for question, text in zip(batch, texts, strict=True)}

    def _autocast(self, model: Any) -> AbstractContextManager[Any]:
        return torch.autocast(model.device.type, dtype=torch.bfloat16) if self.precision == "bf16" else nullcontext()


def exact_match(questions: list[Question], answers: dict[int, str]) -> float:
    """The share of questions, 0 to 1, whose answer equals the expected text, white space at the ends aside."""
    hits = sum(answers[question.index].strip() == question.expected.strip() for question in questions)
    return hits / len(questions) if questions else 0.0


class _LetGo(StoppingCriteria):
    """Ends a generation between two tokens when the work should be left."""

    def __init__(self, check: Check) -> None:
        self._check = check

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        self._check()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


class _inference:  # noqa: N801 - reads as the context manager it is
    """Evaluation mode without gradients; puts the mode back."""

    def __init__(self, model: Any) -> None:
        self._model, self._training = model, model.training
        self._grad = torch.no_grad()

    def __enter__(self) -> None:
        self._model.eval()
        self._grad.__enter__()

    def __exit__(self, *details: Any) -> None:
        self._grad.__exit__(*details)
        self._model.train(self._training)


def _by_length(examples: list[Example]) -> list[Example]:
    return sorted(examples, key=lambda example: len(example.input_ids))


def _batches(items: list[Any], size: int) -> list[list[Any]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
