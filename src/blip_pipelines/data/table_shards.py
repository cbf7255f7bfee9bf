"""The files of a table: parquet shards and a manifest that names them by hash; written, verified and read."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from blip_pipelines.data import storage
from blip_pipelines.data.storage import MANIFEST, StorageError

REMEDY = "restore it (`dvc checkout`, `dvc pull`) or run the stage that writes it"

_AT_ONCE = 4  # shards that are verified or read
_FEW_ROWS = 20_000  # a shard of fewer is read sooner than a thread has begun


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


def each_shard(call: Callable[[Path], Any], paths: Sequence[Path], rows: int) -> Iterator[Any]:
    """What a call makes of each shard, some of them at once where they are large enough."""
    if rows < _FEW_ROWS * len(paths):
        yield from map(call, paths)
        return
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for first in range(0, len(paths), _AT_ONCE):
            yield from pool.map(call, paths[first : first + _AT_ONCE])


def file_stamp(path: Path) -> tuple[int, ...]:
    """What is no longer the same when a file was written anew."""
    about = path.stat()
    return about.st_ino, about.st_size, about.st_mtime_ns


def verify_shard(path: Path, entry: Mapping[str, Any]) -> tuple[int, ...]:
    """The stamp of a shard that is what the manifest says. Raises StorageError."""
    if not path.is_file():
        raise StorageError(f"{path}: table shard is missing; {REMEDY}")
    stamp = file_stamp(path)
    if (found := storage.sha256_file(path)) != entry["sha256"]:
        raise StorageError(f"{path}: content is {found[:12]}, the manifest says {entry['sha256'][:12]}; {REMEDY}")
    return stamp


def check_schema(path: Path, entry: Mapping[str, Any], wanted: pa.Schema) -> None:
    """Raises StorageError where a shard has not the columns wanted or not the rows that the manifest says."""
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
