"""Parts that take no part in training: the image encoder and the language model of BLIP-2 (3.3, 3.4)."""

from typing import Self

import torch
from torch import nn

from blip_pipelines.data.storage import sha256


class Frozen(nn.Module):
    """A module whose parameters have no gradient, that stays in evaluation mode and knows its weights by hash.

    A parent's `train()` does not reach it, so no statistics of a batch norm move and no dropout acts. Subclasses call
    `freeze` when they are complete.
    """

    hash: str

    def freeze(self, *facts: object) -> None:
        """Args:
        facts: what else decides the outputs, to go into the hash.
        """
        self.requires_grad_(False)
        super().train(False)
        self.hash = weights_hash(self, *facts)

    def train(self, mode: bool = True) -> Self:
        return super().train(False)


def weights_hash(module: nn.Module, *facts: object) -> str:
    """Hash of all parameters and buffers that are saved, by name, kind and bytes, wherever they are."""
    parts = [repr(facts)]
    for name, tensor in sorted(module.state_dict().items()):
        content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        parts.append(f"{name} {tensor.dtype} {tuple(tensor.shape)} {sha256(content)}")
    return sha256("\n".join(parts).encode())
