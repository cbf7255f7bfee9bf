"""The rows that an evaluation looks at: the subsets of a split, each with its gallery.

Shapes: I images, R caption rows.
"""

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from blip_pipelines.data.pairs import Pairs
from blip_pipelines.evaluation.retrieval import Gallery

WHOLE = "all"  # the one subset of data that have none, as ingestion names it


class NothingToMeasure(ValueError):
    """The table has no rows where the parameters look for them; the message says where there are some."""


class HeldOut:
    """One subset.

    Attributes:
        rows: a view of its R rows.
        gallery: which of its I images and R rows belong together.
        captions: R texts.
    """

    def __init__(self, subset: str, rows: Pairs):
        self.subset, self.rows = subset, rows
        self.gallery = Gallery.of(rows.image_ids, rows.text_ids)
        self.captions = rows.captions(np.arange(len(rows)))

    @property
    def keys(self) -> np.ndarray:
        """(I,) of the images."""
        return self.rows.keys[self.gallery.images]

    @cached_property
    def references(self) -> list[list[str]]:
        """I lists: all captions of each image."""
        found: list[list[str]] = [[] for _ in self.gallery.images]
        for caption, image in zip(self.captions, self.gallery.image_of_row, strict=True):
            found[image].append(caption)
        return found


def held_out(pairs: Pairs, split: str, subsets: Sequence[str]) -> list[HeldOut]:
    """Those of the subsets that have rows.

    Raises:
        NothingToMeasure: none of them has any.
    """
    rows = pairs.select(split=split)
    return [HeldOut(subset, rows.select(subset=subset)) for subset in subsets_of(rows, subsets)]


def subsets_of(rows: Pairs, wanted: Sequence[str] | None) -> list[str]:
    """Those wanted that have rows, in their order; all that have some, if none is named or the data have no subsets.

    Raises:
        NothingToMeasure: none of them has any.
    """
    there = sorted({*rows.column("subset")} - {None})
    found = there if wanted is None or there == [WHOLE] else [subset for subset in wanted if subset in there]
    if not found:
        raise NothingToMeasure(
            f"subsets: no held-out rows in {', '.join(wanted or ())}; the split has {', '.join(there) or 'none'}"
        )
    return found
