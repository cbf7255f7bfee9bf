"""Captions from BLIP-2's frozen language model, by the searches that write MED's (`generation`).

Stock `generate` reads the whole prompt again for every image and beam, and carries finished captions along. Here what
stands before the picture is read once, the rest once an image, and a finished caption leaves the batch.

Shapes: B images, Q queries, S tokens of a prefix, T tokens, W width of the embeddings, H heads, d width of a head,
V vocabulary, R rows.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache

from blip_pipelines.inference.generation import Captions, GenerationConfig, generate
from blip_pipelines.models.blip2 import Blip2
from blip_pipelines.models.keys_values import Cache, KeysValues
from blip_pipelines.models.text import TextConfig

NO_TOKEN = -1  # a language model may pad with the token that ends an answer, and then the two could not be told apart


@dataclass(frozen=True)
class Sizes:
    """What a search asks: the ids that begin and end an answer, and how long it may be."""

    text: TextConfig


class LanguageDecoder:
    """A `generation.Decoder` around the language model of a BLIP-2; its images are what `prefix` gives.

    Args:
        around: ids before and after the soft prompts; None takes those that the model was trained with.
    """

    def __init__(self, blip2: Blip2, around: tuple[list[int], list[int]] | None = None):
        self.language = blip2.language
        before_ids, self.after_ids = around if around is not None else (blip2.before_ids, blip2.after_ids)
        self.model: Any = self.language.model
        self.device = self.model.device
        self._before_1SW = self.language.embed(torch.tensor([before_ids], dtype=torch.long, device=self.device))
        self._past = KeysValues([])
        if self.language.decoder_only and before_ids:
            self._past = self.language.remember(self._before_1SW)
        self.config = Sizes(self._text_config(len(before_ids) + blip2.former.config.queries + len(self.after_ids)))

    def prefix(self, soft_BQW: Tensor) -> KeysValues:
        """What the model reads of each picture, one "key" a token, so that rows can be selected."""
        batch = len(soft_BQW)
        after_ids = torch.tensor([self.after_ids], dtype=torch.long, device=self.device).expand(batch, -1)
        parts = [soft_BQW.to(self.language.dtype), self.language.embed(after_ids)]
        if not self.language.decoder_only:
            parts.insert(0, self._before_1SW.expand(batch, -1, -1))
        prefix_B1SW = torch.cat(parts, 1)[:, None]
        return KeysValues([(prefix_B1SW, prefix_B1SW[..., :0])])

    def decode_hidden(
        self, token_ids_BT: Tensor, token_mask_BS: Tensor | None, image: KeysValues, /, cache: Cache | None = None
    ) -> Tensor:
        """(B, T', W) states, of which the last is asked for the token after these.

        Args:
            token_mask_BS: must be None, all of them are words.
            cache: of the tokens before these, the prefix among them; this call adds these.
        """
        if token_mask_BS is not None:
            raise ValueError("a language model is given words only")
        cache = Cache() if cache is None else cache
        with torch.autocast(self.device.type, enabled=False):
            if self.language.decoder_only:
                return self._go_on(token_ids_BT, image, cache)
            return self._answer(token_ids_BT, image, cache)

    def lm_head(self, hidden_RW: Tensor, /) -> Tensor:
        """(R, V)."""
        return self.language.lm_head(hidden_RW)

    def _go_on(self, token_ids_BT: Tensor, image: KeysValues, cache: Cache) -> Tensor:
        if cache.length:
            inputs, known = self.language.embed(token_ids_BT), cache.layers
        else:  # the start token is only a place: the state after the prefix is asked for the first word
            inputs = torch.cat([image.layers[0][0][:, 0], self.language.embed(token_ids_BT[:, 1:])], 1)
            known = [
                (key.expand(len(inputs), -1, -1, -1), value.expand(len(inputs), -1, -1, -1))
                for key, value in self._past.layers
            ]
        stock = _stock_cache(known, self.model.config)
        states = self.model.base_model(inputs_embeds=inputs, past_key_values=stock, use_cache=True).last_hidden_state
        cache.layers = _layers(stock)
        return states

    def _answer(self, token_ids_BT: Tensor, image: KeysValues, cache: Cache) -> Tensor:
        """Of an encoder-decoder: the cache holds the layers' keys and values of the words, then those of the prefix."""
        half = len(cache.layers) // 2
        both = EncoderDecoderCache(_stock_cache(cache.layers[:half]), _stock_cache(cache.layers[half:]))
        read_BSW = image.layers[0][0][:, 0]
        if not cache.length:
            read_BSW = self.model.get_encoder()(inputs_embeds=read_BSW).last_hidden_state
        else:  # known by its keys and values; only the shape is looked at
            read_BSW = read_BSW.new_empty(len(token_ids_BT), *read_BSW.shape[1:])
        states = self.model.get_decoder()(
            input_ids=token_ids_BT, encoder_hidden_states=read_BSW, past_key_values=both, use_cache=True
        ).last_hidden_state
        cache.layers = _layers(both.self_attention_cache) + _layers(both.cross_attention_cache)
        return states

    def _text_config(self, prefix_tokens: int) -> TextConfig:
        tokenizer, config = self.language.tokenizer, self.model.config
        room = getattr(config, "max_position_embeddings", None) or 1 << 20  # T5 has relative positions
        return TextConfig(
            vocabulary=config.vocab_size,
            max_positions=max(room - prefix_tokens, 0),
            cls_id=tokenizer.start,
            dec_id=tokenizer.start,
            enc_id=tokenizer.start,
            sep_id=tokenizer.end,
            pad_id=NO_TOKEN,
        )


@torch.no_grad()
def write_captions(
    blip2: Blip2,
    pixels: Tensor,
    config: GenerationConfig,
    *,
    around: tuple[list[int], list[int]] | None = None,
    prompt: str = "",
    seed: int = 0,
    draw_ids: Tensor | None = None,
) -> Captions:
    """A caption for each image, see `generation.generate`.

    Args:
        pixels: what the tower reads or, where the model has none, gives; on its device.
        around: ids before and after the picture, in place of the model's own.
        prompt: text that every caption continues; it is no part of what is returned.
    """
    decoder = LanguageDecoder(blip2, around)
    tokenizer: Any = blip2.language.tokenizer  # the same face as `CaptionTokenizer`
    prefix = decoder.prefix(blip2.soft_prompts(blip2.see(pixels)))
    return generate(decoder, prefix, tokenizer, config, prompt=prompt, seed=seed, draw_ids=draw_ids)


def _stock_cache(layers: list[tuple[Tensor, Tensor]], config: Any = None) -> DynamicCache:
    cache: Any = DynamicCache(config=config)
    for index, (key, value) in enumerate(layers):
        cache.update(key[:, :, :0], value[:, :, :0], index)
        cache.layers[index].keys, cache.layers[index].values = key, value  # as they are: an update would copy them
    return cache


def _layers(cache: Any) -> list[tuple[Tensor, Tensor]]:
    return [(layer.keys, layer.values) for layer in cache.layers]
