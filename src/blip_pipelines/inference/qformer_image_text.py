"""A Q-Former as retrieval and captioning ask it: BLIP-2 after stage 1 (3.2).

Shapes: I images, B of them, N image tokens, D width, Q queries, E projection.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from blip_pipelines.inference import scoring
from blip_pipelines.inference.image_text import ImageText
from blip_pipelines.models.frozen_tower import FrozenTower
from blip_pipelines.models.keys_values import KeysValues
from blip_pipelines.models.qformer import QFormer


class QFormerImageText(ImageText):
    """Each query against [CLS]; captions by the decoder that ITG trains.

    Args:
        tower: None where images come as its outputs, cached.
    """

    def __init__(self, former: QFormer, tower: FrozenTower | None):
        super().__init__(former)
        self.former, self.tower = former, tower

    @torch.no_grad()
    def encode_images(self, pixels: Iterable[Tensor]) -> Tensor:
        tower = self.tower
        parts = list(pixels) if tower is None else [tower(batch.to(self.device)).cpu() for batch in pixels]
        with torch.autocast("cpu", enabled=False):  # which knows no float16
            return torch.cat(parts)

    @torch.no_grad()
    def image_features(self, image_IND: Tensor) -> Tensor:
        features = []
        for block_BND in image_IND.split(scoring.BATCH_IMAGES):
            queries_BQD, _ = self.former.encode_queries(self.former.project_image(block_BND.to(self.device)))
            features.append(self.former.image_features(queries_BQD).cpu())
        return torch.cat(features)

    def seen(self, image_BND: Tensor) -> KeysValues:
        return self.former.encode_queries(self.former.project_image(image_BND), cache=True)[1]
