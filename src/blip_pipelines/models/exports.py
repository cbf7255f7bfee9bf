"""A trained MED as folders that stock `transformers` loads, and back.

`<folder>/retrieval` is a `BlipForImageTextRetrieval`, `captioning` a `BlipForConditionalGeneration`,
`question_answering` a `BlipForQuestionAnswering`: complete, safetensors, no key missing or unexpected, equal outputs.
`<folder>/med.json` holds what they have no place for: our configuration, the ids of [CLS] and [ENC], the temperature,
how pixels are made, the hashes of the weights. A frozen stem is written beside it. Equal models give equal bytes.

Stock retrieval reads ids as given: feed it [ENC] at position 0 for ITM, [CLS] for ITC (`docs/models.md`).
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
    BlipImageProcessorPil,
    PreTrainedModel,
)
from transformers.utils import logging

from blip_pipelines.config import read
from blip_pipelines.data.storage import StorageError, read_json, sha256_file, write_json
from blip_pipelines.data.tokens import CaptionTokenizer
from blip_pipelines.models.med import Decoding, Med, MedConfig
from blip_pipelines.models.stem import FEATURES, STRIDE, Stem

STOCK: dict[str, type[PreTrainedModel]] = {
    "retrieval": BlipForImageTextRetrieval,
    "captioning": BlipForConditionalGeneration,
    "question_answering": BlipForQuestionAnswering,
}
WEIGHTS = "model.safetensors"
NOTE = "med.json"
BLIP2_NOTE = "blip2.json"


class ExportError(ValueError):
    """A model that the wanted stock class cannot hold; the message says why and what to do."""


@dataclasses.dataclass(frozen=True)
class ExportedMed:
    """What `load_med` found in a folder."""

    med: Med
    tokenizer: CaptionTokenizer | None
    image: dict[str, Any]  # how pixels are made: the values of `data.transforms.ImageConfig`
    stem: Stem | None
    temperature: float | None

    def encode_image(self, pixels: Tensor) -> Tensor:
        """(B, N, D) image tokens of (B, 3, S, S) uint8 pixels, through the stem if there is one."""
        return self.med.encode_image(self.stem(pixels) if self.stem else pixels)


def export_med(
    med: Decoding,
    folder: Path,
    tokenizer: CaptionTokenizer | None,
    image: Mapping[str, Any],
    *,
    stem: Stem | None = None,
    temperature: float | None = None,
    label_smoothing: float = 0.1,
    kinds: Sequence[str] = ("retrieval", "captioning"),
) -> None:
    """Write the folder.

    Args:
        med: a `Med`, or what grew out of one and has all modules of the wanted kinds under their stock names.
        image: values of `data.transforms.ImageConfig`; "size" must be what the model (or its stem) reads.
        kinds: names in `STOCK`.

    Raises:
        ExportError: the sizes do not fit.
    """
    vision = med.config.vision
    size = image["size"]
    if stem is None and size != vision.image_size:
        raise ExportError(f"image.size is {size}, the model reads {vision.image_size}; set vision.image_size to it")
    if stem is not None and ((size // STRIDE) ** 2 != vision.patches or vision.patch_length < FEATURES):
        raise ExportError(
            f"the stem makes {(size // STRIDE) ** 2} cells of {FEATURES} features from {size} pixels, the model reads "
            f"{vision.patches} patches of {vision.patch_length}; set vision.image_size and vision.patch_size to fit"
        )
    hashes = {}
    for kind in kinds:
        _save_stock(med, kind, folder / kind, label_smoothing)
        if tokenizer is not None:
            tokenizer.save(folder / kind)
        if stem is None:
            _processor(med.config).save_pretrained(folder / kind)
        hashes[f"{kind}/{WEIGHTS}"] = sha256_file(folder / kind / WEIGHTS)
    if stem is not None:
        stem.save(folder)
    note = {
        "config": dataclasses.asdict(med.config),
        "image": dict(image),
        "stem": stem.hash if stem else None,
        "temperature": temperature,
        "sha256": hashes,
    }
    write_json(folder / NOTE, note)


def load_med(folder: Path) -> ExportedMed:
    """The model of a folder that `export_med` wrote, in evaluation mode on the CPU.

    Raises:
        StorageError: a file is missing, damaged, or from another model.
    """
    note = read_json(folder / NOTE)
    for name, expected in note["sha256"].items():
        path = folder / name
        if not path.exists() or sha256_file(path) != expected:
            raise StorageError(f"{path}: missing or damaged; export the model again")
    med = Med(read(MedConfig, note["config"], f"{folder / NOTE}: config"))
    state: dict[str, Tensor] = {}
    for name in note["sha256"]:
        state |= safetensors.torch.load_file(folder / name)
    wanted = {name for name, _ in med.named_parameters()}
    if missing := sorted(wanted - set(state)):
        raise StorageError(f"{folder}: no weights for {missing[:5]}; export it with both retrieval and captioning")
    med.load_state_dict({name: state[name] for name in wanted}, strict=False)
    stem = Stem.load(folder) if note["stem"] else None
    if stem is not None and stem.hash != note["stem"]:
        raise StorageError(f"{folder}: its stem is not the one in {NOTE}; export the model again")
    kind = next(iter(note["sha256"])).split("/")[0]
    tokenizer = CaptionTokenizer.load(folder / kind) if (folder / kind / "tokenizer.json").exists() else None
    return ExportedMed(med.eval(), tokenizer, note["image"], stem, note["temperature"])


def stock_config(config: MedConfig, label_smoothing: float = 0.0) -> BlipConfig:
    """Our configuration in the words of stock `transformers`."""
    vision, text = config.vision, config.text
    return BlipConfig(
        vision_config={
            "hidden_size": vision.width,
            "intermediate_size": vision.mlp_width,
            "num_hidden_layers": vision.layers,
            "num_attention_heads": vision.heads,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "layer_norm_eps": vision.layer_norm_eps,
            "attention_dropout": vision.attention_dropout,
            "initializer_range": 0.02,  # the default of 1e-10 would be unusable to whoever starts anew from it
        },
        text_config={
            "vocab_size": text.vocabulary,
            "hidden_size": text.width,
            "intermediate_size": text.ffn_width,
            "num_hidden_layers": text.layers,
            "num_attention_heads": text.heads,
            "max_position_embeddings": text.max_positions,
            "layer_norm_eps": text.layer_norm_eps,
            "hidden_dropout_prob": text.dropout,
            "attention_probs_dropout_prob": text.attention_dropout,
            "bos_token_id": text.dec_id,
            "eos_token_id": text.sep_id,
            "sep_token_id": text.sep_id,
            "pad_token_id": text.pad_id,
            "label_smoothing": label_smoothing,  # the only place that stock reads it from
        },
        image_text_hidden_size=config.projection,
    )


def _save_stock(med: Decoding, kind: str, folder: Path, label_smoothing: float) -> None:
    config = stock_config(med.config, label_smoothing)
    if kind == "question_answering" and med.config.vision.width != med.config.text.width:
        raise ExportError(
            f"BlipForQuestionAnswering needs one width: its decoder attends to text states through layers as wide as "
            f"the image; here vision.width is {med.config.vision.width}, text.width {med.config.text.width}"
        )
    with torch.device("meta"):  # no memory, and no draw from the generator of a training run
        model = STOCK[kind](config)
    # Clones, because stock classes know no sharing between encoder and decoder and refuse to save it.
    wanted = model.state_dict()
    state = {name: value.clone() for name, value in med.state_dict().items() if name in wanted}
    model.load_state_dict(state, strict=True, assign=True)
    model.tie_weights()
    with quietly():
        model.save_pretrained(folder)


@contextmanager
def quietly() -> Iterator[None]:
    """No progress bar for a file or two, no list of weights that were left aside on purpose."""
    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()


def _processor(config: MedConfig) -> BlipImageProcessorPil:
    size = {"height": config.vision.image_size, "width": config.vision.image_size}
    return BlipImageProcessorPil(size=size, image_mean=list(config.vision.mean), image_std=list(config.vision.std))
