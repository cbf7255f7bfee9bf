"""Random starts.

`bert` is the papers': normal with std 0.02, fit for width 768. At small widths it left ITM at its prior and let LM
ignore the picture, so `fan_in` scales with the layer: std 0.8 / sqrt(inputs). Tables of embeddings stay small in
both, because the word table is also the LM projection: std 0.04 at width 192 gives logits with std 0.55, a start near
the uniform distribution.
"""

from typing import Literal

import torch
from torch import nn

EMBEDDING_STD = {"fan_in": 0.04, "bert": 0.02}


@torch.no_grad()
def initialise(module: nn.Module, kind: Literal["fan_in", "bert"], seed: int) -> None:
    """Overwrite every parameter of `module`; equal for equal seeds, whatever torch's own generator holds.

    Linear and convolution weights are normal, biases zero, LayerNorms the identity; embedding tables and loose
    parameters (class token, positions, queries) are normal with the small std.
    """
    generator = torch.Generator().manual_seed(seed)
    tables = {id(part.weight) for part in module.modules() if isinstance(part, nn.Embedding)}
    done: set[int] = set()
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if id(parameter) in done:
                continue
            done.add(id(parameter))
            if isinstance(part, nn.LayerNorm):
                parameter.fill_(1.0 if name == "weight" else 0.0)
            elif name == "bias":
                parameter.zero_()
            elif id(parameter) in tables or kind == "bert" or not isinstance(part, nn.Linear | nn.Conv2d):
                parameter.normal_(std=EMBEDDING_STD[kind], generator=generator)
            else:
                parameter.normal_(std=0.8 * parameter[0].numel() ** -0.5, generator=generator)
