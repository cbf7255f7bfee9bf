"""Caption tables of millions of rows, for what reads no picture: as ingestion leaves them, in shards of its default."""

import hashlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.loader import caption
from blip_pipelines.data import quality, shards
from blip_pipelines.data.ingestion_plan import IngestionConfig
from blip_pipelines.data.pairs import write_pairs
from blip_pipelines.data.records import PAIR_SCHEMA

ROWS, SHARD = 10_000_000, IngestionConfig().shard_images
_TEXTS = 20_000  # told apart by a number behind them


def write_data_set(folder: Path, rows: int, shard_rows: int = SHARD, fingerprints: bool = False) -> None:
    """`pairs` and `images` of a data set without pictures, one caption an image, a twentieth of them held out.

    Args:
        fingerprints: write the indexes too, which alone say what pictures look like.
    """
    (folder / "images").mkdir(parents=True)
    empty, starts = hashlib.sha256(b"").hexdigest(), range(0, rows, shard_rows)
    for number in range(len(starts)):
        (folder / "images" / shards.shard_name(number)).touch()
    written = [shards.Shard(shards.shard_name(number), empty, shard_rows, 0) for number in range(len(starts))]
    images_hash = shards.write_manifest(folder / "images", written)

    def tables() -> Iterator[pa.Table]:
        draw = np.random.default_rng(0)
        for number, first in enumerate(starts):
            table = _rows(draw, number, range(first, min(first + shard_rows, rows)))
            if fingerprints:
                pq.write_table(_fingerprints(draw, table), quality.index_path(folder / "images", number))
            yield table

    write_pairs(folder / "pairs", tables(), images_hash)


def _rows(draw: np.random.Generator, shard: int, numbers: range) -> pa.Table:
    length, digits = len(numbers), draw.bytes(32 * len(numbers)).hex()
    keys = pa.array([digits[at : at + 64] for at in range(0, 64 * length, 64)])
    texts = _texts()
    captions = [f"{texts[at]} {number}" for at, number in zip(draw.integers(0, _TEXTS, length), numbers, strict=True)]
    held_out = draw.random(length) < 0.05
    sizes = draw.integers(20_000, 120_000, length)
    columns = {
        **{"key": keys, "member": keys, "caption": captions, "origin": ["web"] * length, "source": ["made"] * length},
        **{"shard": np.full(length, shard), "offset": np.cumsum(sizes), "size": sizes},
        **{"width": np.full(length, 640), "height": np.full(length, 480)},
        "split": np.where(held_out, np.where(draw.random(length) < 0.5, "val", "test"), "train").tolist(),
        "subset": np.where(held_out, "all", None).tolist(),
    }
    arrays = {name: pa.array(values, PAIR_SCHEMA.field(name).type) for name, values in columns.items()}
    empty = {field.name: pa.nulls(length, field.type) for field in PAIR_SCHEMA if field.name not in arrays}
    return pa.table({**arrays, **empty}, schema=None).select(PAIR_SCHEMA.names).cast(PAIR_SCHEMA)


def _fingerprints(draw: np.random.Generator, table: pa.Table) -> pa.Table:
    """An index: smooth pictures in all colours, one of a hundred like another of the shard."""
    length = table.num_rows
    outlines, bits = _outlines()
    chosen = draw.integers(0, len(outlines), length)
    shades = draw.integers(0, 64, (length, 1, 3), np.uint8)
    flips = np.bitwise_and.reduce(draw.integers(0, 2**63, (2, length), np.uint64))  # a quarter of the bits
    alike = np.arange(length // 100)
    chosen[alike], shades[alike], flips[alike] = (each[-1 - alike] for each in (chosen, shades, flips))
    columns = {
        **{name: table[name] for name in ("key", "shard", "offset", "size", "width", "height")},
        "dhash": pa.array(bits[chosen] ^ flips),
        "thumbnail": pa.array([each.tobytes() for each in outlines[chosen] + shades], pa.binary(192)),
    }
    empty = {f.name: pa.nulls(length, f.type) for f in quality.INDEX_SCHEMA if f.name not in columns}
    return pa.table({**columns, **empty}).select(quality.INDEX_SCHEMA.names).cast(quality.INDEX_SCHEMA)


@cache
def _texts() -> list[str]:
    return [caption(number) for number in range(_TEXTS)]


@cache
def _outlines(number: int = 20_000) -> tuple[np.ndarray, np.ndarray]:
    """(number, 64, 3) uint8 thumbnails of up to 191, and (number,) uint64 of the hashes that their shapes give."""
    draw, ramp = np.random.default_rng(1), np.linspace(0, 2, 9)
    weights = np.maximum(1 - np.abs(ramp[:, None] - np.arange(3)), 0)  # (9, 3) of three corners and middles
    corners = draw.integers(0, 192, (number, 3, 3, 3))
    pictures = np.einsum("ai,bj,nijc->nabc", weights[:8], weights, corners)
    grey = pictures.mean(axis=3)
    bits = np.packbits((grey[:, :, 1:] > grey[:, :, :-1]).reshape(number, 64), axis=1)
    return pictures[:, :, :8].astype(np.uint8).reshape(number, 64, 3), bits.view(">u8")[:, 0].astype(np.uint64)
