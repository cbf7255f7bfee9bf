"""A trained BLIP-2 as folders that stock `transformers` loads, and back.

`<folder>/retrieval` is a `Blip2ForImageTextRetrieval` (stage 1), `<folder>/generation` a
`Blip2ForConditionalGeneration` (stage 2), `<folder>/instruct` an `InstructBlipForConditionalGeneration` (where the
Q-Former reads instructions): complete, no key missing or unexpected, equal outputs. `blip2.safetensors`
beside it has what the stock class has no place for: the LM head; after stage 2 the text side too, so that instruction
tuning finds it. `blip2.json` says the rest: our configuration, prompts as ids, temperature, how pixels are made,
hashes. A frozen stem is written beside it. Equal models give equal bytes.

An image encoder that the stock BLIP-2 cannot be (CLIP and SigLIP have other parts) is named by source and hash; then
there is no stock folder, and `blip2.safetensors` has everything else.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from transformers import AutoTokenizer

from blip_pipelines.config import read
from blip_pipelines.data.storage import StorageError, read_json, sha256_file, write_atomic, write_json
from blip_pipelines.data.tokens import CaptionTokenizer
from blip_pipelines.models.blip2 import Blip2, Blip2Config
from blip_pipelines.models.exports import BLIP2_NOTE, quietly
from blip_pipelines.models.frozen_tower import FrozenTower, TowerConfig, open_tower, take_norm, vision_tower
from blip_pipelines.models.language import LanguageModel
from blip_pipelines.models.qformer import QFormer, QFormerConfig
from blip_pipelines.models.qformer_start import BLIP2_NAMES
from blip_pipelines.models.stem import Stem
from blip_pipelines.models.stock_blip2 import read_language, save_generation, save_retrieval
from blip_pipelines.models.vision import VisionConfig, VisionTransformer
from blip_pipelines.models.weights import read_files, rename

REST = "blip2.safetensors"
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
        kind = "instruct" if model.config.reads_instructions else "generation"
        held = save_generation(model, folder / kind, tower, tower.vision, tokenizer)
    elif tower.vision is not None:
        kind, held = "retrieval", save_retrieval(former, folder / "retrieval", tower, tower.vision, tokenizer)
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
    state = rename(state, BLIP2_NAMES)
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
        "place": dataclasses.asdict(model.place),
    }


def _load_language(folder: Path, note: dict[str, Any]) -> LanguageModel:
    path = folder / note["folder"]
    with quietly():
        stock = read_language(str(path), note["precision"])
        if stock.config.vocab_size != note["vocabulary"]:
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
