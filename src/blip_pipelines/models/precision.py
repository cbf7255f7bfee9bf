"""In which precision matrix products run: what the parameters say, or what is fastest on this machine."""

from typing import Literal

import torch

Precision = Literal["auto", "float32", "bfloat16"]


def is_half(precision: Precision) -> bool:
    """Whether it is bfloat16. `auto`: where a GPU or the CPU (AMX) has matrix units for it; elsewhere it is slower."""
    if precision == "auto":
        return torch.cuda.is_available() or torch.cpu._is_amx_tile_supported()
    return precision == "bfloat16"


def dtype_of(precision: Precision) -> torch.dtype:
    """bfloat16 or float32."""
    return torch.bfloat16 if is_half(precision) else torch.float32
