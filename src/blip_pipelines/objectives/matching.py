"""ITM, image-text matching with hard negatives (BLIP 3.2, ALBEF 3.2).

For each image one text that does not belong to it, for each text one such image, likelier the more similar they look
to ITC. All 3 G pairs of a step are one batch. A pair is scored on the rank that holds its image: token ids travel,
image tokens (hundreds of vectors an image) do not, so ranks score different numbers of pairs.

Differs: BLIP draws from the local batch and forbids the own row only; here from the global batch, by the global row's
own draw, and neither another caption of the image nor an equal caption is a negative. `uniform_share` softens the
choice: with none, ITM of a small model stayed at its prior.

Shapes: B own rows, G rows of the global micro-batch, P pairs scored on this rank.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from blip_pipelines.data.loader import Batch
from blip_pipelines.models.attention import at_least_float32
from blip_pipelines.models.keys_values import KeysValues, MatchedImages
from blip_pipelines.objectives.contrastive import Ranks

WEIGHT_FLOOR = 1e-4  # as BLIP: no allowed candidate is ever impossible
NO_NEGATIVE = -1
_FIXED_POINT = 2.0**40


@torch.no_grad()
def hard_negatives(similarity_BG: Tensor, forbidden_BG: Tensor, draw_B: Tensor, uniform_share: float) -> Tensor:
    """(B,) int64 index of one allowed candidate a row, by inverse CDF; `NO_NEGATIVE` where all are forbidden.

    The weights are BLIP's, softmax of the similarities + 1e-4, over the allowed candidates; `uniform_share` of the
    probability is spread evenly over them instead.

    Args:
        similarity_BG: as scaled for ITC; float32 or float64.
        forbidden_BG: bool.
        draw_B: in [0, 1), float64.
        uniform_share: in [0, 1]; 0 is BLIP's choice.
    """
    allowed_BG = ~forbidden_BG
    weight_BG = (similarity_BG.softmax(1) + WEIGHT_FLOOR) * allowed_BG
    uniform_BG = allowed_BG / allowed_BG.sum(1, keepdim=True).clamp(min=1)
    hard_BG = weight_BG / weight_BG.sum(1, keepdim=True).clamp(min=WEIGHT_FLOOR)
    probability_BG = torch.lerp(hard_BG, uniform_BG.to(hard_BG), uniform_share)
    # Whole numbers: their running sum is exact, in any order, on any device, so a forbidden candidate's interval is
    # empty and an allowed one's is not.
    mass_BG = (probability_BG.double() * _FIXED_POINT).long().clamp(min=1) * allowed_BG
    cdf_BG = mass_BG.cumsum(1)
    total_B1 = cdf_BG[:, -1:]
    point_B1 = (draw_B[:, None] * total_B1).long().minimum(total_B1 - 1)
    index_B = torch.searchsorted(cdf_BG, point_B1, right=True)[:, 0]
    return index_B.where(total_B1[:, 0] > 0, NO_NEGATIVE)


class MatchingPairs(NamedTuple):
    """The pairs this rank scores: two for each of its images, in order, then the texts drawn to them."""

    image: Tensor  # (P,) int64, row among this rank's images
    text: Tensor  # (P,) int64, row of the global micro-batch
    matches: Tensor  # (P,) int64, 1 where image and text belong together
    counts: Tensor  # (P,) bool, false for the stand-in of a negative that does not exist
    total: Tensor  # scalar int64, global: pairs of all ranks that count


def matching_pairs(text_of_image_B: Tensor, image_of_text_G: Tensor, rank: int, ranks: int) -> MatchingPairs:
    """Each own image with its text and with its negative text, then the global texts whose negative image is here.

    A row without an allowed negative gives none, neither as image nor as text; the total is smaller by 2 for it.

    Args:
        text_of_image_B: negatives of this rank's images, rows of the global micro-batch or `NO_NEGATIVE`.
        image_of_text_G: negatives of all texts, alike; equal on every rank.
    """
    own_B = torch.arange(len(text_of_image_B), device=text_of_image_B.device)
    first = rank * len(own_B)
    if ranks == 1:  # all texts are at home: the shape is known without asking the device
        text_here = own_B
    else:
        text_here = (image_of_text_G.div(len(own_B), rounding_mode="floor") == rank).nonzero()[:, 0]
    image_here = image_of_text_G[text_here]
    matches_P = torch.zeros(2 * len(own_B) + len(text_here), dtype=torch.int64, device=own_B.device)
    matches_P[: 2 * len(own_B) : 2] = 1
    texts_B2 = torch.stack([own_B + first, text_of_image_B.clamp(min=0)], 1)
    counts_B2 = torch.stack([torch.ones_like(own_B, dtype=torch.bool), text_of_image_B >= 0], 1)
    return MatchingPairs(
        image=torch.cat([own_B.repeat_interleave(2), (image_here - first).clamp(min=0)]),
        text=torch.cat([texts_B2.flatten(), text_here]),
        matches=matches_P,
        counts=torch.cat([counts_B2.flatten(), image_here >= 0]),
        total=3 * len(image_of_text_G) - 2 * (image_of_text_G < 0).sum(),
    )


def draw_pairs(
    image_to_text_BG: Tensor,
    text_to_image_BG: Tensor,
    forbidden_BG: Tensor,
    draw: Callable[[str], Tensor],
    uniform_share: float,
    ranks: Ranks,
) -> MatchingPairs:
    """The pairs of this rank with negatives drawn for both sides; a collective.

    Args:
        image_to_text_BG, text_to_image_BG: similarities of the own rows, as `hard_negatives` takes them.
        draw: numbers in [0, 1) for the own rows, (B,) float64, by what they are for.
    """
    text_of_image_B = hard_negatives(image_to_text_BG, forbidden_BG, draw("negative of image"), uniform_share)
    image_of_text_B = hard_negatives(text_to_image_BG, forbidden_BG, draw("negative of text"), uniform_share)
    return matching_pairs(text_of_image_B, ranks.gather(image_of_text_B), ranks.rank, ranks.ranks)


class Matcher(Protocol):
    """A `Med` or a `QFormer`."""

    def match_logits(self, token_ids_BT: Tensor, token_mask_BT: Tensor, image: MatchedImages, /) -> Tensor: ...


def match(model: Matcher, batch: Batch, image: KeysValues, pairs: MatchingPairs, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """What `itm_share` gives for the pairs of this rank, scored in one pass; a collective.

    Args:
        batch, image: the own rows, and their images as cross-attention sees them.
    """
    token_ids_PT, token_mask_PT = ranks.gather(batch.token_ids)[pairs.text], ranks.gather(batch.token_mask)[pairs.text]
    images = MatchedImages(image, pairs.image[2 * len(batch.rows) :])
    return itm_share(model.match_logits(token_ids_PT, token_mask_PT, images), pairs)


def itm_share(logits_P2: Tensor, pairs: MatchingPairs) -> tuple[Tensor, Tensor]:
    """This rank's share of the two-class cross-entropy and of the accuracy; over ranks they sum to the global means.

    Returns:
        scalars, at least float32; the accuracy without gradient.
    """
    logits_P2 = at_least_float32(logits_P2)
    loss_P = cross_entropy(logits_P2, pairs.matches, reduction="none")
    is_right_P = (logits_P2.detach().argmax(1) == pairs.matches) & pairs.counts
    return (loss_P * pairs.counts).sum() / pairs.total, is_right_P.sum() / pairs.total
