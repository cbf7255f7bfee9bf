"""Train MED: on noisy pairs from its starting points (BLIP 3.2), or further, from another job's model.

Inputs: `pairs`, `images`, `packages` (wheels; needed where the parameters say `package:`), and, to go on from a model
of this project, `start`, which then also gives the tokenizer and the frozen stem.

Outputs: the exports of `models.exports.export_med`, `checkpoint/` (everything training left) and `history.json`.
"""

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from blip_pipelines.config import ConfigError, read, speed_only
from blip_pipelines.data.pairs import Pairs
from blip_pipelines.data.tokens import CaptionTokenizer
from blip_pipelines.data.transforms import ImageConfig
from blip_pipelines.inference.image_text import MedImageText
from blip_pipelines.jobs.exported import its_tokenizer
from blip_pipelines.jobs.pair_training import train_on_pairs
from blip_pipelines.jobs.probe import ProbeConfig
from blip_pipelines.jobs.receipt import OUTPUTS
from blip_pipelines.jobs.training_data import Images, fresh_tokenizer, keep_training, package_wheel
from blip_pipelines.models.exports import export_med, load_med
from blip_pipelines.models.med import Med, MedConfig
from blip_pipelines.models.starting_points import StartConfig, start
from blip_pipelines.models.stem import FEATURES, STRIDE, Stem
from blip_pipelines.models.text import TextConfig
from blip_pipelines.models.vision import VisionConfig
from blip_pipelines.objectives.med import MedObjectiveConfig, MedPretraining
from blip_pipelines.training.distributed import World
from blip_pipelines.training.loop import TrainingConfig
from blip_pipelines.training.optimizer import OptimizerConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MedPretrainingConfig:
    """Everything that decides what comes out.

    Args:
        origins: captions to train on (human, web, synthetic); null for all.
        window_shards: shards whose rows are mixed with one another.
        max_tokens: of a caption.
        tokenizer: `package:<name>`, a folder, a file or a hub id of a WordPiece `tokenizer.json`.
        prune_vocabulary: leave out the word pieces that no training caption needs.
        also_words: keep what these need too, such as the words of later questions.
        stem: `package:<name>` or a folder of frozen features in place of pixels; null for pixels.
        text: sizes; vocabulary and special ids are the tokenizer's.
        vision: mean and deviation are those of `image`.
        loader_workers: processes that prepare batches ahead.
    """

    training: TrainingConfig
    optimizer: OptimizerConfig
    tokenizer: str | None = None
    prune_vocabulary: bool = True
    also_words: str = ""
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
    images = Images(settings.image, parts.stem, inputs["images"], work, world)

    objective = settings.objective
    task = MedPretraining(parts.med, objective, world, settings.seed, settings.training.accumulation)
    model = MedImageText(parts.med)
    data = pairs, train_pairs, images, parts.tokenizer
    history = train_on_pairs(task, model, *data, settings, objective.prompt, work, world, shown=("itc", "itm", "lm"))
    if world.is_first:
        export_med(
            parts.med,
            work / OUTPUTS,
            parts.tokenizer,
            asdict(settings.image),
            stem=parts.stem,
            temperature=task.temperature.item(),
            label_smoothing=objective.label_smoothing,
        )
        keep_training(work, history, images, settings.training)
    return {
        "rows": len(train_pairs),
        "images": len(train_pairs.unique_images()),
        "vocabulary": len(parts.tokenizer),
        "parameters": sum(parameter.numel() for parameter in parts.med.parameters()),
        "started": parts.started,
        "last": next((row for row in reversed(history) if "loss" in row), {}),
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
            tokenizer, stem = its_tokenizer(origin, inputs["start"]), origin.stem
        else:
            tokenizer, kept_ids = fresh_tokenizer(
                *(settings.tokenizer, pairs, settings.prune_vocabulary, packages, "med_pretraining.tokenizer"),
                also=settings.also_words,
            )
            stem = _stem(settings.stem, packages)
        text = settings.text.fit(tokenizer)
        vision = replace(settings.vision, mean=settings.image.mean, std=settings.image.std)
        _check_sizes(settings.image, vision, stem)
        med = Med(MedConfig(vision, text, settings.projection, settings.initializer), settings.seed)
        wanted = replace(settings.start, model=str(inputs["start"])) if "start" in inputs else settings.start
        started = [str(done) for done in start(med, wanted, packages, kept_ids)]
        for line in started:
            logger.info("start: %s", line)
        return cls(tokenizer, med, stem, started)


def _stem(source: str | None, packages: Path | None) -> Stem | None:
    if source is None:
        return None
    if source.startswith("package:"):
        return Stem.from_wheel(package_wheel(source, packages))
    return Stem.load(Path(source))


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
