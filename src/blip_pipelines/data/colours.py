"""The main colour of a drawing on white, by name: a fact that is in the pixels and in no table."""

from functools import cache

import numpy as np
from PIL import Image

# sRGB anchors of each name; the nearest anchor in CIELAB names a pixel.
PALETTE = {
    "red": ((221, 46, 68), (190, 25, 49), (255, 0, 0)),
    "orange": ((244, 144, 12), (255, 140, 0), (230, 110, 40)),
    "yellow": ((255, 204, 77), (255, 230, 100), (252, 234, 43)),
    "green": ((120, 177, 89), (62, 114, 29), (92, 180, 60), (0, 128, 0)),
    "blue": ((85, 172, 238), (34, 102, 153), (60, 100, 220), (140, 205, 245), (0, 0, 160)),
    "purple": ((170, 142, 214), (116, 78, 170), (128, 0, 128)),
    "pink": ((244, 171, 186), (234, 89, 110), (255, 150, 200)),
    "brown": ((138, 75, 56), (102, 69, 50), (193, 105, 79), (165, 122, 80)),
    "gray": ((153, 170, 181), (204, 214, 221), (128, 128, 128), (102, 117, 127)),
    "black": ((0, 0, 0), (41, 47, 51)),
    "white": ((255, 255, 255), (245, 248, 250)),
}
_NAMES = list(PALETTE)
_LEVELS = 32  # of a channel: pixels are named in cells of the colour cube


def main_colour(image: Image.Image, share: float = 0.5) -> str | None:
    """The name that more than `share` of the pixels bear that are not white; None where no colour does.

    Args:
        image: RGB, any size.
    """
    cells = np.asarray(image) // (256 // _LEVELS)
    names = _cell_names()[cells[..., 0], cells[..., 1], cells[..., 2]]
    counts = np.bincount(names.ravel(), minlength=len(_NAMES))
    counts[_NAMES.index("white")] = 0
    best = int(counts.argmax())
    return _NAMES[best] if counts[best] > share * counts.sum() else None


@cache
def _cell_names() -> np.ndarray:
    """(32, 32, 32) uint8: number of the palette's name nearest to the middle of each cell."""
    levels = (np.arange(_LEVELS) + 0.5) * (256 // _LEVELS)
    cells = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), -1)
    anchors = np.array([rgb for anchors in PALETTE.values() for rgb in anchors], float)
    of_name = np.repeat(np.arange(len(_NAMES)), [len(anchors) for anchors in PALETTE.values()])
    distances = np.linalg.norm(_lab(cells)[..., None, :] - _lab(anchors), axis=-1)
    return of_name[distances.argmin(-1)].astype(np.uint8)


def _lab(rgb: np.ndarray) -> np.ndarray:
    """CIELAB (D65) of sRGB in 0 to 255."""
    channels = rgb / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    matrix = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = linear @ matrix.T / np.array([0.9505, 1.0, 1.089])
    cube = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = cube[..., 0], cube[..., 1], cube[..., 2]
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)
