"""From an image to the pixels a model sees: the plain evaluation view, and BLIP's augmented training view.

All with Pillow, so that the evaluation view equals the stock processor's; uint8 out, a quarter of the bytes of float32,
normalised on the device. Augmentation as BLIP (data/__init__.py, transform/randaugment.py): random resized crop,
flip, two operations of a pool without colour changes, each with probability one half.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

_CROP_TRIES = 10
_AREAS = slice(3, 3 + _CROP_TRIES)  # draws 0 and 1 place the crop, 2 flips
_SHAPES = slice(_AREAS.stop, _AREAS.stop + _CROP_TRIES)
_RATIO = (3 / 4, 4 / 3)
_OPERATION_PROBABILITY = 0.5
_MAX_MAGNITUDE = 10
_GREY = (128, 128, 128)


@dataclass(frozen=True)
class ImageConfig:
    """How images become pixels. Defaults are BLIP's pretraining (CLIP's mean and deviation).

    Attributes:
        size: side of the square view.
        mean, std: by which the model normalises pixels / 255, on its device; exports write them into the processor.
        augment: whether training sees augmented views; otherwise the evaluation view.
        crop_scale: share of the area that a random crop keeps (pretraining 0.2 to 1, fine-tuning 0.5 to 1).
        randaugment_operations, randaugment_magnitude: N and M (of 10) of RandAugment.
        views: fixed views per image where a frozen encoder's features are cached.
    """

    size: int = 224
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    augment: bool = True
    crop_scale: tuple[float, float] = (0.2, 1.0)
    flip: bool = True
    randaugment_operations: int = 2
    randaugment_magnitude: int = 5
    views: int = 1

    @property
    def draws(self) -> int:
        """How many uniform draws one augmented view takes."""
        return _SHAPES.stop + 3 * self.randaugment_operations


def to_pixels(image: Image.Image, size: int) -> np.ndarray:
    """(3, size, size) uint8: the evaluation view, squeezed to a square with Pillow's bicubic filter."""
    return _channels_first(image.resize((size, size), Image.Resampling.BICUBIC))


def augment(image: Image.Image, config: ImageConfig, draws: np.ndarray) -> np.ndarray:
    """(3, size, size) uint8: a training view; equal draws give equal pixels.

    Args:
        image: RGB.
        config: sizes and strengths.
        draws: (config.draws,) uniform numbers in [0, 1), of this row at this step.
    """
    return augment_crop(image, crop_box(image.size, config, draws), config, draws)


def crop_box(size: tuple[int, int], config: ImageConfig, draws: np.ndarray) -> tuple[int, int, int, int]:
    """The (left, upper, right, lower) box of the random crop of an image of `size` (width, height).

    The first of ten draws of area and shape that fits; else the largest central box of an allowed shape.
    """
    width, height = size
    low, high = config.crop_scale
    log_low, log_high = (math.log(ratio) for ratio in _RATIO)
    values = draws.tolist()  # plain floats: arithmetic on NumPy scalars costs ten times as much
    for area_draw, shape_draw in zip(values[_AREAS], values[_SHAPES], strict=True):
        area = (low + (high - low) * area_draw) * (width * height)
        shape = math.exp(log_low + (log_high - log_low) * shape_draw)
        box_width, box_height = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 1 <= box_width <= width and 1 <= box_height <= height:
            left, upper = int(values[0] * (width - box_width + 1)), int(values[1] * (height - box_height + 1))
            return left, upper, left + box_width, upper + box_height
    shape = min(max(width / height, _RATIO[0]), _RATIO[1])
    box_width, box_height = max(min(width, round(height * shape)), 1), max(min(height, round(width / shape)), 1)
    left, upper = (width - box_width) // 2, (height - box_height) // 2
    return left, upper, left + box_width, upper + box_height


def augment_crop(
    image: Image.Image, box: tuple[float, float, float, float], config: ImageConfig, draws: np.ndarray
) -> np.ndarray:
    """`augment` where the box is known already, in coordinates of `image`, which may be a reduced decode."""
    view = image.resize((config.size, config.size), Image.Resampling.BICUBIC, box=box)
    if config.flip and draws[2] < 0.5:
        view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for choice, apply, sign in draws[_SHAPES.stop : config.draws].reshape(-1, 3):
        if apply < _OPERATION_PROBABILITY:
            operation = _POOL[int(choice * len(_POOL))]
            view = operation(view, config.randaugment_magnitude / _MAX_MAGNITUDE, -1.0 if sign < 0.5 else 1.0)
    return _channels_first(view)


def _channels_first(image: Image.Image) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def _affine(image: Image.Image, matrix: tuple[float, ...]) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=_GREY)


def _enhance(kind: Callable[[Image.Image], ImageEnhance._Enhance], image: Image.Image, level: float) -> Image.Image:
    factor = 1.8 * level + 0.1  # exactly 1, no change, at BLIP's magnitude of 5
    return image if factor == 1 else kind(image).enhance(factor)


# (image, magnitude in 0..1, sign) -> image
_POOL: tuple[Callable[[Image.Image, float, float], Image.Image], ...] = (
    lambda image, level, sign: image,
    lambda image, level, sign: ImageOps.autocontrast(image),
    lambda image, level, sign: ImageOps.equalize(image),
    lambda image, level, sign: _enhance(ImageEnhance.Brightness, image, level),
    lambda image, level, sign: _enhance(ImageEnhance.Sharpness, image, level),
    lambda image, level, sign: _affine(image, (1, 0.3 * level * sign, 0, 0, 1, 0)),
    lambda image, level, sign: _affine(image, (1, 0, 10 * level * sign, 0, 1, 0)),
    lambda image, level, sign: _affine(image, (1, 0, 0, 0, 1, 10 * level * sign)),
    lambda image, level, sign: _affine(image, (1, 0, 0, 0.3 * level * sign, 1, 0)),
    lambda image, level, sign: image.rotate(30 * level * sign, Image.Resampling.BILINEAR, fillcolor=_GREY),
)
