"""In which precision matrix products run: as the parameters say, or half where this machine has units for it."""

from typing import Literal

import torch

Precision = Literal["auto", "float32", "bfloat16"]


def is_half(precision: Precision) -> bool:
    """Whether it is bfloat16. `auto`: where a GPU or the CPU (AMX) has matrix units for it; elsewhere it is slower.

    With AMX that pays for large products of few shapes, as of a language model; each new shape is compiled anew.
    """
    if precision == "auto":
        return torch.cuda.is_available() or torch.cpu._is_amx_tile_supported()
    return precision == "bfloat16"


def dtype_of(precision: Precision) -> torch.dtype:
    """bfloat16 or float32."""
    return torch.bfloat16 if is_half(precision) else torch.float32
