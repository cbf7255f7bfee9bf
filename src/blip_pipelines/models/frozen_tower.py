"""The frozen image encoder of BLIP-2 (3.1): this project's MED, or any stock vision tower.

Its last LayerNorm is not part of it. BLIP-2 trains a LayerNorm of its own on what the encoder gives, and the stock
class has one place for it, `vision_model.post_layernorm`; so the tower stops before its norm, and that norm is where
the Q-Former's `ln_vision` starts. Then an export holds no second norm, and at the start nothing has changed.

Outputs are rounded to float16, as a cache stores them: a live tower and cached features give the same losses.

Shapes: B batch, S pixels a side, N image tokens, D width, P features of a stem's cell.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from blip_pipelines.config import ConfigError
from blip_pipelines.models.exports import NOTE, ExportedMed, load_med, quietly
from blip_pipelines.models.frozen import Frozen
from blip_pipelines.models.precision import Precision, dtype_of
from blip_pipelines.models.starting_points import blip_vision_state
from blip_pipelines.models.stem import Stem
from blip_pipelines.models.vision import VisionConfig, VisionTransformer
from blip_pipelines.models.weights import StartError

OURS = (
    "vit",
    "blip_vision_model",
    "blip_2_vision_model",
    "instructblip_vision_model",
)  # stock towers that are our ViT by other names
NORMS = ("post_layernorm", "layernorm")  # after the last layer, in the stock towers


@dataclass(frozen=True)
class TowerConfig:
    """Which frozen image encoder.

    Attributes:
        source: folder of an export of this project, folder or hub id of a stock vision tower (ViT, CLIP, SigLIP,
            DINOv2) or of a whole CLIP, SigLIP or BLIP-2.
        drop_layers: last layers to leave out; BLIP-2 drops one of CLIP's and of EVA's (the published BLIP-2 folders
            come without it).
        precision: of weights and arithmetic.
        mean, std: of pixels / 255; null reads them from the source's image processor.
    """

    source: str
    drop_layers: int = 0
    precision: Precision = "float32"
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None


class FrozenTower(Frozen):
    """Images to image tokens, without gradient.

    Args:
        model: normalised pixels, or behind a stem patch vectors, to (B, N, D) tokens. A `VisionTransformer` is what
            the stock BLIP-2 can hold; others are named in exports, not held.
        norm: the LayerNorm that followed, not applied here; None if there was none on these tokens.
        norm_eps: of the tower's norms, and so of `ln_vision`, as the stock class has one for both.
        mean, std: by which pixels / 255 are normalised.
        config: how it was opened.

    Attributes:
        hash: of weights and all else that decides the outputs.
        image_size: pixels a side that it reads.
        tokens, width: N and D.
        vision: sizes of the stock class that computes the same from `vision_state`; None if none does.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        model: nn.Module,
        norm: nn.LayerNorm | None,
        norm_eps: float,
        image_size: int,
        mean: tuple[float, ...] = (0.0, 0.0, 0.0),
        std: tuple[float, ...] = (1.0, 1.0, 1.0),
        stem: Stem | None = None,
        config: TowerConfig | None = None,
    ):
        super().__init__()
        self.model, self.stem, self.image_size, self.config = model, stem, image_size, config
        self.norm = {} if norm is None else {name: value.detach().clone() for name, value in norm.named_parameters()}
        self.norm_eps = norm_eps
        self.vision = model.config if isinstance(model, VisionTransformer) else None
        for name, values in ("mean", mean), ("std", std):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1) * 255, persistent=False)
        self.freeze(*([] if stem else [mean, std]))
        self.tokens, self.width = self.encode(torch.zeros(1, 3, image_size, image_size, dtype=torch.uint8)).shape[1:]

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """(B, N, D) float32 tokens, not rounded.

        Args:
            pixels: (B, 3, S, S) uint8; behind a stem also its features (B, N - 1, P), cached.
        """
        if self.stem is None:
            pixels = (pixels - self.mean) / self.std
        else:  # rounded as a cache of the stem's features stores them
            pixels = (self.stem(pixels) if pixels.ndim == 4 else pixels).half()
        weight = next(self.model.parameters())
        with torch.autocast(weight.device.type, enabled=False):
            found = self.model(pixels.to(weight.dtype))
        return (found if isinstance(found, Tensor) else found.last_hidden_state).float()

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, N, D) float16 tokens of what `encode` takes."""
        return self.encode(pixels).half()

    def start_norm(self, ln_vision: nn.LayerNorm) -> None:
        """Set the trainable LayerNorm to the one that the tower was trained with; leave it, if there was none."""
        with torch.no_grad():
            for name, value in self.norm.items():
                getattr(ln_vision, name).copy_(value)

    def vision_state(self) -> dict[str, Tensor]:
        """Weights by the names of the stock `Blip2VisionModel`, float32, all but the norm's."""
        return {name: value.float() for name, value in self.model.state_dict().items()}


def open_tower(config: TowerConfig) -> FrozenTower:
    """Read a tower, on the CPU.

    Raises:
        StorageError: an export of this project is damaged.
        StartError, ConfigError: there is nothing to read, or it does not fit; the message says what.
    """
    if (Path(config.source) / NOTE).is_file():
        return med_tower(load_med(Path(config.source)), config.precision)
    return stock_tower(config)


def med_tower(exported: ExportedMed, precision: Precision = "float32") -> FrozenTower:
    """The image encoder of a MED, its stem included; takes the MED apart."""
    model = exported.med.vision_model
    return vision_tower(model, take_norm(model), exported.image["size"], exported.stem, precision)


def vision_tower(
    model: VisionTransformer,
    norm: nn.LayerNorm | None,
    size: int,
    stem: Stem | None = None,
    precision: Precision = "float32",
) -> FrozenTower:
    """A tower of our own ViT, its norm already taken off."""
    config = model.config
    return FrozenTower(model.to(dtype_of(precision)), norm, config.layer_norm_eps, size, config.mean, config.std, stem)


def stock_tower(config: TowerConfig) -> FrozenTower:
    """A vision tower that stock `transformers` reads."""
    from transformers import (
        AutoConfig,
        Blip2VisionConfig,
        Blip2VisionModel,
        InstructBlipVisionConfig,
        InstructBlipVisionModel,
    )
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    with quietly():
        try:
            whole = AutoConfig.from_pretrained(config.source)
        except (OSError, ValueError) as error:
            raise StartError(f"{config.source}: no image encoder that stock transformers can read ({error})") from error
        stock: Any = getattr(whole, "vision_config", whole)
        named = {Blip2VisionConfig: Blip2VisionModel, InstructBlipVisionConfig: InstructBlipVisionModel}
        kind: Any = named.get(type(stock)) or MODEL_MAPPING.get(type(stock), None)
        if kind is None or not hasattr(stock, "image_size"):
            raise StartError(f"{config.source}: a {whole.model_type!r} holds no image encoder")
        model, report = kind.from_pretrained(
            config.source,
            config=stock,
            dtype=dtype_of(config.precision),
            key_mapping={r"^(blip\.|clip\.|siglip\.)?vision_model\.": ""},
            output_loading_info=True,
        )
        mean, std = _mean_std(config)
    if missing := sorted(name for name in report["missing_keys"] if "pooler" not in name and "head" not in name):
        raise StartError(f"{config.source}: no weights for {missing[:5]}")
    norm = take_norm(model)
    if config.drop_layers:
        norm = None  # it was trained on what the last layer gave
        _drop_layers(model, config.drop_layers)
    if stock.model_type in OURS and stock.hidden_act == "gelu" and getattr(stock, "qkv_bias", True):
        return vision_tower(_as_ours(model, stock, mean, std), norm, stock.image_size, None, config.precision)
    for extra in ("pooler", "head"):
        if hasattr(model, extra):
            setattr(model, extra, None)
    if hasattr(model, "use_head"):
        model.use_head = False
    return FrozenTower(model, norm, stock.layer_norm_eps, stock.image_size, mean, std, None, config)


def take_norm(model: nn.Module) -> nn.LayerNorm | None:
    """The last LayerNorm of a tower, which from now on does without."""
    for name in NORMS:
        norm = getattr(model, name, None)
        if isinstance(norm, nn.LayerNorm):
            setattr(model, name, nn.Identity())
            return norm
    return None


def _drop_layers(model: Any, count: int) -> None:
    total = model.config.num_hidden_layers
    layers = [part for part in model.modules() if isinstance(part, nn.ModuleList) and len(part) == total]
    if len(layers) != 1 or not 0 < count < total:
        raise ConfigError(f"tower.drop_layers: cannot drop {count} of {total} layers of a {type(model).__name__}")
    del layers[0][total - count :]


def _as_ours(model: nn.Module, stock: Any, mean: tuple[float, ...], std: tuple[float, ...]) -> VisionTransformer:
    config = VisionConfig(
        image_size=stock.image_size,
        patch_size=stock.patch_size,
        width=stock.hidden_size,
        layers=next(len(part) for part in model.modules() if isinstance(part, nn.ModuleList)),
        heads=stock.num_attention_heads,
        mlp_width=stock.intermediate_size,
        layer_norm_eps=stock.layer_norm_eps,
        mean=(mean[0], mean[1], mean[2]),
        std=(std[0], std[1], std[2]),
    )
    ours = VisionTransformer(config)
    take_norm(ours)
    ours.load_state_dict(blip_vision_state(model.state_dict()), assign=True)
    return ours


def _mean_std(config: TowerConfig) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if config.mean and config.std:
        return config.mean, config.std
    from transformers import AutoImageProcessor

    try:
        processor: Any = AutoImageProcessor.from_pretrained(config.source)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"tower.mean, tower.std: {config.source} has no image processor to read them from; give them ({error})"
        ) from error
    return tuple(processor.image_mean), tuple(processor.image_std)
