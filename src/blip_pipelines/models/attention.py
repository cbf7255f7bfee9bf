"""Scaled dot-product attention behind one function.

Two ways give the same numbers: torch's fused kernel and plain softmax. Which is faster depends on device, precision
and whether a backward pass follows, never on the values, so a static table decides and a run stays reproducible.
The fused kernel wins everywhere (1.1 to 2.3 times on a CPU in float32) but for one cell: its backward in half
precision on a CPU costs 1.1 to 12 times the plain one, most where sequences are short.

Shapes: B batch, H heads, T queries, S keys, d width of a head.
"""

import torch
from torch import Tensor
from torch.nn.functional import dropout, scaled_dot_product_attention, softmax

HALF = (torch.bfloat16, torch.float16)


def attend(
    query_BHTd: Tensor, key_BHSd: Tensor, value_BHSd: Tensor, visible: Tensor | None = None, dropout_rate: float = 0.0
) -> Tensor:
    """Softmax attention; (B, H, T, d) in the dtype of `value_BHSd`. The softmax is float32 whatever the autocast.

    Args:
        visible: bool, True where a query may look; 2 to 4-D, broadcastable to (B, H, T, S); None hides nothing. A
            query that sees nothing gets some finite row, which the caller must not use.
        dropout_rate: of the attention weights; pass 0 in evaluation.
    """
    if is_fused(query_BHTd.device.type, query_BHTd.dtype, query_BHTd.requires_grad or value_BHSd.requires_grad):
        return scaled_dot_product_attention(query_BHTd, key_BHSd, value_BHSd, visible, dropout_rate)
    return attend_explicitly(query_BHTd, key_BHSd, value_BHSd, visible, dropout_rate)


def is_fused(device: str, dtype: torch.dtype, needs_gradient: bool) -> bool:
    """The static table."""
    return device != "cpu" or dtype not in HALF or not needs_gradient


def attend_explicitly(
    query_BHTd: Tensor, key_BHSd: Tensor, value_BHSd: Tensor, visible: Tensor | None, dropout_rate: float
) -> Tensor:
    scores_BHTS = (query_BHTd * query_BHTd.shape[-1] ** -0.5) @ key_BHSd.transpose(-1, -2)
    if visible is not None:
        scores_BHTS = scores_BHTS.masked_fill(~visible, torch.finfo(scores_BHTS.dtype).min)
    weights_BHTS = softmax(scores_BHTS, -1)  # of half precision too it is computed in float32, and rounded once
    return dropout(weights_BHTS, dropout_rate) @ value_BHSd


def at_least_float32(states: Tensor) -> Tensor:
    """Half precision in float32; float64 stays, so that tests can compute without rounding."""
    return states.to(torch.promote_types(states.dtype, torch.float32))
