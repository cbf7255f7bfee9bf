"""The caption table of a data set: a row is a caption of a stored image (see `image_rows`)."""

from collections import ChainMap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from blip_pipelines.data.image_rows import ImageRows
from blip_pipelines.data.records import PAIR_SCHEMA
from blip_pipelines.data.table_shards import write_table


def write_pairs(
    folder: Path, tables: Iterable[pa.Table], images_hash: str, counts: Mapping[str, Any] | None = None
) -> str:
    """Write one parquet shard per table and the manifest; returns the manifest's hash, which names the data set.

    Args:
        folder: where the table goes; the manifest is written last.
        tables: `PAIR_SCHEMA` tables; table i holds the captions of tar shard i.
        images_hash: content hash of the images folder that the rows speak of.
        counts: further plain values for the manifest (rows by origin, split, ...), looked at after the last table.

    Raises:
        StorageError: a table has another schema or a null where none may be.
    """
    # Counts may still grow while the tables come, so nothing copies them before the last one did.
    about: ChainMap[str, Any] = ChainMap({"images": images_hash}, {} if counts is None else counts)  # type: ignore[arg-type]
    return write_table(folder, tables, PAIR_SCHEMA, about)


class Pairs(ImageRows):
    """A view of a caption table: all its rows, or those that `select` chose, in the table's order."""

    SCHEMA, TEXT = PAIR_SCHEMA, "caption"

    def select(
        self,
        *,
        split: str | None = None,
        subset: str | None = None,
        origins: Sequence[str] | None = None,
        rows: np.ndarray | None = None,
    ) -> "Pairs":
        """The rows of this view that meet every condition given.

        Args:
            split, subset: equal to the row's; origins: contains the row's.
            rows: boolean mask over this view, or row numbers of it, which are sorted and may repeat.
        """
        return self.where(rows, split=split, subset=subset, origin=origins)

    def captions(self, rows: np.ndarray) -> list[str]:
        """The captions of some rows of this view."""
        return self.values("caption", rows)
