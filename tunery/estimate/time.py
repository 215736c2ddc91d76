"""How long training takes, in closed form: FLOPs over what such a device delivers. Seconds; a guess with its spread.

A token costs 4 FLOPs a linear parameter (LoRA: no gradients of frozen weights) or 6 (full), the head included and the
embedding not; attention is left out. The share of the peak that trainers reach was measured between 5 % (short rows,
padded) and 30 %; small models wait for kernel launches instead, so each step has a least time.
"""

import math
from dataclasses import dataclass
from typing import Any

from tunery.estimate.memory import Kind, Method

PEAK_FLOPS = {
    "b200": 2250e12,
    "h200": 989e12,
    "h100": 989e12,
    "l40s": 362e12,
    "a100": 312e12,
    "rtx4090": 165e12,
    "a10": 125e12,
    "v100": 125e12,
    "l4": 121e12,
    "t4": 65e12,
}
"""Dense bf16 or fp16, by the makers' data sheets; by how a class begins."""
OTHER_GPU_FLOPS = 100e12
TYPICAL_SHARE, POOR_SHARE = 0.15, 0.04
CPU_FLOPS, POOR_CPU_FLOPS = 1e11, 2.5e10
"""A few cores; 135 M parameters were measured at 1.3e11."""
STEP_S, POOR_STEP_S = 0.1, 0.3
LOAD_S, POOR_LOAD_S = 20.0, 60.0
READ_BYTES_S, POOR_READ_BYTES_S = 2e9, 3e8


@dataclass(frozen=True, slots=True)
class Seconds:
    """A median and a bound that nine of ten runs keep."""

    p50: float
    p90: float

    def __add__(self, other: "Seconds") -> "Seconds":
        """Both late together: what one run waits for, it waits for in full."""
        return Seconds(self.p50 + other.p50, self.p90 + other.p90)

    def times(self, share: float) -> "Seconds":
        return Seconds(self.p50 * share, self.p90 * share)


def token_flops(card: dict[str, Any], method: Method, trained: int = 0) -> float:
    """FLOPs of one trained token, forward and backward."""
    embedding = card["hidden_size"] * card["vocab_size"]
    # where head and embedding are one matrix, it is multiplied once all the same
    linear = card["parameters"] - (0 if card.get("tie_word_embeddings") else embedding)
    return 6.0 * linear if method is Method.FULL else 4.0 * max(linear, 0) + 6.0 * trained


def training(flops: float, steps: int, gpu_class: str, kind: Kind, gpus: int = 1) -> Seconds:
    """Of so many FLOPs in so many steps, shared evenly by `gpus` devices."""
    if kind == "cpu":
        return Seconds(flops / CPU_FLOPS, flops / POOR_CPU_FLOPS)
    peak = gpus * next((peak for name, peak in PEAK_FLOPS.items() if gpu_class.startswith(name)), OTHER_GPU_FLOPS)
    return Seconds(
        max(flops / (peak * TYPICAL_SHARE), steps * STEP_S), max(flops / (peak * POOR_SHARE), steps * POOR_STEP_S)
    )


def loading(base_bytes: int) -> Seconds:
    """Starting a trainer and reading the base model, from a warm disk or from the object store."""
    return Seconds(LOAD_S + base_bytes / READ_BYTES_S, POOR_LOAD_S + base_bytes / POOR_READ_BYTES_S)


def measured(p50: float, p90: float, samples: int) -> Seconds:
    """What past runs say of the next one: few of them say little about the worst."""
    return Seconds(p50, max(p90, p50 * (1 + 1 / math.sqrt(samples))))
