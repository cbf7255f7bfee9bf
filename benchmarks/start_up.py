"""How a training starts on ten million caption rows: from nothing to its first batch, short of the pictures."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.loader import make_tokenizer
from benchmarks.measure import circumstances, in_process, write
from benchmarks.scale import ROWS, SHARD, write_data_set
from blip_pipelines.data.loader import Loader
from blip_pipelines.data.order import Order
from blip_pipelines.data.pairs import Pairs

BATCH, STARTS = 1024, 3


class _Unread:
    """Looks up where images lie, as what decodes them does, and reads none."""

    def __init__(self, pairs: Pairs):
        self.pairs = pairs

    def __call__(self, rows: np.ndarray, step: int = 0, first_row: int = 0) -> np.ndarray:
        return self.pairs.places(rows).astype(np.int32)


def start(folder: Path) -> None:
    pairs = Pairs.open(folder / "pairs", folder / "images").select(split="train", origins=["web"])
    order = Order(pairs.shard_rows, seed=0, window_shards=8)
    loader = Loader(pairs, order, _Unread(pairs), make_tokenizer(), 30, BATCH)
    (batch,) = next(iter(loader))
    assert len(batch.token_ids) == BATCH and len(batch.image_ids.unique()) == BATCH


def main(command: str, rounds: int) -> str:
    found: dict[str, Any] = {"circumstances": circumstances(command)}
    for shard_rows in (SHARD, 10_000):
        with tempfile.TemporaryDirectory() as temporary:
            write_data_set(Path(temporary), ROWS, shard_rows)
            starts = [in_process(start, Path(temporary)) for _ in range(min(rounds, STARTS))]
        found[str(shard_rows)] = min(starts, key=lambda each: each["cpu_seconds"])
    rows = [
        [
            f"{int(shard_rows):,}",
            *(f"{each[name]:.1f}" for name in ("seconds", "cpu_seconds")),
            *(f"{value:,.0f}" for value in (each["peak_mb"], each["peak_mb"] - each["before_mb"])),
        ]
        for shard_rows, each in found.items()
        if shard_rows != "circumstances"
    ]
    reading = (
        f"A table of {ROWS:,} caption rows, opened by a process of its own as one rank of a training does: every shard "
        "verified against its hash, the training rows chosen, their order begun, and the tokens, ids and places of "
        f"the first batch of {BATCH:,} read, short of decoding; the quickest of a few starts. {SHARD:,} rows a shard "
        "is what ingestion writes, 10,000 is what img2dataset does. Memory is the peak of the process, torch and all, "
        "and what of that came after its imports."
    )
    return write(
        "start_up", found, ["rows a shard", "seconds", "CPU seconds", "peak MB", "of that, new"], rows, reading
    )
