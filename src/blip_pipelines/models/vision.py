"""The ViT of BLIP (3.1; ViT of arXiv 2010.11929): pre-norm, learnt positions, a class token.

Parameters carry the names of `transformers.BlipVisionModel`, so a checkpoint goes either way unchanged. The patch
convolution is applied as one matrix product to flattened patches; hence the same network also reads *patch vectors*,
which is how the features of a frozen stem come in (`stem.lay_out` gives the picture a stock class would need).

Shapes: B batch, N image tokens (class token first), D width, P length of a patch vector.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, gelu, linear
from torch.utils.checkpoint import checkpoint

from blip_pipelines.config import ConfigError, speed_only
from blip_pipelines.models.attention import attend


@dataclass(frozen=True)
class VisionConfig:
    """Size of the image encoder; the defaults are BLIP's ViT-B/16."""

    image_size: int = 224
    patch_size: int = 16
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_width: int = 3072
    layer_norm_eps: float = 1e-5
    attention_dropout: float = 0.0
    drop_path: float = 0.0  # rate of the last layer, growing linearly from 0 at the first (BLIP: 0.1 for ViT-L)
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)  # of uint8 pixels / 255; BLIP uses CLIP's
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    checkpoint_activations: bool = speed_only(False)

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ConfigError(f"vision.width: {self.width} is not a multiple of vision.heads = {self.heads}")
        if self.image_size % self.patch_size:
            raise ConfigError(
                f"vision.image_size: {self.image_size} is not a multiple of vision.patch_size = {self.patch_size}"
            )

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def patch_length(self) -> int:
        return 3 * self.patch_size**2


class VisionTransformer(nn.Module):
    """Images to image tokens."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        self.embeddings = PatchEmbeddings(config)
        self.encoder = VisionLayers(config)
        self.post_layernorm = nn.LayerNorm(config.width, config.layer_norm_eps)

    def forward(self, pixels: Tensor, class_only: bool = False) -> Tensor:
        """(B, N, D) image tokens; with `class_only` (B, 1, D), the class token alone and no waste in the last layer.

        Args:
            pixels: (B, 3, S, S), uint8 (normalised here) or already normalised floating point; or floating point
                patch vectors (B, N - 1, P) in row-major order. Vectors shorter than 3 x patch x patch count as padded
                with zeros.
        """
        hidden_BND = self.embeddings(pixels)
        layers = self.encoder.layers
        for index, layer in enumerate(layers):
            last = class_only and index == len(layers) - 1
            if self.config.checkpoint_activations and torch.is_grad_enabled():
                hidden_BND = checkpoint(layer, hidden_BND, last, use_reentrant=False)
            else:
                hidden_BND = layer(hidden_BND, last)
        return self.post_layernorm(hidden_BND)


class VisionLayers(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        rates = torch.linspace(0, config.drop_path, config.layers).tolist()
        self.layers = nn.ModuleList(VisionLayer(config, rate) for rate in rates)


class PatchEmbeddings(nn.Module):
    mean: Tensor
    std: Tensor

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        self.class_embedding = nn.Parameter(torch.empty(1, 1, config.width))
        self.patch_embedding = nn.Conv2d(3, config.width, config.patch_size, config.patch_size)
        self.position_embedding = nn.Parameter(torch.empty(1, config.patches + 1, config.width))
        self.register_buffer("mean", torch.tensor(config.mean)[:, None, None] * 255, persistent=False)
        self.register_buffer("std", torch.tensor(config.std)[:, None, None] * 255, persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        patches_BNP = self.cut(pixels) if pixels.ndim == 4 else pixels
        expected = (self.config.patches, self.config.patch_length)
        if patches_BNP.shape[1] != expected[0] or patches_BNP.shape[2] > expected[1]:
            raise ValueError(
                f"patch vectors of shape {tuple(patches_BNP.shape)}: expected (batch, {expected[0]}, <= {expected[1]}) "
                f"for image_size {self.config.image_size} and patch_size {self.config.patch_size}"
            )
        weight_DP = self.patch_embedding.weight.flatten(1)[:, : patches_BNP.shape[2]]
        patches_BND = linear(patches_BNP.to(weight_DP.dtype), weight_DP, self.patch_embedding.bias)
        class_B1D = self.class_embedding.expand(len(patches_BND), 1, -1)
        return torch.cat([class_B1D, patches_BND.to(class_B1D.dtype)], 1) + self.position_embedding

    def cut(self, pixels: Tensor) -> Tensor:
        """(B, N - 1, P) patch vectors of (B, 3, S, S) pixels: channels, rows, columns, as a convolution reads them."""
        size, patch = self.config.image_size, self.config.patch_size
        if pixels.shape[1:] != (3, size, size):
            raise ValueError(f"pixels of shape {tuple(pixels.shape)}: expected (batch, 3, {size}, {size})")
        if pixels.dtype == torch.uint8:
            pixels = (pixels - self.mean) / self.std
        grid = size // patch
        cells = pixels.reshape(-1, 3, grid, patch, grid, patch).permute(0, 2, 4, 1, 3, 5)
        return cells.reshape(-1, grid * grid, 3 * patch * patch)


class VisionLayer(nn.Module):
    def __init__(self, config: VisionConfig, drop_path: float):
        super().__init__()
        self.drop_path = drop_path
        self.layer_norm1 = nn.LayerNorm(config.width, config.layer_norm_eps)
        self.self_attn = VisionAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.width, config.layer_norm_eps)
        self.mlp = MLP(config)

    def forward(self, hidden_BND: Tensor, class_only: bool) -> Tensor:
        mixed_BND = self.self_attn(self.layer_norm1(hidden_BND), class_only)
        hidden_BND = hidden_BND[:, : mixed_BND.shape[1]] + self._drop(mixed_BND)
        return hidden_BND + self._drop(self.mlp(self.layer_norm2(hidden_BND)))

    def _drop(self, branch_BND: Tensor) -> Tensor:
        """Stochastic depth: the branch of a whole sample is left out, the others scaled up."""
        if not self.training or not self.drop_path:
            return branch_BND
        return branch_BND * dropout(branch_BND.new_ones(len(branch_BND), 1, 1), self.drop_path)


class MLP(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.width, config.mlp_width)
        self.fc2 = nn.Linear(config.mlp_width, config.width)

    def forward(self, hidden_BND: Tensor) -> Tensor:
        return self.fc2(gelu(self.fc1(hidden_BND)))


class VisionAttention(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.heads = config.heads
        self.dropout = config.attention_dropout
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.projection = nn.Linear(config.width, config.width)

    def forward(self, hidden_BND: Tensor, class_only: bool) -> Tensor:
        dropout_rate = self.dropout if self.training else 0.0
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self._project(hidden_BND, class_only)
        )
        return self.projection(attend(query, key, value, None, dropout_rate).transpose(1, 2).flatten(2))

    def _project(self, hidden_BND: Tensor, class_only: bool) -> tuple[Tensor, ...]:
        width = hidden_BND.shape[-1]
        if not class_only:
            return self.qkv(hidden_BND).split(width, -1)
        query_B1D = linear(hidden_BND[:, :1], self.qkv.weight[:width], self.qkv.bias[:width])
        return query_B1D, *linear(hidden_BND, self.qkv.weight[width:], self.qkv.bias[width:]).split(width, -1)
