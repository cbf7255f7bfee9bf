"""LM, the language modelling loss of the image-grounded decoder (BLIP 3.2): the caption, token by token.

The decoder reads [DEC] w1 .. wn and is asked for w1 .. wn [SEP], with label smoothing 0.1; tokens of a prompt are read
but not asked for.

Shapes: B own rows, T text tokens, D width, R positions with a target, V vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from blip_pipelines.models.attention import at_least_float32


def target_positions(token_mask_BT: Tensor, prompt_tokens: int) -> Tensor:
    """(B, T - 1) bool: position t is asked for token t + 1, which is neither padding nor prompt.

    Args:
        prompt_tokens: that follow position 0 and belong to the prompt.
    """
    asked = torch.arange(1, token_mask_BT.shape[1], device=token_mask_BT.device) > prompt_tokens
    return token_mask_BT[:, 1:] & asked


def lm_share(
    hidden_BTD: Tensor,
    token_ids_BT: Tensor,
    target_BT: Tensor,
    lm_head: Callable[[Tensor], Tensor],
    target_tokens: int,
    label_smoothing: float,
) -> Tensor:
    """This rank's share of the mean cross-entropy per target token; a scalar, at least float32.

    Args:
        hidden_BTD: (B, T - 1, D) decoder states; the last token is asked for, never read.
        target_BT: (B, T - 1) bool, from `target_positions`.
        lm_head: (R, D) states to (R, V) logits; it sees only positions with a target, as padding can be half of a
            batch and the vocabulary is the widest product of the model.
        target_tokens: the divisor, global: the targets of all ranks and all micro-steps of the optimizer step.
    """
    index_R = target_BT.flatten().nonzero()[:, 0]
    logits_RV = at_least_float32(lm_head(hidden_BTD.flatten(0, 1).index_select(0, index_R)))
    target_R = token_ids_BT[:, 1:].flatten().index_select(0, index_R)
    loss = cross_entropy(logits_RV, target_R, reduction="sum", label_smoothing=label_smoothing)
    return loss / max(target_tokens, 1)
