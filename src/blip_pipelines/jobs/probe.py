"""A look at a model while it trains: retrieval by ITC on rows that training does not see."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from blip_pipelines.data.pairs import Pairs
from blip_pipelines.data.tokens import CaptionTokenizer
from blip_pipelines.evaluation.retrieval import Gallery, retrieve
from blip_pipelines.inference import scoring
from blip_pipelines.inference.image_text import ImageText, similarities
from blip_pipelines.jobs.training_data import DataSettings, Images
from blip_pipelines.models.precision import is_half


@dataclass(frozen=True)
class ProbeConfig:
    """Retrieval by ITC on rows that training does not see, while it goes on: a look, not a result.

    Args:
        split: of the rows; each subset of it is measured apart.
        rows: of a subset, the first ones.
    """

    split: str = "val"
    rows: int = 500


class Probe:
    """What `train` calls on the first rank: recalls at 5 by ITC on each held-out subset."""

    def __init__(
        self,
        config: ProbeConfig,
        image_text: ImageText,
        pairs: Pairs,
        images: Images,
        tokenizer: CaptionTokenizer,
        settings: DataSettings,
        device: torch.device,
    ):
        self.image_text, self.device, self.precision = image_text, device, settings.training.precision
        self.scenes: dict[str, _Scene] = {}
        held_out = pairs.select(split=config.split)
        for subset in sorted({*held_out.column("subset")} - {None}):
            rows = held_out.select(subset=subset)
            rows = rows.select(rows=np.arange(min(len(rows), config.rows)))
            gallery = Gallery.of(rows.image_ids, rows.text_ids)
            texts = tokenizer(rows.captions(np.arange(len(rows))), settings.max_tokens)
            pixels = images.reader(rows)(gallery.images)
            self.scenes[subset] = _Scene(gallery, *map(torch.from_numpy, (pixels, *texts)))

    def __call__(self, step: int) -> dict[str, float]:
        found = {}
        for subset, scene in self.scenes.items():
            with torch.autocast(self.device.type, torch.bfloat16, enabled=is_half(self.precision)):
                image_IND = self.image_text.encode_images(scene.pixels.split(scoring.BATCH_IMAGES))
                image_IQE = self.image_text.image_features(image_IND)
                text_RE = self.image_text.text_features(scene.token_ids, scene.token_mask)
            recalls = retrieve(similarities(image_IQE, text_RE), scene.gallery, candidates=5).recalls()
            for way in ("i2t", "t2i"):
                found[f"val/{way}_r5/{subset}"] = recalls[f"{way}_r5"]
        return found


class _Scene(NamedTuple):
    """Held-out rows, ready to be encoded."""

    gallery: Gallery
    pixels: Tensor
    token_ids: Tensor
    token_mask: Tensor
