"""What captions are measured against: an image gets the caption of the nearest training image.

Shapes: I images, K training images, F features.
"""

import logging
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, normalize

from blip_pipelines.data.loader import ReadImages
from blip_pipelines.data.pairs import Pairs

log = logging.getLogger(__name__)

THUMBNAIL = 16  # pixels a side: what the nearest image is judged by where there is no frozen stem


class NearestImage:
    """Nearest by the cosine of centred features that owe nothing to the training: the mean of the frozen stem's grid,
    or, where images are read as plain pixels, a thumbnail. Captions as the model saw them, noise included; of several
    captions of an image the first.

    Args:
        reader: gives what reads the images of a view.
    """

    def __init__(self, train: Pairs, images_K: np.ndarray, reader: Callable[[Pairs], ReadImages], batch_images: int):
        self.reader, self.batch_images = reader, batch_images
        self.captions, self.keys = train.captions(images_K), train.keys[images_K]
        features_KF = self._features(train, images_K)
        self.mean_F = features_KF.mean(0)
        self.features_KF = normalize(features_KF - self.mean_F, dim=1)

    @classmethod
    def among(
        cls, train: Pairs, reader: Callable[[Pairs], ReadImages], most: int, seed: int, batch_images: int
    ) -> "NearestImage | None":
        """Over the training images, or `most` of them drawn at random; None where there are none."""
        images_K = train.unique_images()
        if not len(images_K) or not most:
            log.info("evaluation: no training images, so no baseline of the nearest one's caption")
            return None
        if len(images_K) > most:
            images_K = np.sort(np.random.default_rng(seed).choice(images_K, most, replace=False))
        return cls(train, images_K, reader, batch_images)

    def answer(self, view: Pairs, rows: np.ndarray) -> list[tuple[str, str]]:
        """Key and caption of the training image nearest to the image of each row."""
        features_IF = normalize(self._features(view, rows) - self.mean_F, dim=1)
        nearest = (features_IF @ self.features_KF.T).argmax(1).tolist()
        return [(self.keys[index], self.captions[index]) for index in nearest]

    def _features(self, view: Pairs, rows: np.ndarray) -> Tensor:
        read_images, size = self.reader(view), self.batch_images
        batches = []
        for start in range(0, len(rows), size):
            images = torch.from_numpy(read_images(rows[start : start + size])).float()
            batches.append(images.mean(1) if images.ndim == 3 else adaptive_avg_pool2d(images, THUMBNAIL).flatten(1))
        return torch.cat(batches)
