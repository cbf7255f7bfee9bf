"""BLIP-2 stage 1: a Q-Former learns what a frozen image encoder shows, by ITC, ITM and ITG (BLIP-2 3.2).

Inputs: `pairs`, `images`; `med`, an export of this project, where the parameters say `med`; `packages` (wheels) where
they say `package:`.

Outputs: the export of `models.blip2_exports.export_blip2`, `checkpoint/` (everything training left) and `history.json`.
"""

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from blip_pipelines.config import ConfigError, read, speed_only
from blip_pipelines.data.pairs import Pairs
from blip_pipelines.data.tokens import CaptionTokenizer
from blip_pipelines.data.transforms import ImageConfig
from blip_pipelines.inference.qformer_image_text import QFormerImageText
from blip_pipelines.jobs.exported import its_tokenizer
from blip_pipelines.jobs.pair_training import train_on_pairs
from blip_pipelines.jobs.probe import ProbeConfig
from blip_pipelines.jobs.receipt import OUTPUTS
from blip_pipelines.jobs.training_data import Images, fresh_tokenizer, keep_training
from blip_pipelines.models.blip2_exports import export_blip2
from blip_pipelines.models.exports import load_med
from blip_pipelines.models.frozen_tower import FrozenTower, TowerConfig, open_tower
from blip_pipelines.models.qformer import QFormer, QFormerConfig
from blip_pipelines.models.qformer_start import QFormerStartConfig, start_qformer
from blip_pipelines.objectives.qformer import QFormerObjectiveConfig, QFormerPretraining
from blip_pipelines.training.distributed import World
from blip_pipelines.training.loop import TrainingConfig
from blip_pipelines.training.optimizer import OptimizerConfig

MED = "med"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Blip2Stage1Config:
    """Everything that decides what comes out.

    Args:
        tower: the frozen image encoder: `med`, that of the MED among the inputs, or any stock one.
        features: `cached` runs the tower once per view of an image and keeps its outputs on disk; `live` runs it in
            every step, on augmented pixels where `image` has them.
        image: how images become pixels; its size is what the tower reads. Null: as the MED
            saw them, or with another tower not augmented.
        qformer: sizes; vocabulary, special ids and the image's width are the tokenizer's and the tower's.
        start: where the Q-Former's weights come from: `med`, with that MED's tokenizer, or BERT or a BLIP-2.
        tokenizer: but with `start: med`, `package:<name>`, a folder, a file or a hub id of a WordPiece
            `tokenizer.json`.
        prune_vocabulary: leave out the word pieces that no training caption needs.
        origins: captions to train on (human, web, synthetic); null for all.
        window_shards: shards whose rows are mixed with one another.
        max_tokens: of a caption.
        loader_workers: processes that prepare batches ahead.
    """

    training: TrainingConfig
    optimizer: OptimizerConfig
    tower: Literal["med"] | TowerConfig = "med"
    features: Literal["cached", "live"] = "cached"
    image: ImageConfig | None = None
    qformer: QFormerConfig = field(default_factory=QFormerConfig)
    start: Literal["med"] | QFormerStartConfig = "med"
    tokenizer: str | None = None
    prune_vocabulary: bool = False
    objective: QFormerObjectiveConfig = field(default_factory=QFormerObjectiveConfig)
    origins: tuple[str, ...] | None = None
    window_shards: int = 8
    max_tokens: int = 32
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    seed: int = 0
    loader_workers: int = speed_only(0)

    @property
    def needs_med(self) -> bool:
        return self.tower == MED or self.start == MED


Config = Blip2Stage1Config


def run(config: dict[str, Any], inputs: Mapping[str, Path], work: Path, world: World) -> dict[str, Any]:
    """Facts: `rows`, `images`, `vocabulary`, `parameters` and `frozen_parameters`, `tower` (hash and shape of its
    outputs), `started` (what was loaded from where) and the last losses.
    """
    settings = read(Blip2Stage1Config, config, "blip2_stage1")
    pairs = Pairs.open(inputs["pairs"], inputs["images"])
    train_pairs = pairs.select(split="train", origins=settings.origins)
    parts = _Parts.make(settings, pairs, inputs)
    is_cached = settings.features == "cached"
    images = Images(parts.image, parts.tower if is_cached else None, inputs["images"], work, world)
    live = None if is_cached else parts.tower

    objective = settings.objective
    task = QFormerPretraining(parts.former, objective, world, settings.seed, settings.training.accumulation, live)
    model = QFormerImageText(parts.former, live)
    data = pairs, train_pairs, images, parts.tokenizer
    history = train_on_pairs(task, model, *data, settings, objective.prompt, work, world, shown=("itc", "itm", "itg"))
    if world.is_first:
        export_blip2(
            parts.former,
            work / OUTPUTS,
            parts.tower,
            parts.tokenizer,
            asdict(parts.image),
            temperature=task.temperature.item(),
        )
        keep_training(work, history, images, settings.training)
    return {
        "rows": len(train_pairs),
        "images": len(train_pairs.unique_images()),
        "vocabulary": len(parts.tokenizer),
        "parameters": sum(parameter.numel() for parameter in parts.former.parameters()),
        "frozen_parameters": sum(parameter.numel() for parameter in parts.tower.parameters()),
        "tower": {"hash": parts.tower.hash, "tokens": parts.tower.tokens, "width": parts.tower.width},
        "started": parts.started,
        "last": next((row for row in reversed(history) if "loss" in row), {}),
    }


@dataclass(frozen=True)
class _Parts:
    """What is there before the first step."""

    tokenizer: CaptionTokenizer
    tower: FrozenTower
    former: QFormer
    image: ImageConfig
    started: list[str]

    @classmethod
    def make(cls, settings: Blip2Stage1Config, pairs: Pairs, inputs: Mapping[str, Path]) -> "_Parts":
        if settings.needs_med and MED not in inputs:
            raise ConfigError("blip2_stage1.tower, blip2_stage1.start: the job was given no MED; name other sources")
        packages = inputs.get("packages")
        tower = open_tower(settings.tower if isinstance(settings.tower, TowerConfig) else TowerConfig(str(inputs[MED])))
        if isinstance(settings.start, QFormerStartConfig):
            start = settings.start
            tokenizer, kept_ids = fresh_tokenizer(
                settings.tokenizer, pairs, settings.prune_vocabulary, packages, "blip2_stage1.tokenizer"
            )
        else:
            start, kept_ids = QFormerStartConfig(med=str(inputs[MED])), None
            tokenizer = its_tokenizer(load_med(inputs[MED]), inputs[MED])
        former = QFormer(settings.qformer.fit(tokenizer).behind(tower), settings.seed)
        tower.start_norm(former.ln_vision)
        started = [str(done) for done in start_qformer(former, start, packages, kept_ids)]
        for line in started:
            logger.info("start: %s", line)
        return cls(tokenizer, tower, former, _image(settings, tower, inputs), started)


def _image(settings: Blip2Stage1Config, tower: FrozenTower, inputs: Mapping[str, Path]) -> ImageConfig:
    """Raises ConfigError where the parameters' size is not what the tower reads."""
    if settings.image is None and settings.tower == MED:
        return read(ImageConfig, load_med(inputs[MED]).image, f"{inputs[MED]}: image")
    image = settings.image or ImageConfig(size=tower.image_size, augment=False)
    if image.size != tower.image_size:
        raise ConfigError(
            f"blip2_stage1.image.size: {image.size}, and the tower reads {tower.image_size}; set it to that"
        )
    return image
