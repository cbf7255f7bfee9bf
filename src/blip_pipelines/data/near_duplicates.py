"""Pictures that look alike, found among millions without comparing all with all, and confirmed on colour.

Difference hashes that differ in few bits agree in two of six bands, so only pictures of one bucket are compared, and of
a bucket only neighbours in brightness. A picture costs memory for its hash and the mean colours of its quadrants, 36
bytes; the 8 x 8 colours that decide are read again for candidates alone: two pictures whose outlines agree may be a red
and a blue heart.
"""

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

_BANDS = 6  # hashes that differ in at most 4 bits agree in 2 of 6 bands
NEAR_BITS = _BANDS - 2
_NEAR_COLOUR = 2.0  # mean absolute difference of 8-bit channels
_ROUNDING = 1.0  # of the colours of quadrants, half a step for each of two pictures
_NEIGHBOURS = 32  # compared in a bucket: bounds the work where thousands share a hash, at the cost of some pairs there
_AT_ONCE = 65_536  # pairs whose colours are compared in one go
_MOST_PAIRS = 2_000_000  # kept of all candidates, the closest in colour


class Alike(NamedTuple):
    """Pairs of images: ids (pairs, 2) uint64, and of each how many bits of the hash and how much colour differ."""

    ids: np.ndarray
    bits: np.ndarray
    colour: np.ndarray


class _Images(NamedTuple):
    ids: np.ndarray  # (images,) uint64, ascending
    hashes: np.ndarray  # (images,) uint64
    quadrants: np.ndarray  # (images, 12) uint8
    brightness: np.ndarray  # (images,) float32


def find_alike(indexes: Sequence[Path], images: np.ndarray) -> Alike:
    """Every pair of images whose hashes and colours both agree, in ascending order of ids.

    Args:
        indexes: of shards, with key, dhash and thumbnail (`quality.INDEX_SCHEMA`).
        images: (images,) uint64 ids (`id_of`) of the images to look at, ascending.
    """
    found = _read(indexes, images)
    pairs = candidates(found.hashes, found.quadrants, found.brightness)
    ids = found.ids[pairs]
    thumbnails_of, thumbnails = _thumbnails(indexes, np.unique(ids))
    colour = _colour_difference(thumbnails, np.searchsorted(thumbnails_of, ids))
    near = colour <= _NEAR_COLOUR
    bits = np.bitwise_count(found.hashes[pairs[:, 0]] ^ found.hashes[pairs[:, 1]])
    return Alike(ids[near], bits[near].astype(np.int64), colour[near].round(3))


def id_of(values: pa.ChunkedArray) -> np.ndarray:
    """(values,) uint64: a hash of each text, the same in every run; 0 for null."""
    import pandas as pd

    texts = np.array(values.to_pylist(), dtype=object)
    is_null = values.is_null().to_numpy()
    texts[is_null] = ""
    ids = pd.util.hash_array(texts, categorize=False)
    ids[is_null] = 0
    return ids


def candidates(hashes: np.ndarray, quadrants: np.ndarray, brightness: np.ndarray) -> np.ndarray:
    """(pairs, 2) int64, ascending: images whose hashes are near and whose quadrants do not rule it out.

    Args:
        hashes: (images,) uint64.
        quadrants: (images, 12) uint8 mean colours.
        brightness: (images,) mean of all channels.
    """
    if len(hashes) < 2:
        return np.empty((0, 2), np.int64)
    found: list[np.ndarray] = []
    for bands in combinations(range(_BANDS), 2):
        # A band takes every sixth bit, so that a white margin, a row of zeros, thins all of them and fills none.
        places = [place for place in range(64) if place % _BANDS in bands]
        buckets = hashes & np.uint64(sum(1 << place for place in places))
        order = np.lexsort((brightness, buckets))
        buckets = buckets[order]
        same = np.arange(len(order))
        for step in range(1, _NEIGHBOURS + 1):
            same = same[: np.searchsorted(same, len(order) - step)]
            same = same[buckets[same + step] == buckets[same]]  # of one bucket, with all between them
            if len(same) == 0:
                break
            one, other = order[same], order[same + step]
            near = _bits(hashes, one, other) <= NEAR_BITS
            pairs = np.sort(np.stack([one[near], other[near]], axis=1), axis=1)
            found.append(pairs[_colour_difference(quadrants, pairs) <= _NEAR_COLOUR + _ROUNDING])
        found = [_fewest(np.unique(np.concatenate(found), axis=0), quadrants)] if found else []
    return found[0] if found else np.empty((0, 2), np.int64)


def quadrants_of(thumbnails: np.ndarray) -> np.ndarray:
    """(images, 12) uint8: mean colours of the quadrants of (images, 192) 8 x 8 RGB thumbnails."""
    blocks = thumbnails.reshape(-1, 2, 4, 2, 4, 3)
    return np.rint(blocks.mean(axis=(2, 4))).astype(np.uint8).reshape(-1, 12)


def _read(indexes: Sequence[Path], images: np.ndarray) -> _Images:
    count = len(images)
    hashes, quadrants = np.zeros(count, np.uint64), np.zeros((count, 12), np.uint8)
    brightness, is_known = np.zeros(count, np.float32), np.zeros(count, bool)
    for path in indexes if count else ():
        table = pq.read_table(path, columns=["key", "dhash", "thumbnail"])
        table = table.filter(pc.is_valid(table["key"]))
        ids = id_of(table["key"])
        at = np.searchsorted(images, ids).clip(max=count - 1)
        mine = np.flatnonzero((images[at] == ids) & ~is_known[at])  # the first of an image, wherever it is again
        at, first = np.unique(at[mine], return_index=True)
        mine = mine[first]
        thumbnails = _pixels(table["thumbnail"].take(pa.array(mine)))
        hashes[at], quadrants[at] = table["dhash"].to_numpy()[mine], quadrants_of(thumbnails)
        brightness[at], is_known[at] = thumbnails.mean(axis=1, dtype=np.float32) if len(mine) else 0, True
    whole = images, hashes, quadrants, brightness
    return _Images(*(whole if is_known.all() else (column[is_known] for column in whole)))


def _thumbnails(indexes: Sequence[Path], ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(images,) ids, ascending, and (images, 192) thumbnails of some images."""
    found_ids, found = [np.empty(0, np.uint64)], [np.empty((0, 192), np.uint8)]
    for path in indexes if len(ids) else ():
        table = pq.read_table(path, columns=["key", "thumbnail"])
        table = table.filter(pc.is_valid(table["key"]))
        here = id_of(table["key"])
        wanted = np.isin(here, ids)
        found_ids.append(here[wanted])
        found.append(_pixels(table["thumbnail"].filter(pa.array(wanted))))
    unique, first = np.unique(np.concatenate(found_ids), return_index=True)
    return unique, np.concatenate(found)[first]


def _pixels(thumbnails: pa.ChunkedArray) -> np.ndarray:
    return np.frombuffer(b"".join(thumbnails.to_pylist()), np.uint8).reshape(-1, 192)


def _bits(hashes: np.ndarray, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return np.bitwise_count(hashes[one] ^ hashes[other])


def _fewest(pairs: np.ndarray, quadrants: np.ndarray) -> np.ndarray:
    if len(pairs) <= _MOST_PAIRS:
        return pairs
    closest = np.argsort(_colour_difference(quadrants, pairs), kind="stable")[:_MOST_PAIRS]
    return pairs[np.sort(closest)]


def _colour_difference(colours: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """(pairs,) mean absolute difference of the 8-bit channels of two images."""
    difference = np.empty(len(pairs))
    for start in range(0, len(pairs), _AT_ONCE):
        one, other = pairs[start : start + _AT_ONCE].T
        difference[start : start + _AT_ONCE] = np.abs(colours[one].astype(np.int16) - colours[other]).mean(axis=1)
    return difference
