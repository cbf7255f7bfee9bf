"""Random draws that depend on what is drawn for, never on who draws.

A draw is a counter-based hash (SplitMix64, Steele et al. 2014) of seed, step, purpose and the global row: the same bits
on every device, for every split of the batch over ranks, after every resume, with no generator state to save.
"""

import hashlib

import torch
from torch import Tensor

_GOLDEN_GAMMA = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


def uniform(seed: int, step: int, purpose: str, rows: Tensor) -> Tensor:
    """Uniform numbers in [0, 1), float64, one for each global row.

    Args:
        seed: of the run.
        step: optimizer step.
        purpose: what the draws are for; draws of two purposes are independent.
        rows: int64, any shape; global row numbers.

    Returns:
        float64 of the shape and on the device of `rows`; multiples of 2**-53.
    """
    digest = hashlib.blake2b(f"{seed}/{step}/{purpose}".encode(), digest_size=8).digest()
    x = (rows + 1) * _signed(_GOLDEN_GAMMA) + int.from_bytes(digest, "little", signed=True)
    x = (x ^ _shift_right(x, 30)) * _signed(_MIX_1)
    x = (x ^ _shift_right(x, 27)) * _signed(_MIX_2)
    x = x ^ _shift_right(x, 31)
    return _shift_right(x, 11).to(torch.float64) * 2.0**-53


def _signed(constant: int) -> int:
    """The int64 with the same 64 bits: torch has no unsigned arithmetic, and wrap-around multiplication is the same."""
    return constant - 2**64 if constant >= 2**63 else constant


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift; torch's own is arithmetic on int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
