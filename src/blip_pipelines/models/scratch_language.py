"""A small random language model, for trying the chain where no pretrained one is at hand.

A LLaMA like the embedded default's, too small to know anything, that reads and writes the word pieces of the captions:
it has no package and no network to wait for. It stays frozen like any other, so a Q-Former learns to steer noise.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from blip_pipelines.data.tokens import CaptionTokenizer


@dataclass(frozen=True)
class ScratchConfig:
    """Sizes of the random model, and the seed of its weights."""

    width: int = 64
    layers: int = 2
    heads: int = 4
    ffn_width: int = 128
    seed: int = 0


def scratch_llama(config: ScratchConfig, tokenizer: CaptionTokenizer, dtype: torch.dtype) -> LlamaForCausalLM:
    """In evaluation mode; starts a text with [DEC] and ends it with [SEP], as the tokenizer does."""
    stock = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.width,
        intermediate_size=config.ffn_width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        max_position_embeddings=512,
        initializer_range=config.width**-0.5,  # the states of a new LLaMA's 0.02 would hardly move at this width
        tie_word_embeddings=True,
        bos_token_id=tokenizer.dec,
        eos_token_id=tokenizer.sep,
        pad_token_id=tokenizer.pad,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model: Any = LlamaForCausalLM(stock)
    return model.to(dtype).eval()
