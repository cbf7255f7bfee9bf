"""Is one model better than another? Paired over the test samples that both were measured on (design section 8)."""

from pathlib import Path

import numpy as np

from blip_pipelines.evaluation.bootstrap import Difference, bootstrap_difference
from blip_pipelines.evaluation.scores import Scores, scores_of


def compare(new: Path, old: Path, draws: int = 10_000, seed: int = 0) -> dict[tuple[str, str], Difference]:
    """Mean differences of two models' predictions, with their 95 % bootstrap intervals, in what both can do.

    Args:
        new, old: folders of predictions, as `scores_of` reads them; a model that only captions has no retrieval.

    Returns:
        By (metric, subset) the difference.

    Raises:
        ValueError: they were measured on different samples.
    """
    mine, theirs = scores_of(new), scores_of(old)
    shared = {metric for metric, _ in mine} & {metric for metric, _ in theirs}
    mine, theirs = ({name: side[name] for name in side if name[0] in shared} for side in (mine, theirs))
    try:
        return compare_scores(mine, theirs, draws, seed)
    except ValueError as error:
        raise ValueError(f"{error} ({new} and {old})") from None


def compare_scores(
    new: Scores, old: Scores, draws: int = 10_000, seed: int = 0, level: float = 0.95
) -> dict[tuple[str, str], Difference]:
    """The same of scores; `level` is the share of the bootstrap distribution inside each interval."""
    found = {}
    for name in sorted(new.keys() | old.keys()):
        ours, others = new.get(name, {}), old.get(name, {})
        if ours.keys() != others.keys():
            raise ValueError(f"{'/'.join(name)}: measured on other samples; evaluate both on the same rows")
        samples = sorted(ours)
        new_S, old_S = (np.array([score[sample] for sample in samples]) for score in (ours, others))
        found[name] = bootstrap_difference(new_S, old_S, draws, level, seed)
    return found
