"""BLIP-2 stage 2: the Q-Former of stage 1 learns to speak to a frozen language model (BLIP-2 3.3).

Two phases with checkpoints of their own: the warm start of the projection, which can be switched off and is not in the
paper, then generative pretraining.

Inputs: `pairs`, `images`, `start` (the export of stage 1) and, where the parameters say `package:`, `packages`. In the
ablation without stage 1 (`stage1: false`) `start` gives tower, tokenizer and sizes alone, and `med` is the MED from
which the Q-Former starts, where the parameters say so.

Outputs: the export of `models.blip2_exports.export_blip2`, `checkpoint/` (everything training left) and `history.json`,
in which the curves of the warm start come last, under names of their own.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from torch import nn

from blip_pipelines.config import read, speed_only
from blip_pipelines.data.pairs import Pairs
from blip_pipelines.jobs.blip2_parts import Blip2Parts
from blip_pipelines.jobs.language_probe import LanguageProbe, ProbeConfig
from blip_pipelines.jobs.receipt import OUTPUTS
from blip_pipelines.jobs.training_data import batches_of, keep_training
from blip_pipelines.jobs.warm_start import SHOWN, WarmStartConfig, folder_of, renamed
from blip_pipelines.models.blip2 import Blip2, Blip2Config
from blip_pipelines.models.blip2_exports import export_blip2
from blip_pipelines.models.language import LanguageConfig
from blip_pipelines.models.qformer_start import QFormerStartConfig
from blip_pipelines.objectives.generative import GenerativeConfig, GenerativePretraining
from blip_pipelines.objectives.warm_start import ProjectionWarmStart
from blip_pipelines.training.checkpoint import Rows
from blip_pipelines.training.distributed import World
from blip_pipelines.training.loop import TrainingConfig, TrainingError, train
from blip_pipelines.training.optimizer import OptimizerConfig


@dataclass(frozen=True)
class Blip2Stage2Config:
    """Everything that decides what comes out.

    Args:
        prompting: how the language model is spoken to.
        stage1: False: the Q-Former starts anew as `qformer_start` says; an ablation.
        qformer_start: where stage 1 started; read without it only. `med`: the MED among the inputs.
        features: `cached` keeps the outputs of the frozen image encoder on disk; `live` runs it in every step.
        origins: captions to train on (human, web, synthetic); null for all.
        window_shards: shards whose rows are mixed with one another.
        max_tokens: of a caption, start and end included.
        loader_workers: processes that prepare batches ahead.
    """

    training: TrainingConfig
    optimizer: OptimizerConfig
    language: LanguageConfig
    prompting: Blip2Config = field(default_factory=Blip2Config)
    warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)
    objective: GenerativeConfig = field(default_factory=GenerativeConfig)
    stage1: bool = True
    qformer_start: Literal["med"] | QFormerStartConfig = "med"
    features: Literal["cached", "live"] = "cached"
    origins: tuple[str, ...] | None = None
    window_shards: int = 8
    max_tokens: int = 32
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    seed: int = 0
    loader_workers: int = speed_only(0)

    @property
    def needs_med(self) -> bool:
        return not self.stage1 and self.qformer_start == "med"


Config = Blip2Stage2Config


def run(config: dict[str, Any], inputs: Mapping[str, Path], work: Path, world: World) -> dict[str, Any]:
    """Facts: `rows`, `images`, `trainable` and `parameters`, `started` (what was loaded from where),
    `language_precision`, `frozen` (by part the hash of its weights, before and after training), `last` losses and the
    last `probe`.

    Raises:
        TrainingError: a frozen part changed.
    """
    settings = read(Blip2Stage2Config, config, "blip2_stage2")
    pairs = Pairs.open(inputs["pairs"], inputs["images"])
    train_pairs = pairs.select(split="train", origins=settings.origins)
    parts = Blip2Parts.open(
        inputs,
        settings.language,
        None if settings.stage1 else settings.qformer_start,
        settings.features == "cached",
        settings.seed,
        work,
        world,
    )
    model = Blip2(parts.former, parts.language, settings.prompting, parts.live_tower, settings.seed)
    before = parts.frozen_hashes()

    def phase(
        task: nn.Module, optimizer: OptimizerConfig, training: TrainingConfig, folder: Path, prompt: str, **how: Any
    ) -> Rows:
        reading = replace(settings, training=training)
        batches_from = batches_of(train_pairs, parts.images, parts.language.tokenizer, reading, prompt, world)
        return train(task, batches_from, optimizer, training, world, folder, settings.seed, work.name, **how)

    training, objective, warm = settings.training, settings.objective, settings.warm_start
    task = GenerativePretraining(model, objective, world, settings.seed)
    warmed: Rows = []
    if warm.steps:
        parts_of_it = ProjectionWarmStart(model, world), warm.optimizer, warm.training(training), folder_of(work)
        warmed = phase(*parts_of_it, "", shown=SHOWN)
    probe = None
    if world.is_first and training.validate_every_steps:
        probe = LanguageProbe(settings.probe, pairs, parts, model, objective, settings.max_tokens, training.precision)
    history = phase(task, settings.optimizer, training, work, objective.prompt, validate=probe, shown=("lm",))
    history = history + renamed(warmed)

    after = parts.frozen_hashes()
    if changed := [name for name in before if after[name] != before[name]]:
        raise TrainingError(f"the frozen {' and '.join(changed)} changed during training; report this, use no output")
    if world.is_first:
        export_blip2(
            *(parts.former, work / OUTPUTS, parts.tower, parts.start.tokenizer, asdict(parts.images.config)),
            model=model,
            temperature=parts.start.temperature,
        )
        keep_training(work, history, parts.images, training)
    trainable = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
    return {
        "rows": len(train_pairs),
        "images": len(train_pairs.unique_images()),
        "trainable": sum(trainable),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "started": parts.started,
        "language_precision": str(parts.language.dtype).removeprefix("torch."),
        "frozen": {name: {"before": before[name], "after": after[name]} for name in before},
        "last": next((row for row in reversed(history) if "lm" in row), {}),
        "probe": next((row for row in reversed(history) if any(name.startswith("val/") for name in row)), {}),
    }
