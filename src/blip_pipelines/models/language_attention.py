"""The attention of a frozen stock language model through which gradients pass: fused, but where that is slow.

The backward of the fused kernel in half precision on a CPU was a third of a step of stage 2. There attention is plain,
in half the time of the fused kernel in float32; heads that share keys and values are rows of one product.

Shapes: B batch, H heads of queries, G of keys and values, T queries, S keys, d width of a head.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softmax
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from blip_pipelines.models.attention import is_fused

NAME = "sdpa_or_plain"


def choose_attention(model: PreTrainedModel) -> None:
    """Let a model that has `sdpa` choose between it and plain attention, call by call; others stay as they are."""
    if model._supports_attention_backend and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(NAME)


def _attend(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
) -> tuple[Tensor, None]:
    needs_gradient = query.requires_grad or value.requires_grad
    is_plain = settings.get("position_bias") is None and not settings.get("dropout")
    if is_fused(query.device.type, query.dtype, needs_gradient) or not is_plain:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    scaling, is_causal = settings.get("scaling"), settings.get("is_causal")
    scaled_BHTd = query * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    bias = _bias(query, key, attention_mask, getattr(module, "is_causal", True) if is_causal is None else is_causal)
    return attend_in_groups(scaled_BHTd, key, value, bias).transpose(1, 2).contiguous(), None


def _bias(query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor | None:
    """What is added to the scores, (1 or B, 1 or H, T, S), in place of a mask that hides or adds."""
    if mask is None and is_causal and query.shape[2] > 1:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()[None, None]
    if mask is None or mask.dtype != torch.bool:
        return None if mask is None else mask.to(query.dtype)
    return query.new_zeros(mask.shape).masked_fill(~mask, torch.finfo(query.dtype).min)


def attend_in_groups(query_BHTd: Tensor, key_BGSd: Tensor, value_BGSd: Tensor, bias: Tensor | None) -> Tensor:
    """(B, H, T, d), of queries that are scaled already; `bias` is (1 or B, 1 or H, T, S)."""
    groups, tokens = key_BGSd.shape[1], query_BHTd.shape[2]
    query_BGRd = query_BHTd.unflatten(1, (groups, -1)).flatten(2, 3)
    scores_BGNTS = (query_BGRd @ key_BGSd.transpose(-1, -2)).unflatten(2, (-1, tokens))
    if bias is not None:
        scores_BGNTS = scores_BGNTS + (bias[:, :, None] if bias.shape[1] == 1 else bias.unflatten(1, (groups, -1)))
    read_BGRd = softmax(scores_BGNTS, -1).flatten(2, 3) @ value_BGSd  # of half precision too computed in float32
    return read_BGRd.unflatten(2, (-1, tokens)).flatten(1, 2)


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
