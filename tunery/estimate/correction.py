"""What measured peaks make of an estimate: a bounded factor, a margin, and never less than was seen.

Each finished run gives a ratio, its peak over its bare estimate, kept within 0.5 and 2. The newest 50 count. Their
worst fifth on average (at least one run) is the tail: it moves a little with each run, where a percentile would jump.
The tail is shrunk towards 1 as if three further runs had met their estimate exactly. Runs of other base models may
warn but not reassure: their factor is at least 1.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

LEAST, MOST = 0.5, 2.0
"""Bounds of a ratio, and so of the factor."""
PRIOR_RUNS = 3
TAIL_SHARE = 0.2
FLOOR_MARGIN_BYTES = 512 << 20
SURE_MARGIN, UNSURE_MARGIN = 0.03, 0.15
"""Of what is expected: with many runs of this base model, and with none."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What runs have shown. `largest_bytes` is the largest peak of runs with the very same estimate, 0 if none."""

    samples: int = 0
    tail: float = 1.0
    largest_bytes: int = 0
    elsewhere: int = 0
    elsewhere_tail: float = 1.0
    """The same method on any base model."""


def tail_mean(ratios: Sequence[float]) -> float:
    """Mean of the worst fifth of the ratios, at least one; 1.0 of none. Postgres computes the same."""
    if not ratios:
        return 1.0
    mass = max(1.0, TAIL_SHARE * len(ratios))
    worst = sorted((min(max(ratio, LEAST), MOST) for ratio in ratios), reverse=True)
    return sum(ratio * min(1.0, max(0.0, mass - place)) for place, ratio in enumerate(worst)) / mass


def factor(seen: Seen) -> float:
    """What to multiply an estimate with: between 0.5 and 2."""
    if seen.samples:
        return _shrunk(seen.tail, seen.samples)
    return max(1.0, _shrunk(seen.elsewhere_tail, seen.elsewhere))


def reservation(estimate: int, seen: Seen) -> int:
    """Bytes to reserve: the corrected estimate or the largest peak of its like, and a margin over either."""
    share = SURE_MARGIN + (UNSURE_MARGIN - SURE_MARGIN) * PRIOR_RUNS / (PRIOR_RUNS + seen.samples)
    expected = estimate * factor(seen)
    return max(
        _with_margin(expected, share), _with_margin(seen.largest_bytes, SURE_MARGIN) if seen.largest_bytes else 0
    )


def after_out_of_memory(reserved: int, peak: int) -> int:
    """What to reserve for the second try, in bytes. `peak` is 0 where nobody measured it."""
    return max(math.ceil(1.5 * reserved), math.ceil(1.15 * peak))


def _shrunk(tail: float, samples: int) -> float:
    return (PRIOR_RUNS + samples * min(max(tail, LEAST), MOST)) / (PRIOR_RUNS + samples)


def _with_margin(expected: float, share: float) -> int:
    return math.ceil(expected + max(share * expected, FLOOR_MARGIN_BYTES))
