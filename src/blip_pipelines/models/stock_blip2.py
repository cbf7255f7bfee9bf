"""A BLIP-2 or InstructBLIP of ours as the stock class that computes the same: names, configuration, folders.

| what | stock class |
|---|---|
| after stage 1 | `Blip2ForImageTextRetrieval` |
| with a language model | `Blip2ForConditionalGeneration` |
| with one, and a Q-Former that reads instructions | `InstructBlipForConditionalGeneration` |
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    Blip2Processor,
    BlipImageProcessorPil,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    PreTrainedModel,
)

from blip_pipelines.data.tokens import CaptionTokenizer
from blip_pipelines.models.blip2 import Blip2
from blip_pipelines.models.exports import quietly
from blip_pipelines.models.frozen_tower import FrozenTower
from blip_pipelines.models.precision import Precision, dtype_of
from blip_pipelines.models.qformer import QFormer
from blip_pipelines.models.vision import VisionConfig

NORM = "vision_model.post_layernorm."


def stock_name(name: str, instructs: bool = False) -> str:
    """The stock name of a parameter of our `QFormer`.

    Args:
        instructs: in `InstructBlipForConditionalGeneration`, whose Q-Former has the tables of its text.
    """
    if name.startswith("ln_vision."):
        return NORM + name.removeprefix("ln_vision.")
    if instructs and name.startswith("embeddings."):
        return f"qformer.{name}"
    if instructs:
        return name.replace("qformer.layernorm.", "qformer.embeddings.layernorm.")
    return name


def stock_config(former: QFormer, vision: VisionConfig, instructs: bool = False, **parts: Any) -> Any:
    """Our configuration in the words of stock `transformers`."""
    config, text = former.config, former.config.text
    values: dict[str, Any] = dict(
        vision_config={
            "hidden_size": vision.width,
            "intermediate_size": vision.mlp_width,
            "num_hidden_layers": vision.layers,
            "num_attention_heads": vision.heads,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "layer_norm_eps": vision.layer_norm_eps,
            "initializer_range": 0.02,  # the default of 1e-10 would be unusable to whoever starts anew from it
        },
        qformer_config={
            "vocab_size": text.vocabulary,
            "hidden_size": text.width,
            "num_hidden_layers": text.layers,
            "num_attention_heads": text.heads,
            "intermediate_size": text.ffn_width,
            "hidden_dropout_prob": text.dropout,
            "attention_probs_dropout_prob": text.attention_dropout,
            "max_position_embeddings": text.max_positions,
            "layer_norm_eps": text.layer_norm_eps,
            "pad_token_id": text.pad_id,
            "cross_attention_frequency": config.cross_attention_every,
        },
        num_query_tokens=config.queries,
        **parts,
    )
    if instructs:
        return InstructBlipConfig(**values)
    values["qformer_config"]["use_qformer_text_input"] = "text_config" not in parts
    return Blip2Config(**values, image_text_hidden_size=config.projection)


def save_retrieval(
    former: QFormer, folder: Path, tower: FrozenTower, vision: VisionConfig, tokenizer: CaptionTokenizer | None
) -> set[str]:
    """Write the stock folder; returns which parameters of the Q-Former it holds."""
    with torch.device("meta"):  # no memory, and no draw from the generator of a training run
        stock = Blip2ForImageTextRetrieval(stock_config(former, vision))
    held = _fill(stock, former, tower)
    _save(stock, folder)
    if tokenizer is not None:
        tokenizer.save(folder)
        if tower.stem is None:
            Blip2Processor(_image_processor(vision), copy.deepcopy(tokenizer.stock)).save_pretrained(folder)
    return held


def save_generation(
    model: Blip2, folder: Path, tower: FrozenTower, vision: VisionConfig, former_tokenizer: CaptionTokenizer | None
) -> set[str]:
    """Write the stock folder; returns which parameters of the Q-Former it holds."""
    language, instructs = model.language, model.config.reads_instructions
    tokenizer: Any = copy.deepcopy(language.tokenizer.stock)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    image_token: int = tokenizer.convert_tokens_to_ids("<image>")
    text_config = copy.deepcopy(language.model.config)
    text_config.eos_token_id = language.tokenizer.end  # where the stock loop stops
    state = _with_room(language.model, image_token)
    text_config.vocab_size = max(text_config.vocab_size, image_token + 1)
    parts = {"text_config": text_config, "image_token_index": image_token}
    with torch.device("meta"):
        kind = InstructBlipForConditionalGeneration if instructs else Blip2ForConditionalGeneration
        stock = kind(stock_config(model.former, vision, instructs, **parts))
    projection = model.language_projection
    ours = {
        **{f"language_model.{name}": value for name, value in state.items()},
        "language_projection.weight": projection.weight * model.scale,
        "language_projection.bias": projection.bias * model.scale,
    }
    held = _fill(stock, model.former, tower, ours)
    _save(stock, folder)
    tokenizer.save_pretrained(folder)
    if tower.stem is None:
        queries: int = model.former.config.queries
        if not instructs:
            Blip2Processor(_image_processor(vision), tokenizer, queries).save_pretrained(folder)
        elif former_tokenizer is not None:
            theirs: Any = copy.deepcopy(former_tokenizer.stock)
            InstructBlipProcessor(_image_processor(vision), tokenizer, theirs, queries).save_pretrained(folder)
    return held


def read_language(source: str, precision: Precision) -> PreTrainedModel:
    """The language model alone out of a stock folder or hub id of any of these classes, or of its own."""
    whole: Any = AutoConfig.from_pretrained(source)
    config = getattr(whole, "text_config", whole)
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    names = {r"^language_model\.": ""}
    return kind.from_pretrained(source, config=config, dtype=dtype_of(precision), key_mapping=names)


def _fill(stock: nn.Module, former: QFormer, tower: FrozenTower, ours: Mapping[str, Tensor] | None = None) -> set[str]:
    """Give the stock class its weights, strictly; returns which parameters of the Q-Former it holds."""
    state = {f"vision_model.{name}": value for name, value in tower.vision_state().items()}
    names = {
        name: stock_name(name, isinstance(stock, InstructBlipForConditionalGeneration))
        for name in dict(former.named_parameters())
    }
    state |= {names[name]: value for name, value in former.named_parameters()}
    state |= ours or {}
    wanted = set(stock.state_dict())
    # Clones, for what shares memory cannot be saved.
    stock.load_state_dict({name: state[name].detach().clone() for name in wanted}, strict=True, assign=True)
    return {name for name in names if names[name] in wanted}


def _save(stock: Any, folder: Path) -> None:
    stock.tie_weights()
    with quietly():
        stock.save_pretrained(folder)


def _with_room(language: Any, image_token: int) -> dict[str, Tensor]:
    """Its weights, with a row in the tables for the token that stands for the picture: zeros, if they had none."""
    state, vocabulary = language.state_dict(), language.config.vocab_size
    ends = (language.get_input_embeddings(), language.get_output_embeddings())
    places = {parameter.data_ptr() for end in ends for parameter in end.parameters()}
    for name, value in state.items():
        if value.data_ptr() in places and image_token >= vocabulary:
            state[name] = torch.cat([value, value.new_zeros(image_token + 1 - vocabulary, *value.shape[1:])])
    return state


def _image_processor(vision: VisionConfig) -> BlipImageProcessorPil:
    size = {"height": vision.image_size, "width": vision.image_size}
    return BlipImageProcessorPil(size=size, image_mean=list(vision.mean), image_std=list(vision.std))
