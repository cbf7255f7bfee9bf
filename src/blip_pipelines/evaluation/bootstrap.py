"""Is B better than A on the same samples? The paired bootstrap of the difference (Efron; design section 8).

Samples are drawn with replacement and both systems are read on the same draw, so what is hard for both cancels.
Per-sample scores are taken as they are: CIDEr keeps the idf of the whole subset.
"""

from dataclasses import dataclass

import numpy as np

DRAW_ELEMENTS = 4_000_000  # indices drawn at once: bounds memory, not the result


@dataclass(frozen=True)
class Difference:
    """Mean of (new - old) over samples and its percentile interval; `is_better` when the interval lies above 0."""

    mean: float
    low: float
    high: float

    @property
    def is_better(self) -> bool:
        return self.low > 0


def bootstrap_difference(
    new_S: np.ndarray, old_S: np.ndarray, draws: int = 10_000, level: float = 0.95, seed: int = 0
) -> Difference:
    """The mean difference of two score lists over the same samples with its bootstrap interval.

    Args:
        new_S, old_S: float (S,), scores of the same samples in the same order.
        draws: bootstrap samples.
        level: share of the bootstrap distribution inside the interval.
        seed: of the draws; the same seed gives the same interval.

    Raises:
        ValueError: the lists are empty, differ in length, or hold a value that is not finite.
    """
    if new_S.shape != old_S.shape or new_S.ndim != 1 or not new_S.size:
        raise ValueError(f"paired scores have shapes {new_S.shape} and {old_S.shape}: expected two equal (S,)")
    difference_S = np.asarray(new_S, dtype=np.float64) - np.asarray(old_S, dtype=np.float64)
    if not np.isfinite(difference_S).all():
        raise ValueError(f"sample {int(np.argmin(np.isfinite(difference_S)))} has a score that is not finite")
    generator = np.random.default_rng(seed)
    samples, at_once = difference_S.size, max(1, DRAW_ELEMENTS // difference_S.size)
    means = [
        difference_S[generator.integers(samples, size=(min(at_once, draws - start), samples))].mean(1)
        for start in range(0, draws, at_once)
    ]
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return Difference(float(difference_S.mean()), float(low), float(high))
