"""The caption table of a data set: images are written once, captions are a versioned table over them.

A row is a caption; table shard i should speak of images in tar shard i, so that neighbours in the order of training
are neighbours on the disk. Columns are read from parquet when they are first
used and then stay in memory as arrow, shared by forked workers: millions of rows cost their bytes once, not a Python
object each. Whoever needs another subset takes a view, whose ids keep their meaning.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from blip_pipelines.data import shards, storage
from blip_pipelines.data.records import PAIR_SCHEMA
from blip_pipelines.data.storage import MANIFEST, StorageError

_REMEDY = "restore it (`dvc checkout`, `dvc pull`) or run the stage that writes it"


def write_pairs(
    folder: Path, tables: Iterable[pa.Table], images_hash: str, counts: Mapping[str, Any] | None = None
) -> str:
    """Write one parquet shard per table and the manifest; returns the manifest's hash, which names the data set.

    Args:
        folder: where the table goes; the manifest is written last.
        tables: `PAIR_SCHEMA` tables; table i holds the captions of tar shard i.
        images_hash: content hash of the images folder that the rows speak of.
        counts: further plain values for the manifest (rows by origin, split, ...).

    Raises:
        StorageError: a table has another schema or a null where none may be.
    """
    entries = []
    for number, table in enumerate(tables):
        path = folder / f"{number:05d}.parquet"
        _check_rows(table, path)
        with storage.writing(path) as temporary:
            pq.write_table(table, temporary, compression="zstd", compression_level=3, row_group_size=100_000)
        entries.append({"name": path.name, "sha256": storage.sha256_file(path), "rows": table.num_rows})
    rows = sum(entry["rows"] for entry in entries)
    manifest = {**(counts or {}), "images": images_hash, "shards": entries, "rows": rows}
    storage.write_json(folder / MANIFEST, manifest)
    return storage.content_hash(folder)


class Pairs:
    """A view of a caption table: all its rows, or those that `select` chose, in the table's order."""

    def __init__(self, table: "_Table", rows: np.ndarray):
        self._table, self._rows = table, rows  # rows: (len(self),) int64 into the whole table

    @classmethod
    def open(cls, pairs: Path, images: Path | None = None) -> "Pairs":
        """Open a table and verify its shards against the manifest.

        Args:
            pairs: folder with `{shard:05d}.parquet` and manifest.json.
            images: the folder of tar shards; None where no image is read.

        Raises:
            StorageError: a shard is missing, damaged or of another schema, or the images are not those the table
                was written for; names the shard and what to do.
        """
        table = _Table(pairs, images)
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
        chosen = self._rows if rows is None else np.sort(self._rows[np.asarray(rows)])
        for name, values in (("split", split), ("subset", subset), ("origin", origins)):
            if values is not None:
                wanted = pa.array([values] if isinstance(values, str) else list(values), pa.large_string())
                is_wanted = pc.is_in(self._table.column(name), value_set=wanted).to_numpy(zero_copy_only=False)
                chosen = chosen[is_wanted[chosen]]
        return Pairs(self._table, chosen)

    def shard(self, number: int) -> "Pairs":
        """All rows of one shard of the table, as a table of its own whose ids mean something there alone.

        For work that goes shard by shard: its columns cost the memory of one shard.
        """
        return Pairs(self._table.shard(number), np.arange(self._table.manifest["shards"][number]["rows"]))

    def table(self) -> pa.Table:
        """The rows of this view with all their columns, read now."""
        return pa.concat_tables(pq.read_table(path) for path in self._table.paths).take(pa.array(self._rows))

    @cached_property
    def shard_rows(self) -> tuple[int, ...]:
        """How many rows of this view each shard holds, for `Order`."""
        ends = np.searchsorted(self._rows, self._table.shard_ends, side="left")
        return tuple(np.diff(ends, prepend=0).tolist())

    def column(self, name: str) -> np.ndarray:
        """One column of this view as an array (strings as objects, nulls as None; numbers with nulls as NaN)."""
        return self._table.column(name).take(pa.array(self._rows)).to_numpy(zero_copy_only=False)

    @property
    def keys(self) -> np.ndarray:
        return self.column("key")

    @cached_property
    def image_ids(self) -> np.ndarray:
        """(rows,) int64: equal for equal image keys, in every view of this table."""
        return self._table.image_ids[self._rows]

    @cached_property
    def text_ids(self) -> np.ndarray:
        """(rows,) int64: equal for captions that differ only in case and white space, in every view of this table."""
        return self._table.text_ids[self._rows]

    def captions(self, rows: np.ndarray) -> list[str]:
        """The captions of some rows of this view."""
        return self._table.column("caption").take(pa.array(self._rows[rows])).to_pylist()

    def image_bytes(self, row: int) -> bytes:
        """The encoded image of a row of this view: one seek."""
        if self._table.reader is None:
            raise StorageError(f"{self._table.folder}: opened without its images; give `images` to Pairs.open")
        shard, offset, size = self._table.places
        at = self._rows[row]
        return self._table.reader.read(int(shard[at]), int(offset[at]), int(size[at]))

    def preload(self) -> None:
        """Read what training needs now, so that forked workers share it instead of reading it each."""
        self._table.column("caption")
        _ = self._table.places, self.image_ids, self.text_ids

    def describe(self, row: int) -> str:
        """Names a row for messages: shard, member and key."""
        at = self._rows[row]
        shard, member, key = (self._table.read(name)[at].as_py() for name in ("shard", "member", "key"))
        return f"{shards.shard_name(shard)}, member {member}, key {key[:12]}"

    def unique_images(self) -> np.ndarray:
        """(images,) int64: the first row of each distinct image of this view, ascending."""
        return np.sort(np.unique(self.image_ids, return_index=True)[1])


class _Table:
    """The whole table behind the views: verified once, each column read once."""

    def __init__(self, folder: Path, images: Path | None):
        self.folder, self.images = folder, images
        self.manifest = storage.read_json(folder / MANIFEST)
        self.hash = storage.content_hash(folder)
        self.paths = [folder / entry["name"] for entry in self.manifest["shards"]]
        for path, entry in zip(self.paths, self.manifest["shards"], strict=True):
            _verify(path, entry)
        self.shard_ends = np.cumsum([entry["rows"] for entry in self.manifest["shards"]], dtype=np.int64)
        self.reader = None
        if images is not None:
            if storage.content_hash(images) != self.manifest["images"]:
                raise StorageError(f"{folder}: was written for other images than {images} holds; run ingestion again")
            shards.verify(images, hashes=False)
            self.reader = shards.ShardReader(images)
        self._columns: dict[str, pa.Array] = {}

    def shard(self, number: int) -> "_Table":
        one = object.__new__(_Table)
        one.folder, one.images, one.manifest, one.hash = self.folder, self.images, self.manifest, self.hash
        one.paths, one.reader, one._columns = [self.paths[number]], self.reader, {}
        one.shard_ends = np.array([self.manifest["shards"][number]["rows"]])
        return one

    def column(self, name: str) -> pa.Array:
        if name not in self._columns:
            self._columns[name] = self.read(name)
        return self._columns[name]

    def read(self, name: str) -> pa.Array:
        kind = PAIR_SCHEMA.field(name).type
        if pa.types.is_string(kind):  # the 32-bit offsets of plain strings end at 2 GB of captions
            kind = pa.large_string()
        parts = [pq.ParquetFile(path).read([name])[name].cast(kind) for path in self.paths]
        chunks = [chunk for part in parts for chunk in part.chunks]
        return pa.concat_arrays(chunks) if chunks else pa.array([], kind)

    @cached_property
    def places(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        shard, offset, size = (self.column(name).to_numpy() for name in ("shard", "offset", "size"))
        return shard, offset, size

    @cached_property
    def image_ids(self) -> np.ndarray:
        return _dense_ids(self.read("key"))  # not kept: it is the largest column, and ids replace it

    @cached_property
    def text_ids(self) -> np.ndarray:
        words = pc.utf8_split_whitespace(pc.utf8_trim_whitespace(pc.utf8_lower(self.column("caption"))))
        return _dense_ids(pc.binary_join(words, pa.scalar(" ", pa.large_string())))


def _dense_ids(values: pa.Array) -> np.ndarray:
    return values.dictionary_encode().indices.to_numpy(zero_copy_only=False).astype(np.int64)


def _verify(path: Path, entry: Mapping[str, Any]) -> None:
    if not path.is_file():
        raise StorageError(f"{path}: pairs shard is missing; {_REMEDY}")
    if (found := storage.sha256_file(path)) != entry["sha256"]:
        raise StorageError(f"{path}: content is {found[:12]}, the manifest says {entry['sha256'][:12]}; {_REMEDY}")
    file = pq.ParquetFile(path)
    schema, rows = file.schema_arrow, file.metadata.num_rows
    if not schema.equals(PAIR_SCHEMA) or rows != entry["rows"]:
        raise StorageError(f"{path}: {rows} rows of schema\n{schema}\nwhere the manifest says {entry['rows']} pairs")


def _check_rows(table: pa.Table, path: Path) -> None:
    if not table.schema.equals(PAIR_SCHEMA):
        raise StorageError(f"{path}: cannot write a table of schema\n{table.schema}\nwhere pairs are wanted")
    for field in PAIR_SCHEMA:
        if not field.nullable and table[field.name].null_count:
            raise StorageError(f"{path}: column '{field.name}' holds nulls; fill them before writing")
