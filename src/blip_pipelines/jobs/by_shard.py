"""Work that makes one table of each shard of a caption table: shared over ranks, kept as it is done.

A shard's table must be a function of the shard alone. Ranks take whole shards, so any number of them makes the same
rows; a finished shard is a file under `work/checkpoints`, and a job that was killed goes on with the missing ones, on
as many ranks as it then has. What is lost is what the ranks had in hand.
"""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from blip_pipelines.data import storage
from blip_pipelines.data.loader import ReadImages
from blip_pipelines.data.pairs import Pairs, write_pairs
from blip_pipelines.jobs.launch import CHECKPOINTS, SPEED
from blip_pipelines.jobs.receipt import OUTPUTS
from blip_pipelines.training.distributed import World
from blip_pipelines.training.meter import peak_memory_bytes
from blip_pipelines.training.progress import Progress

LOOK_SECONDS = 0.2  # between two looks at whether the other ranks have finished


def make_by_shard(
    make: Callable[[int], pa.Table], pairs: Pairs, work: Path, world: World, counts: dict[str, Any]
) -> int:
    """Make the table of every shard; the first rank then writes them as a caption table to the job's outputs.

    Args:
        make: `PAIR_SCHEMA` rows of the shard with this number.
        counts: for the manifest.

    Returns:
        Rows of all shards.
    """
    done = work / CHECKPOINTS
    files = [done / entry["name"] for entry in pairs.manifest["shards"]]
    todo = world.broadcast([number for number, file in enumerate(files) if not file.exists()])
    mine, rows, progress, started = todo[world.rank :: world.ranks], 0, Progress(), time.perf_counter()
    for at, number in enumerate(mine, 1):
        table = make(number)
        with storage.writing(files[number]) as temporary:
            pq.write_table(table, temporary, compression="zstd")
        rows += len(table)
        if world.is_first:
            seconds = time.perf_counter() - started
            left = seconds / at * (len(mine) - at)
            line = f"shard {at}/{len(mine)} of this rank  {rows / seconds:.0f} captions/s"
            progress.show(f"{line}  {int(left) // 60}:{int(left) % 60:02d} left", last=at == len(mine))
    _wait(files)
    seconds = time.perf_counter() - started
    if world.is_first:
        write_pairs(work / OUTPUTS, (pq.read_table(file) for file in files), pairs.manifest["images"], counts)
        made = sum(pq.read_metadata(files[number]).num_rows for number in todo)
        speed = {"samples_per_second": made / seconds, "peak_memory_bytes": float(peak_memory_bytes())}
        storage.write_json(work / SPEED, speed)
    return sum(pq.read_metadata(file).num_rows for file in files)


def images_in_batches(
    read_images: ReadImages, images: int, batch_images: int, workers: int
) -> Iterator[tuple[np.ndarray, Tensor]]:
    """Rows 0 to `images` of a view in batches, each with its images, which `workers` processes read ahead of their use.

    Args:
        workers: 0 reads them here, when asked.
    """
    rows = np.arange(images)
    batches = [rows[start : start + batch_images] for start in range(0, images, batch_images)]
    ahead: dict[str, Any] = {"num_workers": workers, "multiprocessing_context": "fork"} if workers else {}
    loader: DataLoader[np.ndarray] = DataLoader(
        batches,  # type: ignore[arg-type]
        batch_size=None,
        collate_fn=lambda batch: torch.from_numpy(read_images(np.asarray(batch))),
        generator=torch.Generator(),
        pin_memory=torch.cuda.is_available(),
        **ahead,
    )
    yield from zip(batches, loader, strict=True)


def _wait(files: list[Path]) -> None:
    """Until all are there. A barrier would give up on ranks whose last shards take longer than its timeout."""
    missing = list(files)
    while missing := [file for file in missing if not file.exists()]:
        time.sleep(LOOK_SECONDS)
