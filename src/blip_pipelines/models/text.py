"""MED's text transformer: BERT with cross-attention, layers of which two can share all but their self-attention.

Parameters carry the names of the stock `transformers` BLIP classes. Where only the first token's state is wanted the
last layer computes that token alone.

Shapes: B batch, T text tokens, S keys, D width, H heads, d width of a head, V vocabulary, R rows (the words of a batch,
see `packing`).
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, gelu
from torch.utils.checkpoint import checkpoint

from blip_pipelines.config import ConfigError, speed_only
from blip_pipelines.models.keys_values import Cache, KeysValues, MatchedImages, Source, attend_to
from blip_pipelines.models.packing import Rows

if TYPE_CHECKING:
    from blip_pipelines.data.tokens import CaptionTokenizer


# Of the LM head's LayerNorm at a `fan_in` start. Its projection is the small word table: with a gain of 1 the logits
# have std 0.55, and growing them cost a short run hundreds of steps.
LM_HEAD_GAIN = 4.0


@dataclass(frozen=True)
class TextConfig:
    """Size of the text transformer and the ids that it must know; the defaults are BERT-base with [DEC] and [ENC]."""

    vocabulary: int = 30524
    width: int = 768
    layers: int = 12
    heads: int = 12
    ffn_width: int = 3072
    max_positions: int = 512
    dropout: float = 0.0  # BLIP's bert_config: 0.1, both
    attention_dropout: float = 0.0
    layer_norm_eps: float = 1e-12
    pad_id: int = 0
    cls_id: int = 101
    sep_id: int = 102
    dec_id: int = 30522
    enc_id: int = 30523
    checkpoint_activations: bool = speed_only(False)

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ConfigError(f"text.width: {self.width} is not a multiple of text.heads = {self.heads}")
        for name in ("pad_id", "cls_id", "sep_id", "dec_id", "enc_id"):
            if getattr(self, name) >= self.vocabulary:
                raise ConfigError(
                    f"text.{name}: {getattr(self, name)} is outside text.vocabulary = {self.vocabulary}; "
                    "take the ids and the size of the tokenizer"
                )

    def fit(self, tokenizer: "CaptionTokenizer") -> "TextConfig":
        """The same sizes with the vocabulary and the special ids of a tokenizer."""
        ids = {f"{name}_id": getattr(tokenizer, name) for name in ("pad", "cls", "sep", "dec", "enc")}
        return replace(self, vocabulary=len(tokenizer), **ids)


def with_first(token_ids_BT: Tensor, token_id: int) -> Tensor:
    """A copy of the ids with another token at position 0."""
    return torch.cat([torch.full_like(token_ids_BT[:, :1], token_id), token_ids_BT[:, 1:]], 1)


class TextTransformer(nn.Module):
    """Embeddings and layers. With `shared`, all modules but self-attention are that transformer's own."""

    def __init__(self, config: TextConfig, image_width: int, shared: "TextTransformer | None" = None):
        super().__init__()
        self.config = config
        self.embeddings: TextEmbeddings = shared.embeddings if shared else TextEmbeddings(config)
        self.encoder: TextLayers = TextLayers(config, image_width, shared.encoder if shared else None)

    @property
    def layers(self) -> "list[TextLayer]":
        return cast(list[TextLayer], list(self.encoder.layer))

    def forward(
        self,
        token_ids_BT: Tensor,
        rows: Rows,
        visible: Tensor,
        image: KeysValues | MatchedImages | None = None,
        first_only: bool = False,
        cache: Cache | None = None,
    ) -> Tensor:
        """(R, D) states of the rows; (B, D), the first token's, with `first_only`."""
        hidden_RD = self.embeddings(token_ids_BT, rows, cache.length if cache else 0)
        layers = self.layers
        for index, layer in enumerate(layers):
            seen = image.sources(index) if image else None
            past = (cache, index) if cache is not None else None
            inputs = (hidden_RD, rows, visible, seen, first_only and index == len(layers) - 1, past)
            if self.config.checkpoint_activations and torch.is_grad_enabled():
                hidden_RD = checkpoint(layer, *inputs, use_reentrant=False)
            else:
                hidden_RD = layer(*inputs)
        return hidden_RD


class TextDecoder(nn.Module):
    def __init__(self, config: TextConfig, image_width: int, shared: TextTransformer):
        super().__init__()
        self.bert = TextTransformer(config, image_width, shared)
        self.cls = nn.ModuleDict({"predictions": LMHead(config, shared.embeddings.word_embeddings)})


class TextLayers(nn.Module):
    def __init__(self, config: TextConfig, image_width: int, shared: "TextLayers | None"):
        super().__init__()
        twins = cast(list[TextLayer], list(shared.layer)) if shared else [None] * config.layers
        self.layer: nn.ModuleList = nn.ModuleList(TextLayer(config, image_width, twin) for twin in twins)


class TextEmbeddings(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocabulary, config.width)
        self.position_embeddings = nn.Embedding(config.max_positions, config.width)
        self.LayerNorm = nn.LayerNorm(config.width, config.layer_norm_eps)
        self.dropout = config.dropout

    def forward(self, token_ids_BT: Tensor, rows: Rows, past: int) -> Tensor:
        end = past + token_ids_BT.shape[1]
        positions = self.position_embeddings.weight
        if end > len(positions):
            raise ValueError(f"text of {end} tokens: the position table (text.max_positions) holds {len(positions)}")
        hidden_RD = self.LayerNorm(rows.pack(self.word_embeddings(token_ids_BT) + positions[past:end]))
        return dropout(hidden_RD, self.dropout, self.training)


class TextLayer(nn.Module):
    def __init__(self, config: TextConfig, image_width: int, shared: "TextLayer | None"):
        super().__init__()
        self.attention = TextAttention(config, config.width)
        self.crossattention: TextAttention = shared.crossattention if shared else TextAttention(config, image_width)
        self.intermediate: Intermediate = shared.intermediate if shared else Intermediate(config)
        self.output: Residual = shared.output if shared else Residual(config.ffn_width, config)

    def forward(
        self,
        hidden_RD: Tensor,
        rows: Rows,
        visible: Tensor,
        image: list[Source] | None,
        first_only: bool,
        past: tuple[Cache, int] | None,
    ) -> Tensor:
        key_BHSd, value_BHSd = self.attention.keys_values(hidden_RD, rows)
        if past:
            cache, index = past
            key_BHSd, value_BHSd = cache.extend(index, key_BHSd, value_BHSd)
        if first_only:
            hidden_RD, visible, rows = rows.first(hidden_RD), visible[..., :1, :], Rows(rows.batch, 1)
        hidden_RD = self.attention(hidden_RD, rows, [Source(key_BHSd, value_BHSd)], visible)
        if image:
            hidden_RD = self.crossattention(hidden_RD, rows, image)
        return self.output(self.intermediate(hidden_RD), hidden_RD)


class Intermediate(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.dense = nn.Linear(config.width, config.ffn_width)

    def forward(self, hidden_RD: Tensor) -> Tensor:
        return gelu(self.dense(hidden_RD))


class TextAttention(nn.Module):
    """Multi-head attention with its residual; `self` holds the projections, as the stock names want it."""

    def __init__(self, config: TextConfig, source_width: int):
        super().__init__()
        self.heads = config.heads
        self.dropout = config.attention_dropout
        self.self = Projections(config.width, source_width)
        self.output = Residual(config.width, config)

    def keys_values(self, source: Tensor, rows: Rows | None = None) -> tuple[Tensor, Tensor]:
        """Both (B, H, S, d), of (B, S, D) states or of rows."""
        return self._split(self.self.key(source), rows), self._split(self.self.value(source), rows)

    def forward(self, hidden_RD: Tensor, rows: Rows, sources: list[Source], visible: Tensor | None = None) -> Tensor:
        """The residual stream after attending."""
        query_BHTd = self._split(self.self.query(hidden_RD), rows)
        dropout_rate = self.dropout if self.training else 0.0
        mixed_BTD = attend_to(query_BHTd, sources, visible, dropout_rate)
        return self.output(rows.pack(mixed_BTD), hidden_RD)

    def _split(self, states: Tensor, rows: Rows | None) -> Tensor:
        return (rows.unpack(states) if rows else states).unflatten(-1, (self.heads, -1)).transpose(1, 2)


class Projections(nn.Module):
    def __init__(self, width: int, source_width: int):
        super().__init__()
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(source_width, width)
        self.value = nn.Linear(source_width, width)


class Residual(nn.Module):
    """Linear, dropout, then LayerNorm of the sum with what went in (post-norm, as BERT)."""

    def __init__(self, from_width: int, config: TextConfig):
        super().__init__()
        self.dense = nn.Linear(from_width, config.width)
        self.LayerNorm = nn.LayerNorm(config.width, config.layer_norm_eps)
        self.dropout = config.dropout

    def forward(self, branch: Tensor, hidden: Tensor) -> Tensor:
        return self.LayerNorm(dropout(self.dense(branch), self.dropout, self.training) + hidden)


class LMHead(nn.Module):
    """BERT's prediction head; its projection is the word table, its bias has two stock names."""

    def __init__(self, config: TextConfig, word_embeddings: nn.Embedding):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(config.vocabulary))
        self.transform = Transform(config)
        self.decoder = nn.Linear(config.width, config.vocabulary)
        self.decoder.weight = word_embeddings.weight
        self.decoder.bias = self.bias

    def forward(self, hidden: Tensor) -> Tensor:
        return self.decoder(self.transform(hidden))


class Transform(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.dense = nn.Linear(config.width, config.width)
        self.LayerNorm = nn.LayerNorm(config.width, config.layer_norm_eps)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.LayerNorm(gelu(self.dense(hidden)))
