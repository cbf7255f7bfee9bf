"""Keys and texts as 64-bit numbers, by which rows of the same image and of the same words are known."""

from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_KEY_LENGTH = 64


def hash_keys(keys: pa.ChunkedArray) -> np.ndarray:
    """(rows,) uint64: the first half of a quarter of each sha256."""
    parts = [np.empty(0, np.uint64)]
    for chunk in keys.cast(pa.large_string()).chunks:
        if pc.all(pc.equal(pc.binary_length(chunk), _KEY_LENGTH)).as_py() is False:  # no content hash, as in a test
            parts.append(hash_texts(pa.chunked_array([chunk])))
            continue
        start = np.frombuffer(chunk.buffers()[1], np.int64)[chunk.offset] if len(chunk) else 0
        digits = np.frombuffer(chunk.buffers()[2] or b"", np.uint8)[start:][: len(chunk) * _KEY_LENGTH]
        digits = digits.reshape(-1, _KEY_LENGTH)[:, :16]
        nibbles = (digits & 15) + 9 * (digits >> 6)
        parts.append((nibbles[:, ::2] << 4 | nibbles[:, 1::2]).astype(np.uint8).view(">u8")[:, 0].astype(np.uint64))
    return np.concatenate(parts)


def hash_texts(texts: pa.ChunkedArray) -> np.ndarray:
    """(rows,) uint64: of each text in lower case with single spaces."""
    import pandas as pd

    parts = [np.empty(0, np.uint64)]
    for chunk in texts.cast(pa.large_string()).chunks:
        if _is_plain(chunk):
            plain = pc.ascii_lower(chunk)
        else:
            words = pc.utf8_split_whitespace(pc.utf8_trim_whitespace(pc.utf8_lower(chunk)))
            plain = pc.binary_join(words, pa.scalar(" ", pa.large_string()))
        parts.append(pd.util.hash_array(plain.to_numpy(zero_copy_only=False), categorize=False))
    return np.concatenate(parts)


def _is_plain(texts: pa.LargeStringArray) -> bool:
    """Whether all are ASCII with single spaces between words, as captions that ingestion checked mostly are."""
    if not len(texts):
        return True
    offsets = np.frombuffer(texts.buffers()[1], np.int64)[texts.offset : texts.offset + len(texts) + 1]
    characters = np.frombuffer(texts.buffers()[2] or b"", np.uint8)[offsets[0] : offsets[-1]]
    is_space = np.concatenate([characters == 32, [True]])  # whatever follows the last text
    if (characters > 127).any() or (characters < 32).any() or (is_space[1:-1] & is_space[:-2]).any():
        return False
    starts, ends = offsets[:-1] - offsets[0], offsets[1:] - offsets[0]
    return not (is_space[starts[ends > starts]].any() or is_space[ends[ends > starts] - 1].any())


def dense_ids(hashes: Iterable[np.ndarray]) -> np.ndarray:
    """Hashes of 64 bits as numbers from 0 on, in the order in which they first appear.

    Two of ten million texts are taken for one with a chance of three in a million, at the price of one negative less.
    """
    whole = np.concatenate([np.empty(0, np.uint64), *hashes])
    order = np.argsort(whole, kind="stable")
    is_first = np.ones(len(whole), bool)
    is_first[1:] = whole[order[1:]] != whole[order[:-1]]
    del whole
    appeared = order[is_first]  # where each value appears first
    number = np.empty(len(appeared), np.int32)
    number[np.argsort(appeared)] = np.arange(len(appeared), dtype=np.int32)
    ids = np.empty(len(order), np.int32)
    ids[order] = np.repeat(number, np.diff(np.flatnonzero(np.append(is_first, True))))
    return ids
