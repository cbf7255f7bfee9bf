"""The captioner of CapFilt: synthetic captions for every web image of the training split (BLIP 3.3).

Images go in fixed batches inside a shard, in table order. An image is encoded and its keys and values projected once
for all its captions; a sampled caption is drawn by the image's key, so it is the same wherever the image lies.
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from blip_pipelines.config import ConfigError, read, speed_only
from blip_pipelines.data import storage
from blip_pipelines.data.composition import fill
from blip_pipelines.data.pairs import Pairs
from blip_pipelines.inference.generation import GenerationConfig, generate
from blip_pipelines.jobs.by_shard import images_in_batches, make_by_shard
from blip_pipelines.jobs.exported import RankMed
from blip_pipelines.models.precision import Precision
from blip_pipelines.training.distributed import World

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Config:
    """How captions are written.

    Args:
        generation: BLIP samples from the nucleus of 0.9, which gave better corpora than beam search (its table 2).
        captions_per_image: drawn anew each; more than one only by nucleus sampling.
        prompt: that the captioner was trained with; it is no part of the captions.
        batch_images: decoded together; part of the arithmetic, as sums round differently in other batches.
        round: of CapFilt, for the rows.
        workers: processes that read images ahead.
    """

    generation: GenerationConfig = field(default_factory=lambda: GenerationConfig("nucleus"))
    captions_per_image: int = 1
    prompt: str = ""
    batch_images: int = 64
    seed: int = 0
    precision: Precision = "bfloat16"
    round: int = 1
    workers: int = speed_only(0)

    def __post_init__(self) -> None:
        if self.captions_per_image < 1 or self.batch_images < 1:
            raise ConfigError("write.captions_per_image and write.batch_images must be at least 1")
        if self.captions_per_image > 1 and self.generation.strategy != "nucleus":
            raise ConfigError(
                f"write.captions_per_image: {self.captions_per_image} captions by {self.generation.strategy} would all "
                "be the same; set write.generation.strategy to nucleus"
            )


def run(config: dict[str, Any], inputs: dict[str, Path], work: Path, world: World) -> dict[str, Any]:
    """A caption table of synthetic rows, a shard for each of `pairs`. Facts: `images`, `captions`, `written_by`.

    Args:
        inputs: `captioner`, the folder of `export_med`; `pairs` and `images`.
    """
    settings = read(Config, config, "capfilt.write")
    captioner = RankMed(inputs["captioner"], inputs["images"], settings.precision, work, world)
    pairs = Pairs.open(inputs["pairs"], inputs["images"])
    written_by = world.broadcast(storage.content_hash(inputs["captioner"]) if world.is_first else None)

    def captions_of(shard: int) -> pa.Table:
        web = pairs.shard(shard).select(split="train", origins=["web"])
        images = web.select(rows=web.unique_images())
        return synthetic_rows(images.table(), write_captions(captioner, images, settings), written_by, settings.round)

    rows = make_by_shard(captions_of, pairs, work, world, {"written_by": written_by, "round": settings.round})
    if not rows and world.is_first:
        log.warning("capfilt: no training caption is of origin web, so there is no image to caption")
    return {"images": rows // settings.captions_per_image, "captions": rows, "written_by": written_by}


@torch.inference_mode()
def write_captions(captioner: RankMed, images: Pairs, settings: Config) -> list[list[str]]:
    """For each row of a view, whose images are distinct, its synthetic captions."""
    draw_ids = torch.tensor([int(key[:15], 16) for key in images.keys], dtype=torch.int64)
    written: list[list[str]] = []
    read_images = captioner.reader(images)
    for rows, pixels in images_in_batches(read_images, len(images), settings.batch_images, settings.workers):
        with captioner.autocast():
            seen = captioner.med.project_image(captioner.med.encode_image(pixels.to(captioner.device)))
            samples = [
                generate(
                    captioner.med,
                    seen,
                    captioner.tokenizer,
                    settings.generation,
                    prompt=settings.prompt,
                    seed=settings.seed,
                    draw_ids=draw_ids[rows],
                    sample=sample,
                ).texts
                for sample in range(settings.captions_per_image)
            ]
        written += [list(texts) for texts in zip(*samples, strict=True)]
    return written


def synthetic_rows(images: pa.Table, captions: list[list[str]], written_by: str, round_number: int) -> pa.Table:
    """Rows of origin synthetic, the captions of an image together, in the order of `images`."""
    per_image = np.repeat(np.arange(len(images)), [len(texts) for texts in captions])
    nothing = [None] * len(per_image)
    return fill(
        images.take(pa.array(per_image)),
        caption=[text for texts in captions for text in texts],
        origin=["synthetic"] * len(per_image),
        language=nothing,
        round=[round_number] * len(per_image),
        written_by=[written_by] * len(per_image),
        judged_by=nothing,
        match_probability=nothing,
        kept=nothing,
        reason=nothing,
    )
