"""Tables whose rows speak of stored images: parquet shards with a manifest, read by the column.

Images are written once; tables over them are versioned. Table shard i should speak of images in tar shard i, so that
neighbours in the order of training are neighbours on the disk. What is asked of single rows is read by the shard, of
which the last used stay in memory; whole columns are read when they are first used and then stay as arrow, shared by
forked workers: millions of rows cost their bytes once, not a Python object each. Whoever needs another subset takes a
view, whose ids keep their meaning.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from blip_pipelines.data import shards, storage
from blip_pipelines.data.recent_shards import Part, RecentShards
from blip_pipelines.data.row_hashes import dense_ids, hash_keys, hash_texts
from blip_pipelines.data.storage import MANIFEST, StorageError

_PLACE = ("shard", "offset", "size", "width", "height")
_AT_ONCE = 4  # shards that are verified or read
_FEW_ROWS = 20_000  # a shard of fewer is read sooner than a thread has begun
_REMEDY = "restore it (`dvc checkout`, `dvc pull`) or run the stage that writes it"


def write_table(
    folder: Path, tables: Iterable[pa.Table], schema: pa.Schema, about: Mapping[str, Any], row_group_rows: int = 100_000
) -> str:
    """Write one parquet shard per table and the manifest; returns the manifest's hash, which names the data set.

    Args:
        folder: where the table goes; the manifest is written last.
        tables: of `schema`; table i holds the rows of images in tar shard i.
        about: further plain values for the manifest; `images` is the content hash of the images that the rows speak of.

    Raises:
        StorageError: a table has another schema or a null where none may be.
    """
    entries = []
    for number, table in enumerate(tables):
        path = folder / f"{number:05d}.parquet"
        _check_rows(table, schema, path)
        with storage.writing(path) as temporary:
            pq.write_table(table, temporary, compression="zstd", compression_level=3, row_group_size=row_group_rows)
        entries.append({"name": path.name, "sha256": storage.sha256_file(path), "rows": table.num_rows})
    storage.write_json(folder / MANIFEST, {**about, "shards": entries, "rows": sum(entry["rows"] for entry in entries)})
    return storage.content_hash(folder)


def read_shard(path: Path, schema: pa.Schema, names: Iterable[str] | None = None) -> pa.Table:
    """Columns of a table shard, all of `schema` by default; one that is younger than the table holds nulls.

    Shards are many and small: reading ahead and threads would cost more than they bring.
    """
    file = pq.ParquetFile(path, pre_buffer=False)
    fields = [schema.field(name) for name in dict.fromkeys(schema.names if names is None else names)]
    there, rows = set(file.schema_arrow.names), file.metadata.num_rows
    found = file.read([field.name for field in fields if field.name in there], use_threads=False)
    columns = [found[field.name] if field.name in there else pa.nulls(rows, field.type) for field in fields]
    return pa.table(columns, schema=pa.schema(fields))


class ImageRows:
    """A view of a table: all its rows, or those that a `select` chose, in the table's order.

    A table has at least the columns key, member, shard, offset, size, width and height, which name a row's image, and
    its text.
    """

    SCHEMA: ClassVar[pa.Schema]
    TEXT: ClassVar[str]  # the column by whose words rows are told apart

    def __init__(self, table: "Table", rows: np.ndarray):
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


class Table:
    """The whole table behind the views: verified once, each column read once."""

    def __init__(self, folder: Path, images: Path | None, schema: pa.Schema):
        self.folder, self.images, self.schema = folder, images, schema
        self.manifest = storage.read_json(folder / MANIFEST)
        self.hash = storage.content_hash(folder)
        self.paths = [folder / entry["name"] for entry in self.manifest["shards"]]
        by_path = dict(zip(self.paths, self.manifest["shards"], strict=True))
        stamps = _each(lambda path: _verify(path, by_path[path]), self.paths, self.manifest["rows"])
        self._stamps = dict(zip(self.paths, stamps, strict=True))
        if self.paths:  # the others are, by their hash, what the same writer left
            _check_schema(self.paths[0], self.manifest["shards"][0], schema)
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
        yield from _each(lambda path: call(read_shard(path, self.schema, names)), self.paths, rows)

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
            if _stamp(path) != self._stamps[path]:
                raise StorageError(f"{path}: changed since it was opened; end what writes it and start again")
            return read_shard(path, self.schema, names)
        except FileNotFoundError as error:
            raise StorageError(f"{path}: table shard is missing; {_REMEDY}") from error

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


def _each(call: Callable[[Path], Any], paths: Sequence[Path], rows: int) -> Iterator[Any]:
    """What a call makes of each shard, some of them at once where they are large enough."""
    if rows < _FEW_ROWS * len(paths):
        yield from map(call, paths)
        return
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for first in range(0, len(paths), _AT_ONCE):
            yield from pool.map(call, paths[first : first + _AT_ONCE])


def _stamp(path: Path) -> tuple[int, ...]:
    """What is no longer the same when a file was written anew."""
    about = path.stat()
    return about.st_ino, about.st_size, about.st_mtime_ns


def _verify(path: Path, entry: Mapping[str, Any]) -> tuple[int, ...]:
    """The stamp of a shard that is what the manifest says. Raises StorageError."""
    if not path.is_file():
        raise StorageError(f"{path}: table shard is missing; {_REMEDY}")
    stamp = _stamp(path)
    if (found := storage.sha256_file(path)) != entry["sha256"]:
        raise StorageError(f"{path}: content is {found[:12]}, the manifest says {entry['sha256'][:12]}; {_REMEDY}")
    return stamp


def _check_schema(path: Path, entry: Mapping[str, Any], wanted: pa.Schema) -> None:
    file = pq.ParquetFile(path)
    schema, rows = file.schema_arrow, file.metadata.num_rows
    if not _fits(schema, wanted) or rows != entry["rows"]:
        raise StorageError(
            f"{path}: {rows} rows of schema\n{schema}\nwhere {entry['rows']} rows are wanted, of schema\n{wanted}"
        )


def _fits(schema: pa.Schema, wanted: pa.Schema) -> bool:
    """Whether these are the columns wanted, but for nullable ones that are younger than the table."""
    there = set(schema.names)
    return schema.equals(pa.schema([field for field in wanted if field.name in there or not field.nullable]))


def _check_rows(table: pa.Table, schema: pa.Schema, path: Path) -> None:
    if not table.schema.equals(schema):
        raise StorageError(f"{path}: cannot write a table of schema\n{table.schema}\nwhere this is wanted:\n{schema}")
    for field in schema:
        if not field.nullable and table[field.name].null_count:
            raise StorageError(f"{path}: column '{field.name}' holds nulls; fill them before writing")
