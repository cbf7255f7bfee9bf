"""An exported model as a job uses it: on this rank's device, with how it reads the images of a data set."""

from functools import partial
from pathlib import Path

import torch

from blip_pipelines.config import read
from blip_pipelines.data.loader import DecodedPixels, FrozenFeatures, ReadImages
from blip_pipelines.data.pairs import Pairs
from blip_pipelines.data.storage import StorageError
from blip_pipelines.data.tokens import CaptionTokenizer
from blip_pipelines.data.transforms import ImageConfig
from blip_pipelines.jobs.frozen_features import fill_features
from blip_pipelines.models.exports import ExportedMed, load_med
from blip_pipelines.models.precision import Precision, is_half
from blip_pipelines.models.stem import Stem
from blip_pipelines.training.distributed import World


class RankModel:
    """What a rank's models have in common.

    Args:
        image: how pixels are made.
        stem: of which images come as cached features, filled where they are not yet; None for pixels.

    Attributes:
        autocast: context manager of the wanted precision.
    """

    def __init__(
        self,
        tokenizer: CaptionTokenizer,
        image: ImageConfig,
        stem: Stem | None,
        images: Path,
        precision: Precision,
        work: Path,
        world: World,
    ):
        self.device, self.tokenizer, self.image = world.device, tokenizer, image
        self._cache = None
        if stem is not None:
            self._cache = fill_features(images, self.image, stem, work, world).cache
        dtype = torch.bfloat16 if is_half(precision) else None
        self.autocast = partial(torch.autocast, world.device.type, dtype, enabled=dtype is not None)

    def reader(self, pairs: Pairs) -> ReadImages:
        """Reads images of a view as the model takes them, the evaluation view."""
        return DecodedPixels(pairs, self.image) if self._cache is None else FrozenFeatures(pairs, self._cache)


class RankMed(RankModel):
    """The model of a folder that `export_med` wrote.

    Attributes:
        med: in evaluation mode on the rank's device.
        temperature: of its ITC; None where the folder does not say.

    Raises:
        StorageError: the folder is damaged or has no tokenizer.
    """

    def __init__(self, folder: Path, images: Path, precision: Precision, work: Path, world: World):
        exported = load_med(folder)
        tokenizer = its_tokenizer(exported, folder)
        image = read(ImageConfig, exported.image, f"{folder}/med.json: image")
        super().__init__(tokenizer, image, exported.stem, images, precision, work, world)
        self.med, self.temperature = exported.med.to(world.device), exported.temperature


def its_tokenizer(exported: ExportedMed, folder: Path) -> CaptionTokenizer:
    """Raises StorageError where the folder has none."""
    if exported.tokenizer is None:
        raise StorageError(f"{folder}: no tokenizer in it; export the model with its tokenizer")
    return exported.tokenizer
