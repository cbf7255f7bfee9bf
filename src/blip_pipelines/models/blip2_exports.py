"""A trained BLIP-2 as folders that stock `transformers` loads, and back.

`<folder>/retrieval` is a `Blip2ForImageTextRetrieval` (stage 1), `<folder>/generation` a
`Blip2ForConditionalGeneration` (stage 2): complete, no key missing or unexpected, equal outputs. `blip2.safetensors`
beside it has what the stock class has no place for: the LM head; after stage 2 the text side too, so that instruction
tuning finds it. `blip2.json` says the rest: our configuration, prompts as ids, temperature, how pixels are made,
hashes. A frozen stem is written beside it. Equal models give equal bytes.

An image encoder that the stock BLIP-2 cannot be (CLIP and SigLIP have other parts) is named by source and hash; then
there is no stock folder, and `blip2.safetensors` has everything else.
"""

import copy
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    Blip2Processor,
    BlipImageProcessorPil,
)
from transformers import (
    Blip2Config as StockConfig,
)

from blip_pipelines.config import read
from blip_pipelines.data.storage import StorageError, read_json, sha256_file, write_atomic, write_json
from blip_pipelines.data.tokens import CaptionTokenizer
from blip_pipelines.models.blip2 import Blip2, Blip2Config
from blip_pipelines.models.exports import BLIP2_NOTE, quietly
from blip_pipelines.models.frozen_tower import FrozenTower, TowerConfig, open_tower, take_norm, vision_tower
from blip_pipelines.models.language import LanguageModel
from blip_pipelines.models.qformer import QFormer, QFormerConfig
from blip_pipelines.models.starting_points import read_files
from blip_pipelines.models.stem import Stem
from blip_pipelines.models.vision import VisionConfig, VisionTransformer

REST = "blip2.safetensors"
NORM = "vision_model.post_layernorm."
PROJECTION = "projection."  # as it trains; the stock name is for the scaled one


@dataclasses.dataclass(frozen=True)
class ExportedBlip2:
    """What `load_blip2` found in a folder; `model` after stage 2."""

    former: QFormer
    tower: FrozenTower
    tokenizer: CaptionTokenizer | None  # the Q-Former's
    image: dict[str, Any]  # how pixels are made: the values of `data.transforms.ImageConfig`
    temperature: float | None
    model: Blip2 | None


def export_blip2(
    former: QFormer,
    folder: Path,
    tower: FrozenTower,
    tokenizer: CaptionTokenizer | None,
    image: Mapping[str, Any],
    *,
    model: Blip2 | None = None,
    temperature: float | None = None,
) -> None:
    """Write the folder: after stage 1, or with the `model` around the Q-Former after stage 2.

    Args:
        tokenizer: the Q-Former's.
        image: values of `data.transforms.ImageConfig`; "size" must be what the tower reads.

    Raises:
        StorageError: the disk is full or cannot be written.
    """
    if image["size"] != tower.image_size:
        raise ValueError(f"image.size is {image['size']}, the image encoder reads {tower.image_size}; set it to that")
    kind, held = None, set()
    if tower.vision is not None and model is not None:
        kind, held = "generation", _save_generation(model, folder / "generation", tower, tower.vision)
    elif tower.vision is not None:
        kind, held = "retrieval", _save_retrieval(former, folder / "retrieval", tower, tower.vision, tokenizer)
    if tokenizer is not None:
        tokenizer.save(folder / "qformer_tokenizer")
    if model is not None and kind is None:
        model.language.model.save_pretrained(folder / "language")
        model.language.tokenizer.save(folder / "language")
    if tower.stem is not None:
        tower.stem.save(folder)
    rest = {name: value for name, value in former.named_parameters() if name not in held}
    if model is not None:
        rest |= {f"{PROJECTION}{name}": value for name, value in model.language_projection.named_parameters()}
    content = {name: value.detach().cpu().contiguous() for name, value in rest.items()}
    write_atomic(folder / REST, safetensors.torch.save(content))
    files = [*(sorted((folder / kind).glob("*.safetensors")) if kind else []), folder / REST]
    note = {
        "qformer": dataclasses.asdict(former.config),
        "image": dict(image),
        "temperature": temperature,
        "tower": {
            "hash": tower.hash,
            "vision": dataclasses.asdict(tower.vision) if tower.vision else None,
            "source": dataclasses.asdict(tower.config) if tower.config and not tower.vision else None,
            "precision": str(next(tower.model.parameters()).dtype).removeprefix("torch."),
            "stem": tower.stem is not None,
        },
        "language": _language_note(model, kind) if model is not None else None,
        "sha256": {str(file.relative_to(folder)): sha256_file(file) for file in files},
    }
    write_json(folder / BLIP2_NOTE, note)


def load_blip2(folder: Path) -> ExportedBlip2:
    """The model of a folder that `export_blip2` wrote, in evaluation mode on the CPU.

    Raises:
        StorageError: a file is missing, damaged, or from another model; an image encoder that is named has changed.
    """
    note = read_json(folder / BLIP2_NOTE)
    for name, expected in note["sha256"].items():
        if not (folder / name).exists() or sha256_file(folder / name) != expected:
            raise StorageError(f"{folder / name}: missing or damaged; export the model again")
    state = read_files((folder / name for name in note["sha256"]), r"language_model\.")
    former = QFormer(read(QFormerConfig, note["qformer"], f"{folder / BLIP2_NOTE}: qformer"))
    state = {name.replace(NORM, "ln_vision."): value for name, value in state.items()}
    wanted = {name for name, _ in former.named_parameters()}
    if missing := sorted(wanted - set(state)):
        raise StorageError(f"{folder}: no weights for {missing[:5]}; export the model again")
    former.load_state_dict({name: state[name] for name in wanted}, strict=False)
    tower = _load_tower(folder, note["tower"], state)
    tokenizer = None
    if (folder / "qformer_tokenizer").is_dir():
        tokenizer = CaptionTokenizer.load(folder / "qformer_tokenizer")
    model = None
    if spoken := note["language"]:
        config = read(Blip2Config, spoken["config"], f"{folder / BLIP2_NOTE}: language.config")
        model = Blip2(former, _load_language(folder, spoken), config, tower)
        model.scale = spoken["scale"]
        with torch.no_grad():
            for name, parameter in model.language_projection.named_parameters():
                parameter.copy_(state[f"{PROJECTION}{name}"])
        model.eval()
    return ExportedBlip2(former.eval(), tower, tokenizer, note["image"], note["temperature"], model)


def stock_config(former: QFormer, vision: VisionConfig, **parts: Any) -> StockConfig:
    """Our configuration in the words of stock `transformers`."""
    config, text = former.config, former.config.text
    return StockConfig(
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
            "use_qformer_text_input": "text_config" not in parts,
        },
        num_query_tokens=config.queries,
        image_text_hidden_size=config.projection,
        **parts,
    )


def _save_retrieval(
    former: QFormer, folder: Path, tower: FrozenTower, vision: VisionConfig, tokenizer: CaptionTokenizer | None
) -> set[str]:
    with torch.device("meta"):  # no memory, and no draw from the generator of a training run
        stock = Blip2ForImageTextRetrieval(stock_config(former, vision))
    held = _fill(stock, former, tower)
    _save(stock, folder)
    if tokenizer is not None:
        tokenizer.save(folder)
        if tower.stem is None:
            Blip2Processor(_image_processor(vision), copy.deepcopy(tokenizer.stock)).save_pretrained(folder)
    return held


def _save_generation(model: Blip2, folder: Path, tower: FrozenTower, vision: VisionConfig) -> set[str]:
    language = model.language
    tokenizer: Any = copy.deepcopy(language.tokenizer.stock)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    image_token: int = tokenizer.convert_tokens_to_ids("<image>")
    text_config = copy.deepcopy(language.model.config)
    text_config.eos_token_id = language.tokenizer.end  # where the stock loop stops
    state = _with_room(language.model, image_token)
    text_config.vocab_size = max(text_config.vocab_size, image_token + 1)
    parts = {"text_config": text_config, "image_token_index": image_token}
    with torch.device("meta"):
        stock = Blip2ForConditionalGeneration(stock_config(model.former, vision, **parts))
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
        image_processor = _image_processor(vision)
        Blip2Processor(image_processor, tokenizer, model.former.config.queries).save_pretrained(folder)
    return held


def _fill(stock: nn.Module, former: QFormer, tower: FrozenTower, ours: Mapping[str, Tensor] | None = None) -> set[str]:
    """Give the stock class its weights, strictly; returns which parameters of the Q-Former it holds."""
    state = {f"vision_model.{name}": value for name, value in tower.vision_state().items()}
    state |= {name.replace("ln_vision.", NORM): value for name, value in former.named_parameters()}
    state |= ours or {}
    wanted = set(stock.state_dict())
    # Clones, for what shares memory cannot be saved.
    stock.load_state_dict({name: state[name].detach().clone() for name in wanted}, strict=True, assign=True)
    return {name for name, _ in former.named_parameters() if name.replace("ln_vision.", NORM) in wanted}


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


def _language_note(model: Blip2, kind: str | None) -> dict[str, Any]:
    return {
        "config": dataclasses.asdict(model.config),
        "folder": kind or "language",
        "scale": model.scale,
        "hash": model.language.hash,
        "vocabulary": model.language.model.config.vocab_size,
        "end": model.language.tokenizer.end,
        "precision": str(model.language.dtype).removeprefix("torch."),
        "before_ids": model.before_ids,
        "after_ids": model.after_ids,
    }


def _load_language(folder: Path, note: dict[str, Any]) -> LanguageModel:
    with quietly():
        path = folder / note["folder"]
        whole: Any = AutoConfig.from_pretrained(path)
        config = getattr(whole, "text_config", whole)
        kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        dtype = getattr(torch, note["precision"])
        stock = kind.from_pretrained(path, config=config, dtype=dtype, key_mapping={r"^language_model\.": ""})
        if config.vocab_size != note["vocabulary"]:
            stock.resize_token_embeddings(note["vocabulary"])
        language = LanguageModel(stock, AutoTokenizer.from_pretrained(path))
    language.tokenizer.end = note["end"]
    if language.hash != note["hash"]:
        raise StorageError(f"{path}: its language model is not the one in {BLIP2_NOTE}; export the model again")
    return language


def _load_tower(folder: Path, note: dict[str, Any], state: Mapping[str, Tensor]) -> FrozenTower:
    if note["vision"] is None:
        tower = open_tower(read(TowerConfig, note["source"], "tower"))
    else:
        ours = VisionTransformer(read(VisionConfig, note["vision"], f"{folder / BLIP2_NOTE}: tower.vision"))
        take_norm(ours)
        prefix = "vision_model."
        ours.load_state_dict({name: state[prefix + name] for name in ours.state_dict()})
        stem = Stem.load(folder) if note["stem"] else None
        size = read_json(folder / BLIP2_NOTE)["image"]["size"]
        tower = vision_tower(ours, None, size, stem, note["precision"])
    if tower.hash != note["hash"]:
        raise StorageError(f"{folder}: the image encoder is not the one that the model was trained on")
    return tower


def _image_processor(vision: VisionConfig) -> BlipImageProcessorPil:
    size = {"height": vision.image_size, "width": vision.image_size}
    return BlipImageProcessorPil(size=size, image_mean=list(vision.mean), image_std=list(vision.std))
