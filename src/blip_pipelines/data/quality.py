"""What can be said of a data set as a whole, in small tables: repeats, near duplicates, images in two splits, shares.

Each table holds the worst rows alone, so that contracts over millions of rows judge a thousand. A row costs memory for
four numbers (of its image, text, split and relatives); texts and keys are read again for the worst.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from blip_pipelines.data import storage
from blip_pipelines.data.near_duplicates import find_alike, id_of
from blip_pipelines.data.storage import MANIFEST

_CAPTION = pa.struct({name: pa.string() for name in ("text", "origin", "language", "category")})
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

FILE_NAME = (
    r"(?i)^(?:(?:img|dsc|dscn|image|photo|picture|scan|screenshot|untitled)[ _-]?\d+|.*\.(?:jpe?g|png|gif|webp)$)"
)
# Words and letters that English texts do not have: a hint, hence a warning.
NOT_ENGLISH = (
    r"(?<![\w-])(?i:und|mit|der|das|ein|eine|et|avec|le|les|des|du|une|con|del|della|di|una|uma|com|da|do|para|por|y)"
    r"(?![\w-])|[\u00c0-\u024f\u0370-\u1fff\u3040-\uffef]"
)
_SPLITS = ("train", "val", "test")
_TRAIN = np.uint8(1)  # bit of the first split
_NARROW = 3.0  # longer side by shorter side


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
        shares: one row: of captions that are foreign, file_name, one_word; of rows whose image is narrow
    """
    manifest = storage.read_json(pairs / MANIFEST)
    paths = [pairs / shard["name"] for shard in manifest["shards"]]
    rows, totals = _read_rows(paths)
    count = len(rows["split"])
    of_split = {f"{name}_rows": [int((rows["split"] == 1 << bit).sum())] for bit, name in enumerate(_SPLITS)}
    texts, of_text = _images_per_text(rows.pop("text"), rows["key"])
    ids, counts, in_splits, relatives = _by_image(rows)
    del rows  # what follows takes memory of its own
    splits = np.bitwise_count(in_splits)
    leaked = (splits > 1) & (in_splits & _TRAIN > 0)
    alike = _unrelated(sorted(images.glob("*.parquet")), ids, in_splits, relatives)

    per_image, per_text = _worst(counts), _worst(of_text)
    by_split, by_leak = _worst(splits), np.flatnonzero(leaked)[_worst(splits[leaked])]
    named = np.unique(np.concatenate([ids[per_image], ids[by_split], ids[by_leak], alike["ids"].ravel()]))
    names = _names(paths, named, np.sort(texts[per_text]))
    return {
        "captions_per_image": _table(names.of_images(ids[per_image]), captions=counts[per_image]),
        "images_per_caption": _table(names.of_texts(texts[per_text]), images=of_text[per_text]),
        "splits_per_image": _table(names.of_images(ids[by_split]), splits=splits[by_split]),
        "evaluation_in_training": _table(names.of_images(ids[by_leak]), splits=splits[by_leak]),
        "near_duplicates": _pairs_table(alike, names),
        "data_set": pa.table(
            {
                "rows": [count],
                "missing_rows": [manifest["rows"] - count],
                **of_split,
            }
        ),
        "shares": pa.table({name: [total / max(count, 1)] for name, total in totals.items()}),
    }


def _read_rows(paths: list[Path]) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """Of all rows ids of key, text and related_key, (rows,) uint64, and a bit for the split; totals for the shares."""
    counts = [pq.read_metadata(path).num_rows for path in paths]
    kinds = {"key": np.uint64, "text": np.uint64, "related_key": np.uint64, "split": np.uint8}
    columns = {name: np.empty(sum(counts), kind) for name, kind in kinds.items()}
    first = 0
    totals = {"foreign": 0, "file_name": 0, "one_word": 0, "narrow": 0}
    is_foreign, is_file_name = re.compile(NOT_ENGLISH).search, re.compile(FILE_NAME).search
    bit_of = {name: 1 << bit for bit, name in enumerate(_SPLITS)}
    for path in paths:
        table = pq.read_table(path, columns=["key", "caption", "split", "related_key", "width", "height"])
        splits = table["split"].combine_chunks().dictionary_encode()
        bits = np.array([bit_of.get(name, 128) for name in splits.dictionary.to_pylist()], np.uint8)
        here = slice(first, first := first + table.num_rows)
        columns["key"][here], columns["text"][here] = id_of(table["key"]), id_of(pc.utf8_lower(table["caption"]))
        columns["related_key"][here] = id_of(table["related_key"])
        if len(bits):
            columns["split"][here] = bits[splits.indices.to_numpy(zero_copy_only=False)]
        captions = table["caption"].to_pylist()
        totals["foreign"] += sum(is_foreign(caption) is not None for caption in captions)
        totals["file_name"] += sum(is_file_name(caption) is not None for caption in captions)
        totals["one_word"] += sum(" " not in caption for caption in captions)
        sides = np.stack([table["width"].to_numpy(), table["height"].to_numpy()])
        totals["narrow"] += int((sides.max(0) > _NARROW * sides.min(0)).sum())
    return columns, totals


def _by_image(rows: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(images,) ids, ascending; of each its rows, the bits of their splits, and the id of its relatives."""
    order = np.argsort(rows["key"], kind="stable")
    keys = rows["key"][order]
    starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]])[: len(keys)])
    counts = np.diff(starts, append=len(keys)).astype(np.int32)
    in_splits = np.bitwise_or.reduceat(rows["split"][order], starts) if len(starts) else np.empty(0, np.uint8)
    return keys[starts], counts, in_splits, rows["related_key"][order[starts]]


def _images_per_text(texts: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(texts,) distinct ids, and how many distinct images each has."""
    order = np.lexsort((keys, texts))
    texts, keys = texts[order], keys[order]
    is_new_text = np.concatenate([[True], texts[1:] != texts[:-1]])[: len(texts)]
    is_new_pair = is_new_text | np.concatenate([[True], keys[1:] != keys[:-1]])[: len(texts)]
    starts = np.flatnonzero(is_new_text)
    counts = np.add.reduceat(is_new_pair.astype(np.int64), starts) if len(starts) else np.empty(0, np.int64)
    return texts[starts], counts


def _worst(measure: np.ndarray) -> np.ndarray:
    return np.argsort(-measure.astype(np.int64), kind="stable")[:WORST_ROWS]


def _unrelated(
    indexes: list[Path], ids: np.ndarray, in_splits: np.ndarray, relatives: np.ndarray
) -> dict[str, np.ndarray]:
    """The worst pairs of images that look alike and are no relatives: those in two splits first, then the closest."""
    found = find_alike(indexes, ids)
    place = np.searchsorted(ids, found.ids)
    one, other = relatives[place].T if len(place) else (np.empty(0, np.uint64),) * 2
    splits = np.bitwise_count(in_splits[place[:, 0]] | in_splits[place[:, 1]]).astype(np.int64)
    unrelated = np.flatnonzero((one == 0) | (one != other))
    chosen = unrelated[np.lexsort((found.colour[unrelated], -splits[unrelated]))][:WORST_ROWS]
    about = {"ids": found.ids, "splits": splits, "bits": found.bits, "colour": found.colour}
    return {name: column[chosen] for name, column in about.items()}


class _Names:
    """Keys and captions behind ids."""

    def __init__(self) -> None:
        self.images: dict[int, tuple[str, str]] = {}
        self.texts: dict[int, tuple[str, str]] = {}

    def of_images(self, ids: np.ndarray) -> list[tuple[str, str]]:
        return [self.images[number] for number in ids.tolist()]

    def of_texts(self, ids: np.ndarray) -> list[tuple[str, str]]:
        return [self.texts[number] for number in ids.tolist()]


def _names(paths: list[Path], images: np.ndarray, texts: np.ndarray) -> _Names:
    """(key, caption), the least of each, of some images and some texts."""
    names = _Names()
    for path in paths:
        table = pq.read_table(path, columns=["key", "caption"])
        for ids, wanted, found in (
            (id_of(table["key"]), images, names.images),
            (id_of(pc.utf8_lower(table["caption"])), texts, names.texts),
        ):
            rows = np.flatnonzero(np.isin(ids, wanted))
            chosen = table.take(pa.array(rows))
            keys, captions = chosen["key"].to_pylist(), chosen["caption"].to_pylist()
            for number, key, caption in zip(ids[rows].tolist(), keys, captions, strict=True):
                least = found.get(number, (key, caption))
                found[number] = min(least[0], key), min(least[1], caption)
    return names


def _table(names: list[tuple[str, str]], **measure: np.ndarray) -> pa.Table:
    ((name, values),) = measure.items()
    keys, captions = zip(*names, strict=True) if names else ((), ())
    columns = {"key": pa.array(keys, pa.string()), "caption": pa.array(captions, pa.string())}
    table = pa.table({**columns, name: pa.array(values.astype(np.int64))})
    return table.sort_by([(name, "descending"), ("key", "ascending")])


def _pairs_table(alike: dict[str, np.ndarray], names: _Names) -> pa.Table:
    rows = []
    measures = (alike[name].tolist() for name in ("splits", "bits", "colour"))
    for ids, splits, bits, colour in zip(alike["ids"], *measures, strict=True):
        (key, caption), (other_key, other_caption) = sorted(names.of_images(ids))
        pair = {"key": key, "caption": caption, "other_key": other_key, "other_caption": other_caption}
        rows.append({**pair, "splits": splits, "bits": bits, "colour": colour})
    rows.sort(key=lambda row: (-row["splits"], row["colour"], row["key"], row["other_key"]))
    schema = pa.schema(
        [
            *((name, pa.string()) for name in ("key", "caption", "other_key", "other_caption")),
            *((name, pa.int64()) for name in ("splits", "bits")),
            ("colour", pa.float64()),
        ]
    )
    return pa.Table.from_pylist(rows, schema)
