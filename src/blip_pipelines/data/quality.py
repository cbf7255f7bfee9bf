"""What can be said of a data set as a whole, in small tables: repeats, near duplicates, images in two splits.

Each table holds the worst rows alone, so that contracts over millions of rows judge a thousand. Near duplicates are
found by difference hash in buckets, not by comparing all with all, and confirmed on colour: two pictures whose
outlines agree may be a red and a blue heart.
"""

from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from blip_pipelines.data import storage
from blip_pipelines.data.storage import MANIFEST

_CAPTION = pa.struct({"text": pa.string(), "origin": pa.string(), "language": pa.string()})
INDEX_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string()),  # null where the image was refused
        pa.field("offset", pa.int64()),
        pa.field("size", pa.int64()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("dhash", pa.uint64()),  # which of 8 x 8 neighbours, left to right, is brighter
        pa.field("thumbnail", pa.binary(192)),  # 8 x 8 RGB
        pa.field("reason", pa.string()),  # of a refused image
        pa.field("error", pa.string()),
        pa.field("shard", pa.int32()),  # that holds the image
        # Of images that come in archives, which are opened once alone:
        pa.field("archive_member", pa.string()),
        pa.field("split", pa.string()),
        pa.field("captions", pa.list_(_CAPTION)),
    ]
)
ENOUGH_PIXELS = (64, 64)  # an image no smaller than this gives the fingerprint that the whole one would
WORST_ROWS = 1000

_BANDS = 6  # hashes that differ in at most 4 bits agree in 2 of 6 bands
NEAR_BITS = _BANDS - 2
_NEAR_COLOUR = 2.0  # mean absolute difference of 8-bit channels
_NEIGHBOURS = 32  # compared in a bucket: bounds the work where thousands share a hash, at the cost of some pairs there
_AT_ONCE = 65_536  # pairs whose colours are compared in one go


def fingerprint(image: Image.Image) -> dict[str, Any]:
    """`dhash` and `thumbnail` of an RGB image, as the index beside a shard holds them."""
    grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX))
    bits = np.packbits(grey[:, 1:] > grey[:, :-1])
    return {
        "dhash": int.from_bytes(bits.tobytes(), "big"),
        "thumbnail": image.resize((8, 8), Image.Resampling.BOX).tobytes(),
    }


def index_path(images: Path, shard: int) -> Path:
    """The index of one tar shard: a row for each image that was wanted there."""
    return images / f"{shard:05d}.parquet"


def summarise(pairs: Path, images: Path) -> dict[str, pa.Table]:
    """Small tables over a whole data set, worst rows first.

    Returns:
        captions_per_image: key, caption, captions
        images_per_caption: key, caption, images
        splits_per_image: key, caption, splits
        near_duplicates: key, caption, other_key, other_caption, splits (how many the two are in), bits, colour; images
            that are declared relatives are no duplicates
        evaluation_in_training: key, caption, splits of images that are in train and in val or test
        data_set: one row: rows, missing_rows (against the manifest), train_rows, val_rows, test_rows
    """
    manifest = storage.read_json(pairs / MANIFEST)
    columns = ["key", "caption", "split", "related_key"]
    rows = pa.concat_tables(pq.read_table(pairs / shard["name"], columns=columns) for shard in manifest["shards"])
    rows = rows.append_column("text", pc.utf8_lower(rows["caption"]))
    by_image = rows.group_by("key").aggregate(
        [
            ("caption", "count"),
            ("caption", "min"),
            ("split", "count_distinct"),
            ("split", "min"),
            ("related_key", "min"),
        ]
    )
    by_text = rows.group_by("text").aggregate([("key", "count_distinct"), ("key", "min"), ("caption", "min")])
    training = rows.filter(pc.equal(rows["split"], "train"))["key"]
    in_two = by_image.filter(pc.greater(by_image["split_count_distinct"], 1))
    leaked = in_two.filter(pc.is_in(in_two["key"], value_set=training.combine_chunks()))
    counts = {entry["values"]: entry["counts"] for entry in rows["split"].value_counts().to_pylist()}
    return {
        "captions_per_image": _worst(by_image, key="key", caption="caption_min", captions="caption_count"),
        "images_per_caption": _worst(by_text, key="key_min", caption="caption_min", images="key_count_distinct"),
        "splits_per_image": _worst(by_image, key="key", caption="caption_min", splits="split_count_distinct"),
        "evaluation_in_training": _worst(leaked, key="key", caption="caption_min", splits="split_count_distinct"),
        "near_duplicates": _near_duplicates(by_image, images),
        "data_set": pa.table(
            {
                "rows": [rows.num_rows],
                "missing_rows": [manifest["rows"] - rows.num_rows],
                **{f"{split}_rows": [counts.get(split, 0)] for split in ("train", "val", "test")},
            }
        ),
    }


def _worst(table: pa.Table, **columns: str) -> pa.Table:
    """Chosen columns under new names, the rows with most of the last of them."""
    chosen = table.select(list(columns.values())).rename_columns(list(columns))
    measure = list(columns)[-1]
    return chosen.sort_by([(measure, "descending"), ("key", "ascending")]).slice(0, WORST_ROWS)


def _near_duplicates(by_image: pa.Table, images: Path) -> pa.Table:
    """Pairs of distinct images that look alike and are no relatives, those in two splits first."""
    paths = (path for path in sorted(images.glob("*.parquet")))
    columns = ["key", "dhash", "thumbnail"]
    index = pa.concat_tables(
        [INDEX_SCHEMA.empty_table().select(columns), *(pq.read_table(p, columns=columns) for p in paths)]
    )
    index = index.group_by("key", use_threads=False).aggregate([("dhash", "first"), ("thumbnail", "first")])
    table = by_image.join(index, "key", join_type="inner").sort_by("key")
    hashes = table["dhash_first"].to_numpy()
    thumbnails = np.frombuffer(b"".join(table["thumbnail_first"].to_pylist()), np.uint8).reshape(-1, 192)
    keys, captions = table["key"].to_pylist(), table["caption_min"].to_pylist()
    relatives, in_split = table["related_key_min"].to_pylist(), table["split_min"].to_pylist()
    found = [
        {
            "key": keys[one],
            "caption": captions[one],
            "other_key": keys[other],
            "other_caption": captions[other],
            "splits": len({in_split[one], in_split[other]}),
            "bits": bits,
            "colour": colour,
        }
        for one, other, bits, colour in _similar(hashes, thumbnails)
        if relatives[one] is None or relatives[one] != relatives[other]
    ]
    found.sort(key=lambda row: (-row["splits"], row["colour"], row["key"], row["other_key"]))
    schema = pa.schema(
        [
            *((name, pa.string()) for name in ("key", "caption", "other_key", "other_caption")),
            *((name, pa.int64()) for name in ("splits", "bits")),
            ("colour", pa.float64()),
        ]
    )
    return pa.Table.from_pylist(found[:WORST_ROWS], schema)


def _similar(hashes: np.ndarray, thumbnails: np.ndarray) -> Iterator[tuple[int, int, int, float]]:
    """(row, other row, differing bits, colour difference) of pairs whose hashes and colours both agree, ascending."""
    if len(hashes) < 2:
        return
    brightness = thumbnails.mean(axis=1)
    bits = np.unpackbits(hashes.astype(">u8").view(np.uint8).reshape(-1, 8), axis=1)
    # A band takes every sixth bit, so that a white margin, a row of zeros, thins all of them instead of filling one.
    band_of = np.arange(64) % _BANDS
    found: list[np.ndarray] = []
    for bands in combinations(range(_BANDS), 2):
        in_bands = bits[:, np.isin(band_of, bands)].astype(np.uint32)
        buckets = in_bands @ (np.uint32(1) << np.arange(in_bands.shape[1], dtype=np.uint32))
        order = np.lexsort((brightness, buckets))
        for step in range(1, min(_NEIGHBOURS, len(order) - 1) + 1):
            one, other = order[:-step], order[step:]
            near = (buckets[one] == buckets[other]) & (np.bitwise_count(hashes[one] ^ hashes[other]) <= NEAR_BITS)
            pairs = np.sort(np.stack([one[near], other[near]], axis=1), axis=1)
            found.append(pairs[_colour_difference(thumbnails, pairs) <= _NEAR_COLOUR])
    pairs = np.unique(np.concatenate(found), axis=0)
    for (one, other), colour in zip(pairs.tolist(), _colour_difference(thumbnails, pairs).tolist(), strict=True):
        yield one, other, int(np.bitwise_count(hashes[one] ^ hashes[other])), round(colour, 3)


def _colour_difference(thumbnails: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """(pairs,) mean absolute difference of the 8-bit channels of two thumbnails."""
    difference = np.empty(len(pairs))
    for start in range(0, len(pairs), _AT_ONCE):
        one, other = pairs[start : start + _AT_ONCE].T
        difference[start : start + _AT_ONCE] = np.abs(thumbnails[one].astype(np.int16) - thumbnails[other]).mean(axis=1)
    return difference
