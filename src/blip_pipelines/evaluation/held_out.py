"""The rows that an evaluation looks at: the subsets of a split, each with its gallery.

Shapes: I images, R caption rows.
"""

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from blip_pipelines.data.pairs import Pairs
from blip_pipelines.evaluation.retrieval import Gallery


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
    views = {subset: pairs.select(split=split, subset=subset) for subset in subsets}
    found = [HeldOut(subset, rows) for subset, rows in views.items() if len(rows)]
    if not found:
        others = sorted(set(pairs.select(split=split).column("subset")) - {None})
        raise NothingToMeasure(
            f"evaluation.subsets: no rows of split '{split}' in {', '.join(subsets)}; "
            f"the table has {', '.join(others) or 'none of that split'}"
        )
    return found
