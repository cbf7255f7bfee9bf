"""Scaled dot-product attention behind one function.

Two ways give the same numbers: torch's fused kernel and plain softmax. Which is faster depends on the device and
the shape, never on the values, so a static table decides and a run stays reproducible. On a CPU the fused kernel's
backward costs far more than it saves when sequences are short; on a GPU the fused kernel always wins.

Shapes: B batch, H heads, T queries, S keys, d width of a head.
"""

from torch import Tensor, finfo, float32, where
from torch.nn.functional import dropout, scaled_dot_product_attention, softmax

CPU_FUSED_SCORES = 128 * 128  # from this many scores a head on, the fused kernel wins on a CPU


def attend(
    query_BHTd: Tensor, key_BHSd: Tensor, value_BHSd: Tensor, visible: Tensor | None = None, dropout_rate: float = 0.0
) -> Tensor:
    """Softmax attention; (B, H, T, d) in the dtype of `value_BHSd`. The softmax is float32 whatever the autocast.

    Args:
        visible: bool, True where a query may look, broadcastable to (B, H, T, S); None hides nothing. A query that
            sees nothing gets some finite row, which the caller must not use.
        dropout_rate: of the attention weights; pass 0 in evaluation.
    """
    if is_fused(query_BHTd.device.type, query_BHTd.shape[2], key_BHSd.shape[2]):
        return scaled_dot_product_attention(query_BHTd, key_BHSd, value_BHSd, visible, dropout_rate)
    return attend_explicitly(query_BHTd, key_BHSd, value_BHSd, visible, dropout_rate)


def is_fused(device: str, queries: int, keys: int) -> bool:
    """The static table."""
    return device != "cpu" or queries * keys >= CPU_FUSED_SCORES


def attend_explicitly(
    query_BHTd: Tensor, key_BHSd: Tensor, value_BHSd: Tensor, visible: Tensor | None, dropout_rate: float
) -> Tensor:
    scale = query_BHTd.shape[-1] ** -0.5
    scores_BHTS = (query_BHTd @ key_BHSd.transpose(-1, -2)) * scale
    if visible is not None:
        scores_BHTS = where(visible, scores_BHTS, finfo(scores_BHTS.dtype).min)
    weights_BHTS = softmax(scores_BHTS, -1, dtype=float32).to(value_BHSd.dtype)
    return dropout(weights_BHTS, dropout_rate) @ value_BHSd
