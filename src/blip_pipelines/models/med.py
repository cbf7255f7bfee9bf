"""MED, the multimodal mixture of encoder and decoder (BLIP 3.1): one text transformer in three modes.

Unimodal encoder ([CLS], no image), image-grounded encoder ([ENC], cross-attention between self-attention and feed
forward, ITM head) and image-grounded decoder ([DEC], causal, LM head). Encoder and decoder share everything but their
self-attention: embeddings, cross-attention and feed forward are the same modules under two names, and the LM
projection is the word table. `named_parameters()` gives a shared one once, under its `text_encoder` name.

Parameters carry the names of the stock `transformers` BLIP classes, so an export is a selection of keys. What the
stock classes repeat is done once here: the image is projected to keys and values once for all that look at it, and
where only the first token's state is wanted the last layer computes that token alone.

Shapes: B batch, N image tokens, T text tokens, S keys, D width, E projection, H heads, d width of a head,
V vocabulary, R rows (the words of a batch, see `packing`).
"""

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, gelu, normalize
from torch.utils.checkpoint import checkpoint

from blip_pipelines.config import ConfigError, speed_only
from blip_pipelines.models.attention import at_least_float32, attend
from blip_pipelines.models.initialisation import initialise
from blip_pipelines.models.packing import Rows
from blip_pipelines.models.vision import VisionConfig, VisionTransformer

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


@dataclass(frozen=True)
class MedConfig:
    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    projection: int = 256
    initializer: Literal["fan_in", "bert"] = "fan_in"


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


class Decoding(nn.Module):
    """A text decoder that looks at keys and values: what writing texts needs of a model."""

    config: MedConfig
    text_decoder: "TextDecoder"

    def decode_hidden(
        self, token_ids_BT: Tensor, token_mask_BS: Tensor | None, image: KeysValues, cache: Cache | None = None
    ) -> Tensor:
        """(B, T, D) decoder states, of no meaning where there is padding; puts [DEC] at position 0 itself.

        Args:
            image: a row for each text, or for each run of as many texts, such as the beams of an image.
            token_mask_BS: bool, of the cached tokens and these; None if all of them are words.
            cache: of the tokens before these; this call adds these.
        """
        past = cache.length if cache else 0
        if past == 0:
            token_ids_BT = with_first(token_ids_BT, self.config.text.dec_id)
        tokens = token_ids_BT.shape[1]
        visible = torch.ones(tokens, past + tokens, dtype=torch.bool, device=token_ids_BT.device).tril(past)
        if token_mask_BS is not None:
            visible = visible & token_mask_BS[:, None, None]
        rows = Rows.of(token_ids_BT, token_mask_BS if cache is None else None)
        return rows.unpack(self.text_decoder.bert(token_ids_BT, rows, visible, image, cache=cache))

    def lm_head(self, hidden_RD: Tensor) -> Tensor:
        """(R, V) logits of any chosen decoder states; give it only the positions that have a target."""
        return self.text_decoder.cls["predictions"](hidden_RD)

    def decode_logits(
        self, token_ids_BT: Tensor, token_mask_BS: Tensor | None, image: KeysValues, cache: Cache | None = None
    ) -> Tensor:
        """(B, T, V) logits of the next token at every position."""
        return self.lm_head(self.decode_hidden(token_ids_BT, token_mask_BS, image, cache))


class Med(Decoding):
    """The model of BLIP; what it returns is this rank's rows."""

    def __init__(self, config: MedConfig, seed: int = 0):
        super().__init__()
        self.config = config
        text = config.text
        self.vision_model = VisionTransformer(config.vision)
        self.text_encoder = TextTransformer(text, config.vision.width)
        self.text_decoder = TextDecoder(text, config.vision.width, self.text_encoder)
        self.vision_proj = nn.Linear(config.vision.width, config.projection)
        self.text_proj = nn.Linear(text.width, config.projection)
        self.itm_head = nn.Linear(text.width, 2)
        initialise(self, config.initializer, seed)
        if config.initializer == "fan_in":
            head = cast(LMHead, self.text_decoder.cls["predictions"])
            nn.init.constant_(head.transform.LayerNorm.weight, LM_HEAD_GAIN)

    def encode_image(self, pixels: Tensor, class_only: bool = False) -> Tensor:
        """(B, N, D) image tokens; (B, 1, D) and cheaper with `class_only`, enough for `image_features`.

        Args:
            pixels: what `VisionTransformer` reads.
        """
        return self.vision_model(pixels, class_only)

    def image_features(self, image_BND: Tensor) -> Tensor:
        """(B, E) float32 of unit length, from the class token."""
        return normalize(at_least_float32(self.vision_proj(image_BND[:, 0])), dim=-1)

    def text_features(self, token_ids_BT: Tensor, token_mask_BT: Tensor) -> Tensor:
        """(B, E) float32 of unit length, from [CLS]; the mode that sees no image."""
        rows = Rows.of(token_ids_BT, token_mask_BT)
        first_BD = self.text_encoder(token_ids_BT, rows, token_mask_BT[:, None, None], first_only=True)
        return normalize(at_least_float32(self.text_proj(first_BD)), dim=-1)

    def project_image(self, image_BND: Tensor) -> KeysValues:
        """Cross-attention keys and values of every layer, for the encoder and the decoder alike."""
        return KeysValues([layer.crossattention.keys_values(image_BND) for layer in self.text_encoder.layers])

    def match_logits(self, token_ids_BT: Tensor, token_mask_BT: Tensor, image: KeysValues | MatchedImages) -> Tensor:
        """(B, 2) float32 logits of not matching and matching; puts [ENC] at position 0 itself."""
        token_ids_BT = with_first(token_ids_BT, self.config.text.enc_id)
        rows = Rows.of(token_ids_BT, token_mask_BT)
        first_BD = self.text_encoder(token_ids_BT, rows, token_mask_BT[:, None, None], image, first_only=True)
        return at_least_float32(self.itm_head(first_BD))


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
