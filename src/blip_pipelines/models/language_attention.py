"""The attention of a frozen stock language model through which gradients pass: fused, but where that is slow.

The backward of the fused kernel in half precision on a CPU was a third of a step of stage 2; in float32 it is none.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from blip_pipelines.models.attention import is_fused

NAME = "sdpa_or_float32"


def widen_attention(model: PreTrainedModel) -> None:
    """Let a model that has `sdpa` choose between it and itself in float32, call by call; others stay as they are."""
    if model._supports_attention_backend and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(NAME)


def _attend(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
) -> tuple[Tensor, None]:
    if is_fused(query.device.type, query.dtype, query.requires_grad or value.requires_grad):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    if attention_mask is not None and attention_mask.dtype != torch.bool:
        attention_mask = attention_mask.float()
    found, _ = sdpa_attention_forward(module, query.float(), key.float(), value.float(), attention_mask, **settings)
    return found.to(query.dtype), None


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
