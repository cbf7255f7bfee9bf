"""Evaluation images among training images: the last look before a model is released.

Contracts look at each table by itself; here a model's own training tables are held against what it was measured on.
"""

from collections.abc import Collection, Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from blip_pipelines.data import storage
from blip_pipelines.data.storage import MANIFEST

SHOWN_CHARACTERS = 12  # of a key


def held_out(pairs: Path) -> set[str]:
    """Keys of the images of a caption table that are not for training."""
    keys: set[str] = set()
    for entry in storage.read_json(pairs / MANIFEST)["shards"]:
        rows = pq.read_table(pairs / entry["name"], columns=["key", "split"])
        keys.update(rows.filter(pc.not_equal(rows["split"], "train"))["key"].to_pylist())
    return keys


def leaked(evaluated: Collection[str], tables: Iterable[Path]) -> list[str]:
    """Each evaluated image that a table has among its training rows, described by key, member and table.

    Args:
        evaluated: keys of the images that a model was measured on.
        tables: the caption tables that the model, or one that it started from, was trained on.
    """
    found: dict[str, str] = {}
    wanted = pa.array(sorted(evaluated), pa.string())
    for folder in tables:
        for entry in storage.read_json(folder / MANIFEST)["shards"]:
            rows = pq.read_table(folder / entry["name"], columns=["key", "member", "split"])
            is_leak = pc.and_(pc.equal(rows["split"], "train"), pc.is_in(rows["key"], value_set=wanted))
            for row in rows.filter(is_leak).to_pylist():
                found.setdefault(row["key"], f"{row['key'][:SHOWN_CHARACTERS]} ({row['member']} in {folder.name})")
    return list(found.values())
