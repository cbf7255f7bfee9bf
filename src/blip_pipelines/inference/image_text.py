"""What retrieval and captioning ask of a model, so that MED and Q-Former are probed and measured by the same code.

Runs under the caller's autocast; results are on the CPU.

Shapes: I images, B of them, N image tokens, D width, Q features of an image, E projection, R texts, T text tokens,
P pairs.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from blip_pipelines.data.tokens import CaptionTokenizer
from blip_pipelines.inference import generation, scoring
from blip_pipelines.inference.generation import Captions, GenerationConfig, generate
from blip_pipelines.models.keys_values import KeysValues
from blip_pipelines.models.med import Med

CHUNK_ELEMENTS = 64_000_000  # similarities handled at once: bounds memory, not the result


class Sizes(generation.Sizes, scoring.Sizes, Protocol):
    """The configuration of a model."""


class Model(scoring.Scorer, generation.Decoder, Protocol):
    """A `Med` or a `QFormer`."""

    @property
    def config(self) -> Sizes: ...


class ImageText(ABC):
    """A model that compares images with texts and writes captions."""

    def __init__(self, model: Model):
        self.model = model

    @abstractmethod
    def encode_images(self, pixels: Iterable[Tensor]) -> Tensor:
        """(I, N, D) image tokens of all batches, in order; each batch as the model reads images."""

    @abstractmethod
    def image_features(self, image_IND: Tensor) -> Tensor:
        """(I, Q, E) float32 of unit length."""

    @abstractmethod
    def seen(self, image_BND: Tensor) -> KeysValues:
        """The images, on the model's device, as its decoder reads them."""

    def text_features(self, token_ids_RT: Tensor, token_mask_RT: Tensor) -> Tensor:
        """(R, E) float32 of unit length."""
        return scoring.text_features(self.model, token_ids_RT, token_mask_RT)

    def match_logits(
        self, image_IND: Tensor, token_ids_RT: Tensor, token_mask_RT: Tensor, images_P: np.ndarray, texts_P: np.ndarray
    ) -> Tensor:
        """(P, 2) float32 ITM logits of not matching and matching, of pairs of an image index and a text index."""
        return scoring.match_logits(self.model, image_IND, token_ids_RT, token_mask_RT, images_P, texts_P)

    @torch.no_grad()
    def write(
        self,
        image_BND: Tensor,
        tokenizer: CaptionTokenizer,
        config: GenerationConfig,
        prompt: str,
        seed: int,
        draw_ids: Tensor,
    ) -> Captions:
        """A caption of each image, see `generation.generate`."""
        image = self.seen(image_BND.to(self.device))
        return generate(self.model, image, tokenizer, config, prompt=prompt, seed=seed, draw_ids=draw_ids)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


class MedImageText(ImageText):
    """BLIP's way: the class token against [CLS]."""

    def __init__(self, med: Med):
        super().__init__(med)
        self.med = med

    def encode_images(self, pixels: Iterable[Tensor]) -> Tensor:
        return scoring.encode_images(self.med, pixels)

    def image_features(self, image_IND: Tensor) -> Tensor:
        return scoring.image_features(self.med, image_IND)[:, None]

    def seen(self, image_BND: Tensor) -> KeysValues:
        return self.med.project_image(image_BND)


def similarities(image_IQE: Tensor, text_RE: Tensor) -> Tensor:
    """(I, R) of images to texts by ITC: that of the feature of the image that is nearest to the text."""
    images = max(1, CHUNK_ELEMENTS // (image_IQE.shape[1] * max(1, len(text_RE))))
    chunks = ((chunk_CQE.flatten(0, 1) @ text_RE.T, len(chunk_CQE)) for chunk_CQE in image_IQE.split(images))
    return torch.cat([similarity.view(count, -1, len(text_RE)).amax(1) for similarity, count in chunks])
