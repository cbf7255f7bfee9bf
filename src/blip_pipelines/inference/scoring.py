"""ITC features of many images and texts, ITM scores of many pairs.

Texts go in batches of similar length, so little padding is computed; an image's keys and values are projected once
for all the pairs of its block. Neither changes a score beyond rounding: a score depends on its image and text alone.
Runs under the caller's autocast; results are float32 on the CPU.

Shapes: I images, N image tokens, D width, E projection, R texts, T text tokens, P pairs.
"""

from collections.abc import Iterable, Iterator
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from blip_pipelines.models.keys_values import KeysValues
from blip_pipelines.models.med import Med

BATCH_TEXTS = 256
BATCH_IMAGES = 64  # projected at once: at BLIP's full size their keys and values are about a gigabyte in float32
GPU_BYTES = 2**31  # of keys and values at once on a GPU, which small batches leave idle


class Sizes(Protocol):
    """The configuration of a scorer."""

    @property
    def projection(self) -> int: ...


class Scorer(Protocol):
    """What compares: a `Med`, or a `QFormer`."""

    @property
    def config(self) -> Sizes: ...

    def parameters(self) -> Iterator[Parameter]: ...

    def text_features(self, token_ids_BT: Tensor, token_mask_BT: Tensor) -> Tensor: ...

    def project_image(self, image_BND: Tensor) -> KeysValues: ...

    def match_logits(self, token_ids_BT: Tensor, token_mask_BT: Tensor, image: KeysValues) -> Tensor: ...


@torch.no_grad()
def encode_images(med: Med, pixels: Iterable[Tensor]) -> Tensor:
    """(I, N, D) image tokens on the CPU of all batches, in order; each batch as `Med.encode_image` reads it."""
    device = next(med.parameters()).device
    return torch.cat([med.encode_image(batch.to(device)).float().cpu() for batch in pixels])


@torch.no_grad()
def image_features(med: Med, image_IND: Tensor) -> Tensor:
    """(I, E) float32 of unit length."""
    device = next(med.parameters()).device
    return med.image_features(image_IND[:, :1].to(device)).cpu()


@torch.no_grad()
def text_features(
    scorer: Scorer, token_ids_RT: Tensor, token_mask_RT: Tensor, batch_texts: int = BATCH_TEXTS
) -> Tensor:
    """(R, E) float32 of unit length, in the order given."""
    device = next(scorer.parameters()).device
    features_RE = torch.empty(len(token_ids_RT), scorer.config.projection)
    lengths_R = token_mask_RT.sum(1)
    for rows in lengths_R.argsort(stable=True).split(batch_texts):
        if not len(rows):
            break
        longest = int(lengths_R[rows].max())
        token_ids, token_mask = token_ids_RT[rows, :longest].to(device), token_mask_RT[rows, :longest].to(device)
        features_RE[rows] = scorer.text_features(token_ids, token_mask).cpu()
    return features_RE


@torch.no_grad()
def match_logits(
    scorer: Scorer,
    image_IND: Tensor,
    token_ids_RT: Tensor,
    token_mask_RT: Tensor,
    images_P: np.ndarray,
    texts_P: np.ndarray,
    batch_pairs: int | None = None,
    batch_images: int | None = None,
) -> Tensor:
    """(P, 2) float32 ITM logits of not matching and matching, for pairs of an image index and a text index.

    Args:
        image_IND: image tokens; their rows are moved to the model's device block by block.
        batch_pairs: scored at once; None: as many as suit the device, as of batch_images.
        batch_images: whose keys and values are there at once.
    """
    device = next(scorer.parameters()).device
    if not len(images_P):
        return torch.empty(0, 2)
    at_once = None if device.type == "cpu" else _room(scorer.project_image(image_IND[:1].to(device)))
    batch_pairs, batch_images = batch_pairs or at_once or BATCH_TEXTS, batch_images or at_once or BATCH_IMAGES
    logits_P2 = torch.empty(len(images_P), 2)
    lengths_R = token_mask_RT.sum(1).cpu().numpy()
    for pairs in _blocks(images_P, lengths_R[texts_P], batch_images):
        images, image_of_pair = np.unique(images_P[pairs], return_inverse=True)
        block = scorer.project_image(image_IND[torch.from_numpy(images)].to(device))
        for start in range(0, len(pairs), batch_pairs):
            rows = pairs[start : start + batch_pairs]
            texts = torch.from_numpy(texts_P[rows])
            longest = int(lengths_R[texts_P[rows]].max())
            image = block.select(torch.from_numpy(image_of_pair[start : start + batch_pairs]).to(device))
            token_ids, token_mask = token_ids_RT[texts, :longest].to(device), token_mask_RT[texts, :longest].to(device)
            logits_P2[torch.from_numpy(rows)] = scorer.match_logits(token_ids, token_mask, image).cpu()
    return logits_P2


def match_probabilities(logits_P2: Tensor) -> Tensor:
    """(P,) probability that a pair matches, as the filter of CapFilt reads it."""
    return logits_P2.float().softmax(-1)[:, 1]


def _room(image: KeysValues) -> int:
    """How many have room at once, of which `image` is one."""
    return max(GPU_BYTES // sum(states.nbytes for layer in image.layers for states in layer), 1)


def _blocks(images_P: np.ndarray, lengths_P: np.ndarray, batch_images: int) -> Iterator[np.ndarray]:
    """Pair numbers, shortest text first, of `batch_images` distinct images at a time."""
    _, order_of_image = np.unique(images_P, return_inverse=True)
    block_P = order_of_image // batch_images
    order = np.lexsort((lengths_P, block_P))
    yield from np.split(order, np.flatnonzero(np.diff(block_P[order])) + 1)
