"""Scores of a model by what a sample is like: its source, its category, the length of its caption.

Shapes: S samples.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from blip_pipelines.data.records import PAIR_SCHEMA
from blip_pipelines.data.table_shards import read_shard
from blip_pipelines.evaluation.scores import Sample, Scores

WAYS = ("source", "category", "length")
LENGTHS = ((3, "up to 3 words"), (6, "4 to 6 words"), (10, "7 to 10 words"))
LONGER = "over 10 words"
NO_CATEGORY = "no category"
_COLUMNS = ["key", "caption", "source", "category"]


def sliced(scores: Scores, by: str, rows: Iterable[Mapping[str, Any]]) -> Scores:
    """The same scores with the slice in place of the subset; samples that no row speaks of are left out.

    Args:
        by: "source", "category", or "length" of the caption in words.
        rows: of the evaluated table: `key`, `caption`, `source`, `category`; of several captions of an image the first
            counts.
    """
    described: dict[str, Mapping[str, Any]] = {}
    for row in rows:
        described.setdefault(row["key"], row)
    found: Scores = {}
    for (metric, _), samples in scores.items():
        for sample, value in samples.items():
            if (about := described.get(sample.key)) is not None:
                name = _length(metric, sample, about) if by == "length" else about[by]
                found.setdefault((metric, str(name or NO_CATEGORY)), {})[sample] = value
    return found


def rows_of(scores: Scores, pairs: Path) -> Iterator[dict[str, Any]]:
    """The rows of a caption table that speak of the pictures of the scores, read shard by shard."""
    keys = pa.array(sorted({sample.key for samples in scores.values() for sample in samples}), pa.string())
    for path in sorted(pairs.glob("*.parquet")):
        table = read_shard(path, PAIR_SCHEMA, _COLUMNS)
        yield from table.filter(pc.is_in(table["key"], value_set=keys)).to_pylist()


def slice_order(name: str) -> tuple[int, str]:
    """Lengths from short to long, everything else by name, what has none last."""
    lengths = [*(words for _, words in LENGTHS), LONGER]
    return (lengths.index(name) if name in lengths else len(lengths) * (name == NO_CATEGORY)), name


def _length(metric: str, sample: Sample, row: Mapping[str, Any]) -> str:
    """Of the caption that was asked with, or else of the picture's; a question is no caption."""
    words = len((row["caption"] if metric == "accuracy" else sample.text or row["caption"]).split())
    return next((name for most, name in LENGTHS if words <= most), LONGER)
