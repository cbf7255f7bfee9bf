"""The Q-Former (BLIP-2 3.1): learnt queries read a frozen image encoder; the same layers read text.

Queries and text are two streams of one self-attention, each with a feed forward of its own; cross-attention to the
image is for queries alone, in every second layer. What a stream sees is what a loss asks for: ITC runs the two apart
(the unimodal mask), ITM together (bi-directional), ITG the text after the queries (multimodal causal), on keys and
values that the queries left behind when they ran for ITC, so they are computed once a step.

Parameters carry the names of the stock `transformers.Blip2ForImageTextRetrieval`, so an export is a selection of keys,
but for two: `ln_vision`, the trainable LayerNorm on what the image encoder gives, is `vision_model.post_layernorm`
there; the LM head (`cls`) has no place there. Before layer 0's cross-attention all images have the same queries, so
without dropout they are computed for one.

Shapes: B batch, Q queries, T text tokens, S keys, N image tokens, D width, E projection, H heads, d width of a head,
V vocabulary, R rows (the words of a batch, see `packing`).
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, normalize
from torch.utils.checkpoint import checkpoint

from blip_pipelines.config import ConfigError
from blip_pipelines.models.attention import at_least_float32
from blip_pipelines.models.initialisation import EMBEDDING_STD, initialise
from blip_pipelines.models.keys_values import Cache, KeysValues, MatchedImages, Source, attend_to
from blip_pipelines.models.packing import Rows
from blip_pipelines.models.text import LM_HEAD_GAIN, Intermediate, LMHead, Projections, Residual, TextConfig, with_first

if TYPE_CHECKING:
    from blip_pipelines.data.tokens import CaptionTokenizer
    from blip_pipelines.models.frozen_tower import FrozenTower

Pair = tuple[Tensor, Tensor]  # keys and values, each (B, H, S, d)
QUERY_STD = 0.02


@dataclass(frozen=True)
class QFormerConfig:
    """Sizes; the defaults are BLIP-2's: BERT-base with [DEC] (it has no [ENC]), reading EVA ViT-g.

    A block `text` that is given is a `TextConfig` of its own defaults: say its dropout.
    """

    text: TextConfig = field(
        default_factory=lambda: TextConfig(vocabulary=30523, enc_id=30522, dropout=0.1, attention_dropout=0.1)
    )
    queries: int = 32
    cross_attention_every: int = 2
    image_width: int = 1408
    image_norm_eps: float = 1e-6
    projection: int = 256
    initializer: Literal["fan_in", "bert"] = "bert"

    def __post_init__(self) -> None:
        for name in ("queries", "cross_attention_every", "projection"):
            if getattr(self, name) < 1:
                raise ConfigError(f"qformer.{name}: {getattr(self, name)} is less than 1")

    def fit(self, tokenizer: "CaptionTokenizer") -> "QFormerConfig":
        """The same sizes with the vocabulary and the special ids of a tokenizer."""
        return replace(self, text=self.text.fit(tokenizer))

    def behind(self, tower: "FrozenTower") -> "QFormerConfig":
        """The same sizes, reading what a tower gives."""
        return replace(self, image_width=tower.width, image_norm_eps=tower.norm_eps)

    def has_cross_attention(self, layer: int) -> bool:
        return layer % self.cross_attention_every == 0


class QFormer(nn.Module):
    """Queries, text and the heads of the three losses of stage 1; what it returns is this rank's rows."""

    def __init__(self, config: QFormerConfig, seed: int = 0):
        super().__init__()
        self.config = config
        text = config.text
        self.query_tokens = nn.Parameter(torch.empty(1, config.queries, text.width))
        self.ln_vision = nn.LayerNorm(config.image_width, config.image_norm_eps)
        self.embeddings = nn.ModuleDict(
            {
                "word_embeddings": nn.Embedding(text.vocabulary, text.width),
                "position_embeddings": nn.Embedding(text.max_positions, text.width),
            }
        )
        layers = nn.ModuleList(QFormerLayer(config, index) for index in range(text.layers))
        self.qformer = nn.ModuleDict(
            {
                "layernorm": nn.LayerNorm(text.width, text.layer_norm_eps),
                "encoder": nn.ModuleDict({"layer": layers}),
            }
        )
        self.vision_projection = nn.Linear(text.width, config.projection)
        self.text_projection = nn.Linear(text.width, config.projection)
        self.itm_head = nn.Linear(text.width, 2)
        words = cast(nn.Embedding, self.embeddings["word_embeddings"])
        head = LMHead(text, words)
        self.cls = nn.ModuleDict({"predictions": head})
        initialise(self, config.initializer, seed)
        if config.initializer == "fan_in":
            nn.init.constant_(head.transform.LayerNorm.weight, LM_HEAD_GAIN)
        with torch.no_grad():
            self.query_tokens.mul_(QUERY_STD / EMBEDDING_STD[config.initializer])

    @property
    def layers(self) -> "list[QFormerLayer]":
        return cast("list[QFormerLayer]", list(cast(nn.ModuleDict, self.qformer["encoder"])["layer"].children()))

    @property
    def query_rms(self) -> float:
        """Root mean square of the states that `encode_queries` gives, as its last LayerNorm sets it."""
        norm = self.layers[-1].output_query.LayerNorm
        return (norm.weight.square() + norm.bias.square()).mean().sqrt().item()

    def train_queries(self, with_text: bool = False) -> None:
        """Let train what `encode_queries` uses, or `encode_with_text`, and nothing else: after stage 1."""
        last = f"qformer.encoder.layer.{self.config.text.layers - 1}."
        for name, parameter in self.named_parameters():
            is_read = with_text and name.startswith(("embeddings.", "qformer.")) and not name.startswith(last)
            parameter.requires_grad_(is_read or not serves_text_alone(name))

    def project_image(self, image_BND: Tensor) -> KeysValues:
        """Keys and values of the layers that attend to the image, once for all passes of a step.

        Args:
            image_BND: what the frozen encoder gives, before its last LayerNorm (`frozen_tower`).
        """
        image_BND = self.ln_vision(image_BND.to(self.ln_vision.weight.dtype))
        return KeysValues(
            [layer.crossattention.keys_values(image_BND) for layer in self.layers if layer.crossattention is not None]
        )

    def encode_queries(self, image: KeysValues, cache: bool = False) -> tuple[Tensor, KeysValues]:
        """(B, Q, D) states of queries that see no text, and with `cache` the self-attention keys and values that
        they leave in every layer, for `decode_hidden`.
        """
        batch = len(image)
        queries_BQD, left = self._start_queries(batch), KeysValues([])
        for layer, seen, _ in self._walk(image):
            queries_BQD, _, own = self._run(layer, batch, queries_BQD, None, None, None, seen, None, "none")
            if cache:
                left.layers.append((own[0].expand(batch, -1, -1, -1), own[1].expand(batch, -1, -1, -1)))
        return queries_BQD, left

    def encode_text(self, token_ids_BT: Tensor, token_mask_BT: Tensor, first_only: bool = True) -> Tensor:
        """(B, D), the state of [CLS], of text that sees no queries; (B, T, D) without `first_only`."""
        rows = Rows.of(token_ids_BT, token_mask_BT)
        text_RD = self._start_text(token_ids_BT, rows)
        for layer, _, is_last in self._walk():
            keeps = "first" if first_only and is_last else "all"
            visible = token_mask_BT[:, None, None]
            _, text_RD, _ = self._run(layer, rows.batch, None, text_RD, rows, visible, None, None, keeps)
        return text_RD if first_only else rows.unpack(text_RD)

    def image_features(self, queries_BQD: Tensor) -> Tensor:
        """(B, Q, E) of unit length, at least float32; ITC takes the query that is nearest to the text."""
        return normalize(at_least_float32(self.vision_projection(queries_BQD)), dim=-1)

    def text_features(self, token_ids_BT: Tensor, token_mask_BT: Tensor) -> Tensor:
        """(B, E) of unit length, at least float32, from [CLS], which sees no queries."""
        text_BD = self.encode_text(token_ids_BT, token_mask_BT)
        return normalize(at_least_float32(self.text_projection(text_BD)), dim=-1)

    def encode_with_text(
        self, token_ids_BT: Tensor, token_mask_BT: Tensor, image: KeysValues | MatchedImages
    ) -> Tensor:
        """(B, Q, D) states of queries that see the text, and it them: ITM, and instructions (InstructBLIP 2.3).

        Args:
            image: a row for each text, or for each run of as many texts.
        """
        rows = Rows.of(token_ids_BT, token_mask_BT)
        queries_BQD, text_RD = self._start_queries(rows.batch), self._start_text(token_ids_BT, rows)
        visible = torch.cat([token_mask_BT.new_ones(len(token_mask_BT), self.config.queries), token_mask_BT], 1)
        for layer, seen, is_last in self._walk(image):
            inputs = queries_BQD, text_RD, rows, visible[:, None, None], seen, None, "none" if is_last else "all"
            queries_BQD, text_RD, _ = self._run(layer, rows.batch, *inputs)
        return queries_BQD

    def match_logits(self, token_ids_BT: Tensor, token_mask_BT: Tensor, image: KeysValues | MatchedImages) -> Tensor:
        """(B, 2) logits of not matching and matching, at least float32: the mean over queries of each one's logits."""
        return at_least_float32(self.itm_head(self.encode_with_text(token_ids_BT, token_mask_BT, image))).mean(1)

    def decode_hidden(
        self, token_ids_BT: Tensor, token_mask_BS: Tensor | None, queries: KeysValues, cache: Cache | None = None
    ) -> Tensor:
        """(B, T, D) states of text that sees all queries and what is before it, of no meaning where there is padding;
        puts [DEC] at position 0 itself.

        Args:
            token_mask_BS: bool, of the cached tokens and these; None if all of them are words.
            queries: what `encode_queries` left, a row for each text or for each run of as many, such as beams.
            cache: of the tokens before these; this call adds these.
        """
        past, tokens = cache.length if cache else 0, token_ids_BT.shape[1]
        if past == 0:
            token_ids_BT = with_first(token_ids_BT, self.config.text.dec_id)
        shape = tokens, self.config.queries + past + tokens
        visible = torch.ones(shape, dtype=torch.bool, device=token_ids_BT.device).tril(self.config.queries + past)
        if token_mask_BS is not None:
            queries_BQ = token_mask_BS.new_ones(len(token_mask_BS), self.config.queries)
            visible = visible & torch.cat([queries_BQ, token_mask_BS], 1)[:, None, None]
        rows = Rows.of(token_ids_BT, token_mask_BS if cache is None else None)
        text_RD = self._start_text(token_ids_BT, rows, past)
        for index, (layer, _, _) in enumerate(self._walk()):
            before = repeat(queries.layers[index], rows.batch)
            if past and cache is not None:
                before = join(before, cache.layers[index])
            _, text_RD, own = self._run(layer, rows.batch, None, text_RD, rows, visible, None, before, "all")
            if cache is not None:
                cache.extend(index, *own)
        return rows.unpack(text_RD)

    def lm_head(self, hidden_RD: Tensor) -> Tensor:
        """(R, V) logits of any chosen decoder states; give it only the positions that have a target."""
        return self.cls["predictions"](hidden_RD)

    def attention_to_image(self, image: KeysValues) -> Tensor:
        """(C, B, Q, N) float32 weights, the mean over heads, with which queries look at the image in each of the C
        layers that do; for drawing.
        """
        queries_BQD, weights = self._start_queries(len(image)), []
        for layer, seen, _ in self._walk(image):
            if seen is not None and layer.crossattention is not None:
                own = Source(*layer.attention.keys_values(queries_BQD))
                mixed_BQD = layer.attention(queries_BQD, None, [own], len(own.key))
                weights.append(layer.crossattention.weights(mixed_BQD, seen[0].key).mean(1))
            queries_BQD, _, _ = layer(len(image), queries_BQD, None, None, None, seen, None, "none")
        return torch.stack(weights)

    def _start_queries(self, batch: int) -> Tensor:
        queries_1QD = self.qformer["layernorm"](self.query_tokens)
        rate = self.config.text.dropout
        if self.training and (rate or self.config.text.attention_dropout):
            queries_1QD = queries_1QD.expand(batch, -1, -1)
        return dropout(queries_1QD, rate, self.training)

    def _start_text(self, token_ids_BT: Tensor, rows: Rows, past: int = 0) -> Tensor:
        end, positions = past + token_ids_BT.shape[1], cast(Tensor, self.embeddings["position_embeddings"].weight)
        if end > len(positions):
            raise ValueError(f"text of {end} tokens: the position table (text.max_positions) holds {len(positions)}")
        words_RD = rows.pack(self.embeddings["word_embeddings"](token_ids_BT) + positions[past:end])
        return dropout(self.qformer["layernorm"](words_RD), self.config.text.dropout, self.training)

    def _walk(
        self, image: KeysValues | MatchedImages | None = None
    ) -> "Iterator[tuple[QFormerLayer, list[Source] | None, bool]]":
        """The layers, each with what it sees of the image if it looks at it, and whether it is the last."""
        looks = 0
        for index, layer in enumerate(layers := self.layers):
            seen = None
            if image is not None and layer.crossattention is not None:
                seen, looks = image.sources(looks), looks + 1
            yield layer, seen, index == len(layers) - 1

    def _run(self, layer: "QFormerLayer", *inputs: object) -> "tuple[Tensor, Tensor, Pair]":
        """The layer's outputs, kept or computed again in the backward pass as the config says."""
        if self.config.text.checkpoint_activations and torch.is_grad_enabled():
            return checkpoint(layer, *inputs, use_reentrant=False)
        return layer(*inputs)


class QFormerLayer(nn.Module):
    """One self-attention over both streams, cross-attention for queries, a feed forward for each."""

    def __init__(self, config: QFormerConfig, index: int):
        super().__init__()
        text = config.text
        self.attention = QFormerAttention(text, text.width)
        self.crossattention: QFormerAttention | None = None
        if config.has_cross_attention(index):
            self.crossattention = QFormerAttention(text, config.image_width)
        self.intermediate = Intermediate(text)
        self.output = Residual(text.ffn_width, text)
        self.intermediate_query = Intermediate(text)
        self.output_query = Residual(text.ffn_width, text)

    def forward(
        self,
        batch: int,
        queries_BQD: Tensor | None,
        text_RD: Tensor | None,
        rows: Rows | None,
        visible: Tensor | None,
        image: list[Source] | None,
        before: Pair | None,
        keeps: Literal["all", "first", "none"],
    ) -> tuple[Tensor | None, Tensor | None, Pair]:
        """The streams after this layer, and the keys and values that they leave.

        Args:
            batch: B; of queries there may be one row for all, as long as nothing told them apart.
            queries_BQD, text_RD: either or both; queries come first.
            visible: which keys (those before, queries, text) a token may see; None hides nothing.
            before: keys and values that come before both.
            keeps: of the text stream, what is computed to the end: all, the first tokens, or nothing but its keys.
        """
        parts = [before] if before is not None else []
        if queries_BQD is not None:
            parts.append(self.attention.keys_values(queries_BQD))
        if text_RD is not None:
            parts.append(self.attention.keys_values(text_RD, rows))
        source = Source(*join(*parts))
        if queries_BQD is not None:
            queries_BQD = self.attention(queries_BQD, None, [source], len(source.key), visible)
            if self.crossattention is not None and image is not None:
                queries_BQD = self.crossattention(queries_BQD, None, image, batch)
            queries_BQD = self.output_query(self.intermediate_query(queries_BQD), queries_BQD)
        if text_RD is not None and rows is not None and keeps != "none":
            if keeps == "first":
                text_RD, rows = rows.first(text_RD), Rows(rows.batch, 1)
            text_RD = self.attention(text_RD, rows, [source], batch, visible)
            text_RD = self.output(self.intermediate(text_RD), text_RD)
        return queries_BQD, text_RD, parts[-1]


class QFormerAttention(nn.Module):
    """Multi-head attention with its residual, for rows of text or, without `rows`, for (B, Q, D) queries."""

    def __init__(self, config: TextConfig, source_width: int):
        super().__init__()
        self.heads = config.heads
        self.dropout = config.attention_dropout
        self.attention = Projections(config.width, source_width)
        self.output = Residual(config.width, config)

    def keys_values(self, source: Tensor, rows: Rows | None = None) -> Pair:
        return self._split(self.attention.key(source), rows), self._split(self.attention.value(source), rows)

    def forward(
        self, hidden: Tensor, rows: Rows | None, sources: list[Source], batch: int, visible: Tensor | None = None
    ) -> Tensor:
        query_BHTd = self._split(self.attention.query(hidden), rows).expand(batch, -1, -1, -1)
        mixed_BTD = attend_to(query_BHTd, sources, visible, self.dropout if self.training else 0.0)
        return self.output(rows.pack(mixed_BTD) if rows else mixed_BTD, hidden)

    def weights(self, hidden_BQD: Tensor, key_BHSd: Tensor) -> Tensor:
        """(B, H, Q, S) float32, the shares with which queries attend."""
        query_BHQd = self._split(self.attention.query(hidden_BQD), None)
        scores_BHQS = (query_BHQd @ key_BHSd.transpose(-1, -2)).float() * query_BHQd.shape[-1] ** -0.5
        return scores_BHQS.softmax(-1)

    def _split(self, states: Tensor, rows: Rows | None) -> Tensor:
        return (rows.unpack(states) if rows else states).unflatten(-1, (self.heads, -1)).transpose(1, 2)


def join(*parts: Pair) -> Pair:
    """Keys and values in a row; a part of one sample is that of all."""
    if len(parts) == 1:
        return parts[0]
    batch = max(len(key) for key, _ in parts)
    keys, values = ([part.expand(batch, -1, -1, -1) for part in side] for side in zip(*parts, strict=True))
    return torch.cat(keys, 2), torch.cat(values, 2)


def repeat(pair: Pair, batch: int) -> Pair:
    """Each row as often as makes `batch` of them."""
    key, value = (part.repeat_interleave(batch // len(part), 0) if len(part) < batch else part for part in pair)
    return key, value


TEXT_ALONE = re.compile(
    r"(embeddings|cls|vision_projection|text_projection|itm_head)\.|.*\.\d+\.(intermediate|output)\."
)


def serves_text_alone(parameter: str) -> bool:
    """Whether queries that see no text never use a parameter of `QFormer`, by its name there: what stage 2 leaves."""
    return TEXT_ALONE.match(parameter) is not None
