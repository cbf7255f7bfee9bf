"""Tables whose rows speak of stored images, read by the column.

Images are written once; tables over them are versioned. Table shard i should speak of images in tar shard i, so that
neighbours in the order of training are neighbours on the disk. What is asked of single rows is read by the shard, of
which the last used stay in memory; whole columns are read when they are first used and then stay as arrow, shared by
forked workers: millions of rows cost their bytes once, not a Python object each.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from blip_pipelines.data import shards, storage
from blip_pipelines.data.recent_shards import Part, RecentShards
from blip_pipelines.data.row_hashes import dense_ids, hash_keys, hash_texts
from blip_pipelines.data.storage import MANIFEST, StorageError
from blip_pipelines.data.table_shards import REMEDY, check_schema, each_shard, file_stamp, read_shard, verify_shard

_PLACE = ("shard", "offset", "size", "width", "height")


class Table:
    """The whole table behind the views: verified once, each column read once."""

    def __init__(self, folder: Path, images: Path | None, schema: pa.Schema):
        self.folder, self.images, self.schema = folder, images, schema
        self.manifest = storage.read_json(folder / MANIFEST)
        self.hash = storage.content_hash(folder)
        self.paths = [folder / entry["name"] for entry in self.manifest["shards"]]
        by_path = dict(zip(self.paths, self.manifest["shards"], strict=True))
        stamps = each_shard(lambda path: verify_shard(path, by_path[path]), self.paths, self.manifest["rows"])
        self._stamps = dict(zip(self.paths, stamps, strict=True))
        if self.paths:  # the others are, by their hash, what the same writer left
            check_schema(self.paths[0], self.manifest["shards"][0], schema)
        self.shard_ends = np.cumsum([entry["rows"] for entry in self.manifest["shards"]], dtype=np.int64)
        self.reader = None
        if images is not None:
            if storage.content_hash(images) != self.manifest["images"]:
                raise StorageError(
                    f"{folder}: was written for other images than {images} holds; run the stage that writes it again"
                )
            shards.verify(images, hashes=False)
            self.reader = shards.ShardReader(images)
        self._columns: dict[str, pa.Array] = {}
        self.kept_shards = 1
        self._recently_used: RecentShards | None = None

    def shard(self, number: int) -> "Table":
        """One shard of it, with columns of its own."""
        paths, ends = [self.paths[number]], np.array([self.manifest["shards"][number]["rows"]])
        return self._like({"paths": paths, "shard_ends": ends, "_columns": {}})

    def of_columns(self, columns: Mapping[str, pa.Array]) -> "Table":
        """Another table over the same images, given by its columns and in one shard."""
        rows = len(next(iter(columns.values())))
        return self._like({"paths": [], "shard_ends": np.array([rows]), "_columns": dict(columns)})

    def _like(self, changed: Mapping[str, Any]) -> "Table":
        one = object.__new__(Table)
        shared = ("folder", "images", "schema", "manifest", "hash", "reader", "kept_shards", "_stamps")
        vars(one).update({name: getattr(self, name) for name in shared}, _recently_used=None, **changed)
        return one

    def column(self, name: str) -> pa.Array:
        if name not in self._columns:
            self._columns[name] = self.read(name)
        return self._columns[name]

    def read(self, name: str) -> pa.Array:
        if name in self._columns and not self.paths:
            return self._columns[name]
        kind = self.schema.field(name).type
        if pa.types.is_string(kind):  # the 32-bit offsets of plain strings end at 2 GB of captions
            kind = pa.large_string()
        if kind == pa.large_string() and not self.schema.field(name).nullable:
            return _gather_texts(self._parts(name), int(self.shard_ends[-1]) if len(self.shard_ends) else 0)
        chunks = [chunk for part in self._parts(name) for chunk in part.cast(kind).chunks]
        return pa.concat_arrays(chunks) if chunks else pa.array([], kind)

    def meets(self, wanted: Mapping[str, Sequence[str]]) -> np.ndarray:
        """(rows,) bool: whether a row has in each column one of the values wanted there."""

        def look(table: pa.Table) -> np.ndarray:
            columns = [pc.is_in(table[name], pa.array(some, table[name].type)) for name, some in wanted.items()]
            return np.logical_and.reduce([column.to_numpy() for column in columns])

        return np.concatenate([np.empty(0, bool), *self._map(look, *wanted)])

    def _parts(self, name: str) -> Iterator[pa.ChunkedArray]:
        """A column shard by shard, read now."""
        return self._map(lambda table: table[name], name)

    def _map(self, call: Callable[[pa.Table], Any], *names: str) -> Iterator[Any]:
        """What `call` makes of some columns, shard by shard, some of them at once."""
        if not self.paths and self._columns:
            yield call(pa.table({name: self._columns[name] for name in names}))
            return
        rows = int(self.shard_ends[-1]) if self.paths else 0
        yield from each_shard(lambda path: call(read_shard(path, self.schema, names)), self.paths, rows)

    def values(self, name: str, rows: np.ndarray) -> list[Any]:
        """One column of some rows, as plain values."""
        if name in self._columns:
            return self._columns[name].take(pa.array(rows)).to_pylist()
        found = self._recent.take(name, rows, lambda shard: self._read_shard(shard, name)[name].combine_chunks())
        return [] if found is None else found.tolist()

    def places(self, rows: np.ndarray) -> np.ndarray:
        """(B, 5) int64: shard, offset, size, width, height."""

        def read(shard: int) -> Part:
            table = self._read_shard(shard, *_PLACE)
            return np.stack([table[name].to_numpy() for name in _PLACE], 1, dtype=np.int64, casting="same_kind")

        found = self._recent.take(_PLACE, rows, read)
        return np.empty((0, len(_PLACE)), np.int64) if found is None else np.asarray(found)

    def ids(self, text: str, rows: np.ndarray) -> np.ndarray:
        """(B, 2) int64 >= 0: a number of the image and one of the words in the column `text`."""

        def read(shard: int) -> Part:
            table = self._read_shard(shard, "key", text)
            return (np.stack([hash_keys(table["key"]), hash_texts(table[text])], 1) >> np.uint64(1)).astype(np.int64)

        found = self._recent.take(("ids", text), rows, read)
        return np.empty((0, 2), np.int64) if found is None else np.asarray(found)

    def _read_shard(self, number: int, *names: str) -> pa.Table:
        if not self.paths:
            return pa.table({name: self._columns[name] for name in names})
        path = self.paths[number]
        try:
            if file_stamp(path) != self._stamps[path]:
                raise StorageError(f"{path}: changed since it was opened; end what writes it and start again")
            return read_shard(path, self.schema, names)
        except FileNotFoundError as error:
            raise StorageError(f"{path}: table shard is missing; {REMEDY}") from error

    @property
    def _recent(self) -> RecentShards:
        if self._recently_used is None:
            self._recently_used = RecentShards(self.shard_ends)
        self._recently_used.at_least = self.kept_shards
        return self._recently_used

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_recently_used": None}

    @cached_property
    def image_ids(self) -> np.ndarray:
        """(rows,) int32: 0 for the first image, 1 for the next other one, and so on."""
        return dense_ids(map(hash_keys, self._parts("key")))

    @cached_property
    def _text_ids(self) -> dict[str, np.ndarray]:
        return {}

    def text_ids(self, name: str) -> np.ndarray:
        """(rows,) int32, as `image_ids`: equal for texts that differ only in case and white space."""
        if name not in self._text_ids:
            self._text_ids[name] = dense_ids(map(hash_texts, self._parts(name)))
        return self._text_ids[name]


def _gather_texts(parts: Iterable[pa.ChunkedArray], rows: int) -> pa.LargeStringArray:
    """One array of the texts of all parts, without ever holding them twice as a concatenation would."""
    ends, characters = np.zeros(rows + 1, np.int64), np.empty(0, np.uint8)
    row = filled = 0
    for part in parts:
        for chunk in part.cast(pa.large_string()).chunks:
            if len(chunk) == 0:
                continue
            offsets = np.frombuffer(chunk.buffers()[1], np.int64)[chunk.offset : chunk.offset + len(chunk) + 1]
            count = int(offsets[-1] - offsets[0])
            characters.resize(filled + count, refcheck=False)  # the system moves pages, not bytes
            if count:
                found = np.frombuffer(chunk.buffers()[2], np.uint8)
                characters[filled:] = found[offsets[0] : offsets[-1]]
            ends[row + 1 : row + 1 + len(chunk)] = offsets[1:] - offsets[0] + filled
            row, filled = row + len(chunk), filled + count
    return pa.LargeStringArray.from_buffers(rows, pa.py_buffer(ends), pa.py_buffer(characters))
