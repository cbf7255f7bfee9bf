"""Rows that speak of stored images: a view of a table, with the face that training reads.

Whoever needs another subset takes a view, whose ids keep their meaning.
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import pyarrow as pa

from blip_pipelines.data import shards
from blip_pipelines.data.storage import StorageError
from blip_pipelines.data.table_shards import read_shard
from blip_pipelines.data.tables import Table


class ImageRows:
    """A view of a table: all its rows, or those that a `select` chose, in the table's order.

    A table has at least the columns key, member, shard, offset, size, width and height, which name a row's image, and
    its text.
    """

    SCHEMA: ClassVar[pa.Schema]
    TEXT: ClassVar[str]  # the column by whose words rows are told apart

    def __init__(self, table: Table, rows: np.ndarray):
        self._table, self._rows = table, rows  # rows: (len(self),) int64 into the whole table

    @classmethod
    def open(cls, folder: Path, images: Path | None = None) -> Self:
        """Open a table and verify its shards against the manifest.

        Args:
            folder: holds `{shard:05d}.parquet` and manifest.json.
            images: the folder of tar shards; None where no image is read.

        Raises:
            StorageError: a shard is missing, damaged or of another schema, or the images are not those the table
                was written for; names the shard and what to do.
        """
        table = Table(folder, images, cls.SCHEMA)
        return cls(table, np.arange(table.shard_ends[-1] if len(table.shard_ends) else 0))

    @property
    def hash(self) -> str:
        """Content hash of the whole table's manifest; the same for every view."""
        return self._table.hash

    @property
    def manifest(self) -> dict[str, Any]:
        return self._table.manifest

    @property
    def images(self) -> Path | None:
        return self._table.images

    def __len__(self) -> int:
        return len(self._rows)

    def where(self, rows: np.ndarray | None = None, **wanted: str | Sequence[str] | None) -> Self:
        """The rows of this view that meet every condition given.

        Args:
            rows: boolean mask over this view, or row numbers of it, which are sorted and may repeat.
            wanted: by column, the value or values that a row may have; None for any.
        """
        chosen = self._rows if rows is None else np.sort(self._rows[np.asarray(rows)])
        asked = {name: values for name, values in wanted.items() if values is not None}
        if asked:
            asked = {name: [values] if isinstance(values, str) else list(values) for name, values in asked.items()}
            chosen = chosen[self._table.meets(asked)[chosen]]
        return type(self)(self._table, chosen)

    def shard(self, number: int) -> Self:
        """All rows of one shard of the table, as a table of its own whose ids mean something there alone.

        For work that goes shard by shard: its columns cost the memory of one shard.
        """
        return type(self)(self._table.shard(number), np.arange(self._table.manifest["shards"][number]["rows"]))

    def table(self) -> pa.Table:
        """The rows of this view with all their columns, read now."""
        whole = pa.concat_tables(read_shard(path, self.SCHEMA) for path in self._table.paths)
        return whole.take(pa.array(self._rows))

    @cached_property
    def shard_rows(self) -> tuple[int, ...]:
        """How many rows of this view each shard holds, for `Order`."""
        ends = np.searchsorted(self._rows, self._table.shard_ends, side="left")
        return tuple(np.diff(ends, prepend=0).tolist())

    def column(self, name: str) -> np.ndarray:
        """One column of this view as an array (strings as objects, nulls as None; numbers with nulls as NaN)."""
        return self._table.column(name).take(pa.array(self._rows)).to_numpy(zero_copy_only=False)

    def values(self, name: str, rows: np.ndarray) -> list[Any]:
        """One column of some rows of this view, as plain values."""
        return self._table.values(name, self._rows[rows])

    @property
    def keys(self) -> np.ndarray:
        return self.column("key")

    @cached_property
    def image_ids(self) -> np.ndarray:
        """(rows,) int64: equal for equal image keys, in every view of this table."""
        return self._table.image_ids[self._rows].astype(np.int64)

    @cached_property
    def text_ids(self) -> np.ndarray:
        """(rows,) int64: equal for texts that differ only in case and white space, in every view of this table."""
        return self._table.text_ids(self.TEXT)[self._rows].astype(np.int64)

    def ids(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of some rows of this view a number of the image and one of the text, (B,) int64 >= 0: equal where `image_ids`
        and `text_ids` are, found without looking at other rows.
        """
        image_ids, text_ids = self._table.ids(self.TEXT, self._rows[rows]).T
        return image_ids, text_ids

    def places(self, rows: np.ndarray) -> np.ndarray:
        """(B, 5) int64: shard, offset, size, width and height of the images of some rows of this view."""
        return self._table.places(self._rows[rows])

    def image_bytes(self, row: int) -> bytes:
        """The encoded image of a row of this view: one seek."""
        return self.image_at(self.places(np.array([row]))[0])

    def image_at(self, place: np.ndarray) -> bytes:
        """The encoded image at one of the `places`. Raises StorageError."""
        if self._table.reader is None:
            raise StorageError(
                f"{self._table.folder}: opened without its images; give `images` to {type(self).__name__}.open"
            )
        shard, offset, size = place[:3].tolist()
        return self._table.reader.read(shard, offset, size)

    @cached_property
    def remote_shards(self) -> dict[int, int]:
        """Bytes of each image shard that lies on S3, by number; it is read through a cache of `cache_bytes`."""
        reader = self._table.reader
        return {} if reader is None else {int(Path(name).stem): s.bytes for name, s in reader.remote.items()}

    @property
    def cache_bytes(self) -> int:
        return 0 if self._table.reader is None else self._table.reader.cache_bytes

    def shards_of(self, rows: np.ndarray) -> np.ndarray:
        """(rows,) number of the image shard that each of some rows of this view lies in."""
        return self._table.column("shard").to_numpy()[self._rows[rows]]

    def fetch(self, shard: int) -> None:
        """Bring an image shard that lies on S3 into the cache. Raises StorageError."""
        if self._table.reader is not None:
            self._table.reader.fetch(shard)

    def keep_window(self, shards: int) -> None:
        """Expect an order that mixes the rows of so many shards: they and the next ones stay in memory together."""
        self._table.kept_shards = max(self._table.kept_shards, 2 * shards)

    def preload(self) -> None:
        """Read what all rows of a batch may need now, so that forked workers share it instead of reading it each."""
        _ = self._table.image_ids, self._table.text_ids(self.TEXT)
        pa.default_memory_pool().release_unused()
        self._table.column(self.TEXT)  # last: finding the ids takes memory for a moment
        pa.default_memory_pool().release_unused()

    def describe(self, row: int) -> str:
        """Names a row for messages: shard, member and key."""
        shard, member, key = (self.values(name, np.array([row]))[0] for name in ("shard", "member", "key"))
        return f"{shards.shard_name(shard)}, member {member}, key {key[:12]}"

    def unique_images(self) -> np.ndarray:
        """(images,) int64: the first row of each distinct image of this view, ascending."""
        return np.sort(np.unique(self.image_ids, return_index=True)[1])
