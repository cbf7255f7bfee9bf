"""ITC, the image-text contrastive loss (BLIP 3.2; momentum distillation as ALBEF 3.2; several queries, BLIP-2 3.2).

A row's own side is the online feature, its candidates are the features of the whole global batch and of the queue.
Two captions of one image, or two equal captions, are positives of one another wherever they meet.

Differs: BLIP's candidates are the local batch and the queue; the global batch makes the loss independent of the number
of ranks. BLIP pretrains with one positive a row; here all positives share the weight, as in its retrieval fine-tuning.

Shapes: B own rows, G rows of the global micro-batch, C candidates (G and the slots of the queue), E projection,
Q queries of an image.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from blip_pipelines.models.attention import at_least_float32


class Ranks(Protocol):
    """The processes that share a batch; `training.distributed.World` is one."""

    @property
    def rank(self) -> int: ...

    @property
    def ranks(self) -> int: ...

    def gather(self, rows: Tensor) -> Tensor:
        """(ranks x B, ...) of (B, ...), in rank order; backward sums the gradients of all ranks."""
        ...


class Candidates(NamedTuple):
    """What a row is compared with; the ids are never negative, but -1 in an empty slot."""

    image: Tensor  # (C, E) features
    text: Tensor  # (C, E)
    image_ids: Tensor  # (C,) int64
    text_ids: Tensor  # (C,) int64


def similarities(own_BE: Tensor, candidates: list[Tensor], temperature: Tensor | float) -> Tensor:
    """(B, C) scaled similarities to the candidates of all blocks; at least float32 whatever the autocast.

    Args:
        candidates: blocks of (c, E) whose lengths sum to C. Joining the products instead of the blocks saves a copy of
            the queue (118 MB for the 57600 slots of BLIP, both sides).
        temperature: scalar.
    """
    with torch.autocast(own_BE.device.type, enabled=False):
        own_BE = at_least_float32(own_BE)
        blocks = [own_BE @ at_least_float32(block_CE).T for block_CE in candidates]
        return torch.cat(blocks, 1) / temperature


def query_similarities(image_BQE: Tensor, text_CE: Tensor, temperature: Tensor) -> Tensor:
    """(B, C) scaled similarities of images to texts: that of the query that is nearest to the text (BLIP-2 3.2)."""
    similarity_RC = similarities(image_BQE.flatten(0, 1), [text_CE], 1.0)
    return similarity_RC.unflatten(0, image_BQE.shape[:2]).amax(1) / temperature


def positives(image_ids_B: Tensor, text_ids_B: Tensor, image_ids_C: Tensor, text_ids_C: Tensor) -> Tensor:
    """(B, C) bool: the candidate has the row's image or its text. Never true of an empty slot (id -1)."""
    return (image_ids_B[:, None] == image_ids_C) | (text_ids_B[:, None] == text_ids_C)


def soft_targets(positive_BC: Tensor, believed_BC: Tensor | None, candidate_C: Tensor, alpha: float) -> Tensor:
    """(B, C) target probabilities: alpha x what the momentum encoder believes + (1 - alpha) x uniform over positives.

    Args:
        believed_BC: similarities by the momentum features; None stands for alpha 0.
    """
    if believed_BC is None:
        return positive_BC.double() / positive_BC.sum(1, keepdim=True)
    hard_BC = positive_BC.to(believed_BC) / positive_BC.sum(1, keepdim=True)
    return torch.lerp(hard_BC, believed_BC.masked_fill(~candidate_C, -torch.inf).softmax(1), alpha)


def smooth_targets(positive_BC: Tensor, label_smoothing: float) -> Tensor:
    """(B, C) float64 target probabilities: even over positives, and `label_smoothing` of it spread over everyone."""
    hard_BC = soft_targets(positive_BC, None, positive_BC, 0.0)
    return (1 - label_smoothing) * hard_BC + label_smoothing / positive_BC.shape[1]


def cross_entropy_rows(similarity_BC: Tensor, target_BC: Tensor, candidate_C: Tensor) -> Tensor:
    """(B,) cross-entropy between target probabilities and the softmax over the candidates.

    Args:
        candidate_C: bool, false for an empty slot, which then takes no part (its target must be 0).
    """
    # The targets sum to 1, so the normaliser comes out of the sum; -inf, masked, then never meets a target of 0.
    normaliser_B = similarity_BC.masked_fill(~candidate_C, -torch.inf).logsumexp(1)
    return normaliser_B - (target_BC.to(similarity_BC) * similarity_BC).sum(1)


def contrast(
    own_BE: Tensor,
    momentum_BE: Tensor,
    candidates: list[Tensor],
    positive_BC: Tensor,
    candidate_C: Tensor,
    temperature: Tensor,
    alpha: float,
) -> tuple[Tensor, Tensor]:
    """One direction of ITC: the loss of each own row (B,) and its scaled similarities (B, C), both with gradient.

    Args:
        momentum_BE: the momentum features of the own rows; not looked at where `alpha` is 0.
        candidates: blocks of the other side's features, C rows together.
    """
    similarity_BC = similarities(own_BE, candidates, temperature)
    with torch.no_grad():
        believed_BC = similarities(momentum_BE, candidates, temperature) if alpha else None
        target_BC = soft_targets(positive_BC, believed_BC, candidate_C, alpha)
    return cross_entropy_rows(similarity_BC, target_BC, candidate_C), similarity_BC


def soft_share(step: int, alpha_max: float, ramp_steps: int) -> float:
    """Alpha of a step: linear from 0 at step 0 to `alpha_max` at `ramp_steps` (BLIP: two epochs)."""
    return alpha_max * min(1.0, step / ramp_steps) if ramp_steps else alpha_max
