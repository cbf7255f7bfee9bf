"""Pictures that question data bring with them, in tar shards of the table's own."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from blip_pipelines.data import shards
from blip_pipelines.data.images import ImageLimits
from blip_pipelines.data.shard_jobs import ShardJob, Wanted, write_shards

log = logging.getLogger(__name__)

_SHOWN = 3  # refused pictures in a message
_FOUND = ("key", "shard", "offset", "size", "width", "height")

Place = dict[str, Any]  # of a stored image: the columns key, member, shard, offset, size, width, height


class Stored(NamedTuple):
    """Where each picture lies, by the name under which questions know it; None of one that was refused."""

    places: Mapping[str, Place | None]
    images_hash: str
    refused: dict[str, int]  # by reason


def wanted_file(path: Path) -> Wanted:
    """A picture in a file, known by its size and date."""
    try:
        stat = path.stat()
        return Wanted(path.read_bytes, f"{path} {stat.st_size} {stat.st_mtime_ns}")
    except OSError:  # whoever reads it meets that again, and refuses it by name
        return Wanted(path.read_bytes, f"{path} unreadable")


def store(
    wanted: Mapping[str, Wanted], folder: Path, shard_images: int, limits: ImageLimits, workers: int = 0
) -> Stored:
    """Write pictures into `{shard:05d}.tar` in the order given; bad ones are refused by name.

    Shards that are there are kept where the plan for them is the same.

    Args:
        wanted: by name.
        workers: processes; 0 for one a core.
    """
    folder.mkdir(parents=True, exist_ok=True)
    every = list(wanted.values())
    jobs = [
        ShardJob(number, tuple(every[start : start + shard_images]), folder, limits)
        for number, start in enumerate(range(0, len(every), shard_images))
    ]
    written = write_shards(jobs, workers)
    made = [shard for shard, _ in written if shard is not None]
    images_hash = shards.write_manifest(folder, made)
    known = {job.index_path.name for job in jobs} | {shard.name for shard in made}
    for path in folder.iterdir():  # of a larger set that lay here before
        if path.suffix in (".tar", ".parquet") and path.name not in known:
            path.unlink()
    rows = (row for _, index in written for row in index.to_pylist())
    places: dict[str, Place | None] = {}
    refused: dict[str, list[str]] = {}
    for name, row in zip(wanted, rows, strict=True):
        places[name] = {"member": name, **{column: row[column] for column in _FOUND}} if row["key"] else None
        if row["key"] is None:
            refused.setdefault(row["reason"], []).append(f"{name}: {row['error']}")
    for reason, errors in refused.items():
        shown = "; ".join(errors[:_SHOWN])
        log.warning("%d pictures refused as %s, with all questions about them: %s", len(errors), reason, shown)
    return Stored(places, images_hash, {reason: len(errors) for reason, errors in sorted(refused.items())})
