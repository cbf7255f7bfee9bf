"""What retrieval and captioning ask of a model, so that MED and Q-Former are probed and measured by the same code.

Runs under the caller's autocast; results are on the CPU.

Shapes: I images, N image tokens, D width, Q features of an image, E projection, R texts, T text tokens, P pairs.
"""

from collections.abc import Iterable
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from blip_pipelines.data.tokens import CaptionTokenizer
from blip_pipelines.inference import scoring
from blip_pipelines.inference.generation import Captions, GenerationConfig, generate
from blip_pipelines.models.med import Med

CHUNK_ELEMENTS = 64_000_000  # similarities handled at once: bounds memory, not the result


class ImageText(Protocol):
    """A model that compares images with texts and writes captions."""

    def encode_images(self, pixels: Iterable[Tensor]) -> Tensor:
        """(I, N, D) image tokens of all batches, in order; each batch as the model reads images."""
        ...

    def image_features(self, image_IND: Tensor) -> Tensor:
        """(I, Q, E) float32 of unit length."""
        ...

    def text_features(self, token_ids_RT: Tensor, token_mask_RT: Tensor) -> Tensor:
        """(R, E) float32 of unit length."""
        ...

    def match_logits(
        self, image_IND: Tensor, token_ids_RT: Tensor, token_mask_RT: Tensor, images_P: np.ndarray, texts_P: np.ndarray
    ) -> Tensor:
        """(P, 2) float32 ITM logits of not matching and matching, of pairs of an image index and a text index."""
        ...

    def write(
        self,
        image_IND: Tensor,
        tokenizer: CaptionTokenizer,
        config: GenerationConfig,
        prompt: str,
        seed: int,
        draw_ids: Tensor,
    ) -> Captions:
        """A caption of each image, see `generation.generate`."""
        ...


def similarities(image_IQE: Tensor, text_RE: Tensor) -> Tensor:
    """(I, R) of images to texts by ITC: that of the feature of the image that is nearest to the text."""
    images = max(1, CHUNK_ELEMENTS // (image_IQE.shape[1] * max(1, len(text_RE))))
    chunks = ((chunk_CQE.flatten(0, 1) @ text_RE.T, len(chunk_CQE)) for chunk_CQE in image_IQE.split(images))
    return torch.cat([similarity.view(count, -1, len(text_RE)).amax(1) for similarity, count in chunks])


class MedImageText:
    """BLIP's way: the class token against [CLS]."""

    def __init__(self, med: Med):
        self.med = med

    def encode_images(self, pixels: Iterable[Tensor]) -> Tensor:
        return scoring.encode_images(self.med, pixels)

    def image_features(self, image_IND: Tensor) -> Tensor:
        return scoring.image_features(self.med, image_IND)[:, None]

    def text_features(self, token_ids_RT: Tensor, token_mask_RT: Tensor) -> Tensor:
        return scoring.text_features(self.med, token_ids_RT, token_mask_RT)

    def match_logits(
        self, image_IND: Tensor, token_ids_RT: Tensor, token_mask_RT: Tensor, images_P: np.ndarray, texts_P: np.ndarray
    ) -> Tensor:
        return scoring.match_logits(self.med, image_IND, token_ids_RT, token_mask_RT, images_P, texts_P)

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
        image = self.med.project_image(image_IND.to(next(self.med.parameters()).device))
        return generate(self.med, image, tokenizer, config, prompt=prompt, seed=seed, draw_ids=draw_ids)
