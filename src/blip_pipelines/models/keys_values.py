"""What cross-attention looks at: keys and values of images, of texts, or of the tokens decoded so far.

Shapes: B batch, T text tokens, S keys, D width, H heads, d width of a head.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from blip_pipelines.models.attention import attend


class KeysValues:
    """Keys and values of every layer, each (B, H, S, d): an image as the cross-attention sees it."""

    def __init__(self, layers: list[tuple[Tensor, Tensor]]):
        self.layers = layers

    def __len__(self) -> int:
        return len(self.layers[0][0]) if self.layers else 0

    def select(self, index: Tensor) -> "KeysValues":
        """Rows gathered by `index` (int64), such as the beams that live on."""

        # In memory a row is (S, H, d); gathered in that order it is one copy, forward and, in SDPA's layout, backward.
        def rows(states_BHSd: Tensor) -> Tensor:
            return states_BHSd.transpose(1, 2).index_select(0, index).transpose(1, 2)

        return type(self)([(rows(key), rows(value)) for key, value in self.layers])

    def sources(self, layer: int) -> "list[Source]":
        return [Source(*self.layers[layer])]


class Source(NamedTuple):
    """Keys and values of B images, (B, H, S, d), for the next `texts` texts (all if None): a run of texts per image.

    `visible`, (B, 1, 1, S) bool, hides padding where the sources are texts; None hides nothing.
    """

    key: Tensor
    value: Tensor
    texts: int | None = None
    visible: Tensor | None = None


class TextKeysValues(KeysValues):
    """Texts as cross-attention sees them, in the place of images.

    Args:
        mask_BS: bool, True where there is a token.
    """

    def __init__(self, layers: list[tuple[Tensor, Tensor]], mask_BS: Tensor):
        super().__init__(layers)
        self.mask_BS = mask_BS

    def select(self, index: Tensor) -> "TextKeysValues":
        return TextKeysValues(KeysValues(self.layers).select(index).layers, self.mask_BS[index])

    def sources(self, layer: int) -> list[Source]:
        return [Source(*self.layers[layer], visible=self.mask_BS[:, None, None])]


class MatchedImages:
    """The images of ITM's pairs: texts 0 and 1 look at image 0, 2 and 3 at image 1, ..., the rest at images `index`.

    A copy of an image's keys and values for each of its texts would be the largest tensor of a step.
    """

    def __init__(self, image: KeysValues, index: Tensor):
        self.image, self.others = image, image.select(index)

    def sources(self, layer: int) -> list[Source]:
        return [Source(*self.image.layers[layer], 2 * len(self.image)), *self.others.sources(layer)]


class Cache(KeysValues):
    """Self-attention keys and values of the tokens decoded so far; `decode_hidden` appends to it."""

    def __init__(self, layers: list[tuple[Tensor, Tensor]] | None = None):
        super().__init__(layers or [])

    @property
    def length(self) -> int:
        return self.layers[0][0].shape[2] if self.layers else 0

    def extend(self, layer: int, key_BHTd: Tensor, value_BHTd: Tensor) -> tuple[Tensor, Tensor]:
        if layer == len(self.layers):
            self.layers.append((key_BHTd, value_BHTd))
        else:
            key, value = self.layers[layer]
            self.layers[layer] = torch.cat([key, key_BHTd], 2), torch.cat([value, value_BHTd], 2)
        return self.layers[layer]


def attend_to(query_BHTd: Tensor, sources: list[Source], visible: Tensor | None, dropout_rate: float) -> Tensor:
    """(B, T, D) of texts that each read their source; those that share one are one longer row of queries."""
    mixed, start = [], 0
    for key, value, texts, seen in sources:
        stop = len(query_BHTd) if texts is None else start + texts
        if start == stop:  # on some ranks no text is drawn to any image
            continue
        shared = query_BHTd[start:stop].unflatten(0, (len(key), -1)).transpose(1, 2)  # images, H, run, T, d
        read = attend(shared.flatten(2, 3), key, value, visible if seen is None else seen, dropout_rate)
        read = read.unflatten(2, shared.shape[2:4])
        mixed.append(read.permute(0, 2, 3, 1, 4).flatten(3).flatten(0, 1))
        start = stop
    return torch.cat(mixed) if len(mixed) > 1 else mixed[0]
