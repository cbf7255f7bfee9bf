"""A Q-Former as retrieval and captioning ask it: BLIP-2 after stage 1 (3.2).

Shapes: I images, N image tokens, D width, Q queries, E projection, R texts, T text tokens, P pairs.
"""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from blip_pipelines.data.tokens import CaptionTokenizer
from blip_pipelines.inference import scoring
from blip_pipelines.inference.generation import Captions, GenerationConfig, generate
from blip_pipelines.models.frozen_tower import FrozenTower
from blip_pipelines.models.qformer import QFormer


class QFormerImageText:
    """An `ImageText`: each query against [CLS], captions by the decoder that ITG trains.

    Args:
        tower: None where images come as its outputs, cached.
    """

    def __init__(self, former: QFormer, tower: FrozenTower | None):
        self.former, self.tower = former, tower

    @torch.no_grad()
    def encode_images(self, pixels: Iterable[Tensor]) -> Tensor:
        if self.tower is None:
            return torch.cat(list(pixels))
        device = self.former.query_tokens.device
        return torch.cat([self.tower(batch.to(device)).cpu() for batch in pixels])

    @torch.no_grad()
    def image_features(self, image_IND: Tensor) -> Tensor:
        device = self.former.query_tokens.device
        features = []
        for block in image_IND.split(scoring.BATCH_IMAGES):
            queries_BQD, _ = self.former.encode_queries(self.former.project_image(block.to(device)))
            features.append(self.former.image_features(queries_BQD).cpu())
        return torch.cat(features)

    def text_features(self, token_ids_RT: Tensor, token_mask_RT: Tensor) -> Tensor:
        return scoring.text_features(self.former, token_ids_RT, token_mask_RT)

    def match_logits(
        self, image_IND: Tensor, token_ids_RT: Tensor, token_mask_RT: Tensor, images_P: np.ndarray, texts_P: np.ndarray
    ) -> Tensor:
        return scoring.match_logits(self.former, image_IND, token_ids_RT, token_mask_RT, images_P, texts_P)

    @torch.no_grad()
    def write(
        self,
        image_IND: Tensor,
        tokenizer: CaptionTokenizer,
        config: GenerationConfig,
        prompt: str,
        seed: int,
        draw_ids: Tensor,
    ) -> Captions:
        image = self.former.project_image(image_IND.to(self.former.query_tokens.device))
        _, queries = self.former.encode_queries(image, cache=True)
        return generate(self.former, queries, tokenizer, config, prompt=prompt, seed=seed, draw_ids=draw_ids)
