"""The outputs of a frozen image encoder for every stored image, computed once and shared by all jobs that read them."""

import logging
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from blip_pipelines.data import shards
from blip_pipelines.data.features import INDEX, FeatureCache, expected_bytes, fill, place
from blip_pipelines.data.storage import StorageError, read_json, write_json
from blip_pipelines.data.transforms import ImageConfig
from blip_pipelines.training.distributed import World
from blip_pipelines.training.progress import Progress

CACHE = Path(".cache/features")
COST = "cost.json"  # what a view of an image cost where it was computed; no part of the cache's content

log = logging.getLogger(__name__)


class FrozenEncoder(Protocol):
    """A frozen `Stem` or a `FrozenTower`: (B, 3, S, S) uint8 -> (B, N, P), the same for the same hash."""

    hash: str

    def __call__(self, pixels: Tensor) -> Tensor: ...

    def to(self, device: torch.device) -> Any: ...


@dataclass(frozen=True)
class Features:
    """A cache, and what it took to have it.

    Args:
        computed: views of images that no earlier run had left, over all ranks.
        seconds: of wall time, here and now.
        seconds_per_view: of one encoder, its stem included, as measured where it ran; None where nobody noted it.
    """

    cache: FeatureCache
    computed: int
    seconds: float
    seconds_per_view: float | None

    def numbers(self, reads: int) -> dict[str, float]:
        """Hit rate, and the seconds of the encoder's work that the cache saved (net; negative: it cost more).

        Args:
            reads: views that were asked for, over all ranks.
        """
        found = {"features_hit_rate": max(0.0, 1 - self.computed / reads), "features_seconds": self.seconds}
        if self.seconds_per_view is not None:
            found["features_seconds_saved"] = reads * self.seconds_per_view - self.seconds
        return found


def fill_features(images: Path, config: ImageConfig, encoder: FrozenEncoder, work: Path, world: World) -> Features:
    """The cache beside the folder of all work, filled by all ranks together as far as it is not, verified if it was.

    A tower behind a stem is filled from the cache of the stem's features, which the training of its MED has left.

    Args:
        images: folder of tar shards.
        config: size and number of the views.
        work: folder of one piece of work (`<root>/<fingerprint>`).

    Raises:
        StorageError: there is no room on the disk, or a shard or a file of the cache is damaged.
    """
    root, started = work.parent.parent / CACHE, time.perf_counter()
    folder = place(root, images, config, encoder.hash)
    encoder = encoder.to(world.device)
    found, below = world.broadcast((folder / INDEX).exists()), None
    if not found and (stem := getattr(encoder, "stem", None)) is not None:
        below = fill_features(images, config, stem, work, world)
    cache_below = below.cache if below else None
    encode = _Encode(encoder, sum(shard.images for shard in shards.read_manifest(images)) * config.views, world)
    if not found and world.is_first:
        _announce(folder, images, config, encode)
    fill(root, images, config, encoder.hash, encode, part=(world.rank, world.ranks), below=cache_below)
    world.barrier()
    if world.is_first:
        # Finds the files and writes the index.
        FeatureCache.create(root, images, config, encoder.hash, encode, below=cache_below)
        if encode.done:
            own, before = encode.seconds / encode.done, (below.seconds_per_view or 0.0) if below else 0.0
            write_json(folder / COST, {"seconds_per_view": own + before})
    world.barrier()
    cache = FeatureCache.create(root, images, config, encoder.hash, encode)
    if found:
        cache.verify(part=(world.rank, world.ranks))
        world.barrier()
    computed = int(world.sum(torch.tensor(float(encode.done), device=world.device)))
    cost = read_json(folder / COST)["seconds_per_view"] if (folder / COST).exists() else None
    return Features(cache, computed, time.perf_counter() - started, cost)


def _announce(folder: Path, images: Path, config: ImageConfig, encode: "_Encode") -> None:
    """Say what the cache will take, before it is taken."""
    tokens, width = encode.shape(config.size)
    needed = expected_bytes(images, config, tokens, width)
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    views = f"{encode.views:,} views of images" if config.views > 1 else f"{encode.views:,} images"
    log.info("frozen features: %s x %d x %d take %s in %s", views, tokens, width, _size(needed), folder)
    if needed > free + sum(file.stat().st_size for file in folder.glob("*.npy")):
        raise StorageError(
            f"{folder}: the features of the frozen encoder need {_size(needed)}, free are {_size(free)}; make room, or "
            "let the encoder run in every step where the job has that choice (features: live)"
        )


def _size(count: int) -> str:
    for unit, size in ("GB", 1e9), ("MB", 1e6):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1e3:.1f} kB"


class _Encode:
    """(B, 3, S, S) uint8 -> (B, N, P), with a progress line."""

    def __init__(self, encoder: FrozenEncoder, views: int, world: World):
        self.encoder, self.views, self.world = encoder, views, world
        self.done, self.started, self.progress = 0, time.perf_counter(), Progress()
        self.seconds = 0.0  # in the encoder and in what prepares its pixels

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        features = self.encoder(torch.from_numpy(pixels).to(self.world.device)).cpu().numpy()
        self.done, self.seconds = self.done + len(pixels), time.perf_counter() - self.started
        if self.world.is_first:
            rate, own = self.done / self.seconds, self.views // self.world.ranks
            self.progress.show(f"frozen features {self.done}/{own}  {rate:.0f} images/s")
        return features

    def shape(self, size: int) -> tuple[int, int]:
        """(N, P) of an image."""
        tokens, width = self.encoder(torch.zeros(1, 3, size, size, dtype=torch.uint8, device=self.world.device)).shape[
            1:
        ]
        return tokens, width
