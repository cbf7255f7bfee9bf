"""Token-wise layers without the padding.

Captions of a batch differ in length, and a linear layer spends as much on a padding token as on a word. So hidden
states travel as rows, one a word, and are laid out as (batch, tokens) only inside attention. On captions of 5 to 16
words this drops 40 % of the rows. Counting words needs their number on the host, which is free on a CPU but stalls a
GPU and changes shapes under a compiler; there a row is a token, padding included, and nothing is copied. In half
precision a CPU's library compiles a product anew for each new shape, which costs more than it saves if every batch
brings one; so there some padding travels along, up to the next of few numbers of rows.

Shapes: B batch, T text tokens, R rows (words, or all B x T tokens), X any width.
"""

from typing import Any

import torch
from torch import Tensor

FEW = 64  # under autocast the number of rows is a multiple of it


class Rows:
    """Where the rows lie in the (batch, tokens) layout."""

    def __init__(self, batch: int, tokens: int, words_R: Tensor | None = None):
        self.batch = batch
        self.tokens = tokens
        self.words_R = words_R  # index into the flattened layout; None: every token is a row

    @classmethod
    def of(cls, token_ids_BT: Tensor, token_mask_BT: Tensor | None) -> "Rows":
        """The words that the bool mask marks; all tokens where packing does not pay or there is no mask."""
        batch, tokens = token_ids_BT.shape
        if token_mask_BT is None or token_ids_BT.device.type != "cpu" or torch.compiler.is_compiling():
            return cls(batch, tokens)
        is_word = token_mask_BT.flatten()
        words_R = is_word.nonzero()[:, 0]
        if torch.is_autocast_enabled("cpu") and (missing := -len(words_R) % FEW):
            words_R = torch.cat([words_R, (~is_word).nonzero()[:missing, 0]]).sort().values
        return cls(batch, tokens, words_R)

    def pack(self, states_BTX: Tensor) -> Tensor:
        """(R, X)."""
        flat = states_BTX.flatten(0, 1)
        return flat if self.words_R is None else Take.apply(flat, self.words_R)

    def unpack(self, states_RX: Tensor) -> Tensor:
        """(B, T, X); zeros where there is no row."""
        if self.words_R is not None:
            states_RX = Put.apply(states_RX, self.words_R, self.batch * self.tokens)
        return states_RX.unflatten(0, (self.batch, self.tokens))

    def first(self, states_RX: Tensor) -> Tensor:
        """(B, X), the first token of each text."""
        if self.words_R is None:
            return states_RX.unflatten(0, (self.batch, self.tokens))[:, 0]
        starts_B = (self.words_R % self.tokens == 0).nonzero()[:, 0]
        return Take.apply(states_RX, starts_B)


class Take(torch.autograd.Function):
    """Distinct rows by index. Its backward is a copy; that of plain indexing adds row by row, in case rows repeat."""

    @staticmethod
    def forward(ctx: Any, source_RX: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.rows = len(source_RX)
        return source_RX.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        return gradient.new_zeros(ctx.rows, *gradient.shape[1:]).index_copy_(0, index, gradient), None


class Put(torch.autograd.Function):
    """The reverse: rows to distinct places among zeros."""

    @staticmethod
    def forward(ctx: Any, source_RX: Tensor, index: Tensor, rows: int) -> Tensor:
        ctx.save_for_backward(index)
        return source_RX.new_zeros(rows, *source_RX.shape[1:]).index_copy_(0, index, source_RX)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (index,) = ctx.saved_tensors
        return gradient.index_select(0, index), None, None
