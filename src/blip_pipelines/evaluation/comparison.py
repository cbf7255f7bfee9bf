"""Is one model better than another? Paired over the test samples that both were measured on (design section 8)."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from blip_pipelines.evaluation.bootstrap import Difference, bootstrap_difference


def compare(new: Path, old: Path, draws: int = 10_000, seed: int = 0) -> dict[tuple[str, str], Difference]:
    """Mean differences of two models' predictions, with their 95 % bootstrap intervals.

    Args:
        new, old: folders of `jobs.evaluate_med`.

    Returns:
        By (metric, subset) the difference: `cider` per image, `i2t_r1`, `i2t_r5`, `t2i_r1` and `t2i_r5` per query.

    Raises:
        ValueError: they were measured on different samples.
    """
    mine, theirs = _scores(new), _scores(old)
    found = {}
    for name in sorted(mine.keys() | theirs.keys()):
        ours, others = mine.get(name, {}), theirs.get(name, {})
        if ours.keys() != others.keys():
            raise ValueError(f"{'/'.join(name)}: {new} and {old} have other samples; evaluate both on the same rows")
        samples = sorted(ours)
        new_S, old_S = (np.array([score[sample] for sample in samples]) for score in (ours, others))
        found[name] = bootstrap_difference(new_S, old_S, draws, seed=seed)
    return found


def _scores(folder: Path) -> dict[tuple[str, str], dict[tuple[str, str], float]]:
    """By metric and subset the score of each sample."""
    scores: dict[tuple[str, str], dict[tuple[str, str], float]] = {}

    def add(metric: str, row: dict[str, Any], text: str, value: float) -> None:
        scores.setdefault((metric, row["subset"]), {})[row["key"], text] = value

    for row in pq.read_table(folder / "predictions_captions.parquet").to_pylist():
        add("cider", row, "", row["cider"])
    for row in pq.read_table(folder / "predictions_retrieval.parquet").to_pylist():
        for k in (1, 5):
            asked = "" if row["direction"] == "i2t" else row["caption"]
            add(f"{row['direction']}_r{k}", row, asked, float(row["rank"] <= k))
    return scores
