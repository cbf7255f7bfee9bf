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

from dataclasses import dataclass, field
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from blip_pipelines.models.attention import at_least_float32
from blip_pipelines.models.initialisation import initialise
from blip_pipelines.models.keys_values import Cache, KeysValues, MatchedImages
from blip_pipelines.models.packing import Rows
from blip_pipelines.models.text import LM_HEAD_GAIN, LMHead, TextConfig, TextDecoder, TextTransformer, with_first
from blip_pipelines.models.vision import VisionConfig, VisionTransformer


@dataclass(frozen=True)
class MedConfig:
    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    projection: int = 256
    initializer: Literal["fan_in", "bert"] = "fan_in"


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
