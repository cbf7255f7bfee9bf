"""The features of a frozen stem for every stored image, computed once and shared by all jobs that read them."""

import time
from pathlib import Path

import numpy as np
import torch

from blip_pipelines.data import shards
from blip_pipelines.data.features import FeatureCache, fill
from blip_pipelines.data.transforms import ImageConfig
from blip_pipelines.models.stem import Stem
from blip_pipelines.training.distributed import World
from blip_pipelines.training.progress import Progress

CACHE = Path(".cache/features")


def ensure_features(images: Path, config: ImageConfig, stem: Stem, work: Path, world: World) -> FeatureCache:
    """The cache beside the folder of all work, filled by all ranks together as far as it is not.

    Args:
        images: folder of tar shards.
        config: size and number of the views.
        work: folder of one piece of work (`<root>/<fingerprint>`).

    Raises:
        StorageError: the disk is full, or a shard is damaged.
    """
    root = work.parent.parent / CACHE
    stem = stem.to(world.device)
    encode = _Encode(stem, sum(shard.images for shard in shards.read_manifest(images)) * config.views, world)
    fill(root, images, config, stem.hash, encode, part=(world.rank, world.ranks))
    world.barrier()
    if world.is_first:
        FeatureCache.create(root, images, config, stem.hash, encode)  # finds the files and writes the index
    world.barrier()
    return FeatureCache.create(root, images, config, stem.hash, encode)


class _Encode:
    """(B, 3, S, S) uint8 -> (B, N, P) float32, with a progress line."""

    def __init__(self, stem: Stem, images: int, world: World):
        self.stem, self.images, self.world = stem, images // world.ranks, world
        self.done, self.started, self.progress = 0, time.perf_counter(), Progress()

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        features = self.stem(torch.from_numpy(pixels).to(self.world.device)).cpu().numpy()
        self.done += len(pixels)
        if self.world.is_first:
            rate = self.done / (time.perf_counter() - self.started)
            self.progress.show(f"frozen features {self.done}/{self.images}  {rate:.0f} images/s")
        return features
