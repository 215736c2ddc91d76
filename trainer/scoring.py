"""One batch to the negative log-likelihood of its loss tokens: the same numbers for training and for evaluation."""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from trainer.data import IGNORED, Example


@dataclass(frozen=True)
class Score:
    """Sums over a batch's loss tokens; `nll_sum` carries the gradient."""

    nll_sum: torch.Tensor
    correct: torch.Tensor
    tokens: torch.Tensor


def score(model: Any, inputs: dict[str, torch.Tensor]) -> Score:
    """Score a batch of `input_ids`, `attention_mask` and `labels`, projecting only loss tokens through the head.

    `model` carries the fused head that SFTTrainer adds. Its Triton kernel serves CUDA; elsewhere it would project
    every position (28 % of a 135M model's work, most of it for nothing), so there the loss tokens are taken out first.
    """
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    if inputs["input_ids"].is_cuda or _scales_logits(causal.config.get_text_config()):
        outputs = model(**inputs, use_cache=False, fused_lm_head=True)
        return Score(-outputs.log_probs.sum(), outputs.is_top1.sum(), outputs.label_mask.sum())
    hidden = causal.base_model(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False
    ).last_hidden_state[:, :-1]
    labels = inputs["labels"][:, 1:]
    mask = labels != IGNORED
    logits = causal.get_output_embeddings()(hidden[mask]).float()
    targets = labels[mask]
    nll_sum = cross_entropy(logits, targets, reduction="sum")
    return Score(nll_sum, (logits.detach().argmax(-1) == targets).sum(), mask.sum())


def _scales_logits(config: Any) -> bool:
    """Whether something stands between the head's product and the logits; the fused head knows each kind."""
    names = ("final_logit_softcapping", "logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")
    return any(getattr(config, name, None) not in (None, 1, 1.0) for name in names)


def collate(examples: list[Example], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Pad examples on the right to the longest of them."""
    longest = max(len(example.input_ids) for example in examples)

    def padded(rows: list[list[int]], value: int) -> torch.Tensor:
        return torch.tensor([row + [value] * (longest - len(row)) for row in rows])

    return {
        "input_ids": padded([example.input_ids for example in examples], pad_token_id),
        "attention_mask": padded([[1] * len(example.input_ids) for example in examples], 0),
        "labels": padded([example.labels for example in examples], IGNORED),
    }
