"""Scores of a model by what a sample is like: its source, the length of its caption.

Shapes: S samples.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from blip_pipelines.evaluation.scores import Sample, Scores

LENGTHS = ((3, "up to 3 words"), (6, "4 to 6 words"), (10, "7 to 10 words"))
LONGER = "over 10 words"


def sliced(scores: Scores, by: str, rows: Iterable[Mapping[str, Any]]) -> Scores:
    """The same scores with the slice in place of the subset; samples that no row speaks of are left out.

    Args:
        by: "source", or "length" of the caption in words.
        rows: of the evaluated table: `key`, `caption`, `source`; of several captions of an image the first counts.
    """
    described: dict[str, Mapping[str, Any]] = {}
    for row in rows:
        described.setdefault(row["key"], row)
    found: Scores = {}
    for (metric, _), samples in scores.items():
        for sample, value in samples.items():
            if (about := described.get(sample.key)) is not None:
                found.setdefault((metric, _slice(by, sample, about)), {})[sample] = value
    return found


def _slice(by: str, sample: Sample, row: Mapping[str, Any]) -> str:
    if by == "source":
        return str(row["source"])
    words = len((sample.text or row["caption"]).split())
    return next((name for most, name in LENGTHS if words <= most), LONGER)
