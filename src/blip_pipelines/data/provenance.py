"""Where a caption comes from: every row of a caption table that has this text or is of this image."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from blip_pipelines.data import storage
from blip_pipelines.data.storage import MANIFEST

LEAST_CHARACTERS = 8  # of the beginning of an image's key; a shorter word is a caption


def rows_about(folder: Path, asked: str) -> Iterator[dict[str, Any]]:
    """Rows of a caption table, in its order, with all their columns.

    Args:
        asked: the key of an image, its beginning, or a caption; case and white space do not matter.
    """
    words = " ".join(asked.lower().split())
    is_key = len(asked) >= LEAST_CHARACTERS and all(letter in "0123456789abcdef" for letter in asked.lower())
    for entry in storage.read_json(folder / MANIFEST)["shards"]:
        file = pq.ParquetFile(folder / entry["name"])
        if is_key:
            matches = pc.starts_with(file.read(["key"])["key"], asked.lower())
        else:
            captions = pc.utf8_split_whitespace(
                pc.utf8_trim_whitespace(pc.utf8_lower(file.read(["caption"])["caption"]))
            )
            matches = pc.equal(pc.binary_join(captions, " "), words)
        if pc.any(matches).as_py():
            table: pa.Table = file.read()
            yield from table.filter(matches).to_pylist()
