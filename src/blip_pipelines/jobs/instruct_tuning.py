"""InstructBLIP: the BLIP-2 of stage 2 learns to follow instructions about pictures (InstructBLIP 2).

Q-Former, queries, `ln_vision` and projection go on from stage 2, the Q-Former's text side from stage 1, which stage 2
kept; image encoder and language model stay as they are.

Inputs: `instructions`, `images`, and `start`, the export of stage 2, or a published model where the parameters name
one (`published`).

Outputs: the export of `models.blip2_exports.export_blip2`, `checkpoint/` (everything training left) and `history.json`,
in which the curve of a warm start comes last, under a name of its own.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import nn

from blip_pipelines.config import ConfigError, read, speed_only
from blip_pipelines.data.instruction_loader import InstructionLoader
from blip_pipelines.data.instruction_tokens import InstructionTokens, TokenLimits
from blip_pipelines.data.instructions import Instructions
from blip_pipelines.data.mixture import InstructionOrder
from blip_pipelines.data.storage import StorageError
from blip_pipelines.data.transforms import ImageConfig
from blip_pipelines.jobs.instruction_probe import InstructionProbe, ProbeConfig
from blip_pipelines.jobs.receipt import OUTPUTS
from blip_pipelines.jobs.training_data import Images, keep_training
from blip_pipelines.jobs.warm_start import SHOWN, InstructWarmStartConfig, folder_of, renamed
from blip_pipelines.models.blip2 import Blip2
from blip_pipelines.models.blip2_exports import ExportedBlip2, export_blip2, load_blip2
from blip_pipelines.models.frozen import weights_hash
from blip_pipelines.models.published import PublishedConfig, open_published
from blip_pipelines.objectives.instruct import CUT, InstructConfig, InstructionTuning
from blip_pipelines.objectives.warm_start import ProjectionWarmStart, Told, move_behind
from blip_pipelines.training.checkpoint import Rows
from blip_pipelines.training.distributed import World
from blip_pipelines.training.loop import TrainingConfig, TrainingError, train
from blip_pipelines.training.optimizer import OptimizerConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PromptConfig:
    """What the language model reads.

    Args:
        prompt: with `{image}` where the picture goes and, behind it, `{instruction}`.
        chat: it is a user's turn in the words of the chat template.
    """

    prompt: str = "{image}{instruction}"
    chat: bool = False


@dataclass(frozen=True)
class InstructTuningConfig:
    """Everything that decides what comes out.

    Args:
        instruction_aware: the Q-Former reads the instruction too; False is the paper's ablation.
        limits: of instructions and answers; what is longer is cut and counted.
        warm_start: before, without the language model; 0 steps as published.
        published: a model from elsewhere to start from, in place of the input `start`.
        features: `cached` keeps the outputs of the frozen image encoder on disk; `live` runs it in every step.
        data_sets: to train on; null for all that are held in.
        multipliers: of their probabilities, by data set; null for those that the table brings.
        window_shards: shards whose rows are mixed with one another.
        loader_workers: processes that prepare batches ahead.
    """

    training: TrainingConfig
    optimizer: OptimizerConfig
    prompting: PromptConfig = field(default_factory=PromptConfig)
    instruction_aware: bool = True
    limits: TokenLimits = field(default_factory=TokenLimits)
    objective: InstructConfig = field(default_factory=InstructConfig)
    warm_start: InstructWarmStartConfig = field(default_factory=InstructWarmStartConfig)
    published: PublishedConfig | None = None
    features: Literal["cached", "live"] = "cached"
    data_sets: tuple[str, ...] | None = None
    multipliers: dict[str, float] | None = None
    window_shards: int = 8
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    seed: int = 0
    loader_workers: int = speed_only(0)


Config = InstructTuningConfig


def run(config: dict[str, Any], inputs: Mapping[str, Path], work: Path, world: World) -> dict[str, Any]:
    """Facts: `rows`; `probabilities` and `shares` by data set, as set and as drawn; `cut`, how many of the drawn
    instructions and answers were cut; `trainable`, `parameters`; `frozen`, by part the hash of its weights before and
    after training; `last` losses and the last `probe`.

    Raises:
        ConfigError: there is nothing to train on or to start from, or the Q-Former's positions do not reach.
        TrainingError: a frozen part changed.
    """
    settings = read(InstructTuningConfig, config, "instruct_tuning")
    start, model = _start(settings, inputs, world)
    table = Instructions.open(inputs["instructions"], inputs["images"])
    rows = table.select(split="train", role="held_in", data_set=settings.data_sets)
    order = InstructionOrder.of(rows, settings.multipliers, settings.seed, settings.window_shards)
    assert start.tokenizer is not None and table.images is not None
    tokens = InstructionTokens(model.language.tokenizer, model.place, start.tokenizer, settings.limits)
    image = read(ImageConfig, start.image, "image of the starting point")
    images = Images(image, start.tower if settings.features == "cached" else None, table.images, work, world)
    model.tower = None if images.features else start.tower
    before = _frozen_hashes(start, model)

    training, warm, read_images = settings.training, settings.warm_start, images.reader(rows, settings.seed, train=True)

    def phase(task: nn.Module, optimizer: OptimizerConfig, training: TrainingConfig, folder: Path, **how: Any) -> Rows:
        def batches_from(step: int) -> InstructionLoader:
            return InstructionLoader(
                *(rows, order, read_images, tokens, settings.seed),
                *(training.batch_samples_global, training.accumulation, world.rank, world.ranks, training.steps, step),
                workers=settings.loader_workers,
            )

        return train(task, batches_from, optimizer, training, world, folder, settings.seed, work.name, **how)

    warmed: Rows = []
    if warm.steps:
        if warm.kept_queries >= model.former.config.queries:
            raise ConfigError(
                f"instruct_tuning.warm_start.kept_queries: {warm.kept_queries} leaves none of the "
                f"{model.former.config.queries} queries for the answer; lower it"
            )
        told = Told(model, warm.kept_queries) if warm.kept_queries else None
        move_behind(model.former, warm.kept_queries)
        before_it = ProjectionWarmStart(model, world, told), warm.optimizer, warm.training(training), folder_of(work)
        warmed = phase(*before_it, shown=SHOWN)
    probe = None
    if world.is_first and training.validate_every_steps:
        probe = InstructionProbe(settings.probe, table, images, model, tokens, settings.objective, training.precision)
    task = InstructionTuning(model, settings.objective)
    history = phase(task, settings.optimizer, training, work, validate=probe, shown=("lm",)) + renamed(warmed)
    after = _frozen_hashes(start, model)
    if changed := [name for name in before if after[name] != before[name]]:
        raise TrainingError(f"the frozen {' and '.join(changed)} changed during training; report this, use no output")
    if world.is_first:
        export_blip2(
            *(model.former, work / OUTPUTS, start.tower, start.tokenizer, start.image),
            model=model,
            temperature=start.temperature,
        )
        keep_training(work, history, images, training)
    trainable = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
    return {
        "rows": len(rows),
        "probabilities": order.probabilities,
        "shares": order.shares(training.steps * training.batch_samples_global),
        "cut": _cut(history, training),
        "trainable": sum(trainable),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "frozen": {name: {"before": before[name], "after": after[name]} for name in before},
        "last": next((row for row in reversed(history) if "lm" in row), {}),
        "probe": next((row for row in reversed(history) if any(name.startswith("val/") for name in row)), {}),
    }


def _start(settings: InstructTuningConfig, inputs: Mapping[str, Path], world: World) -> tuple[ExportedBlip2, Blip2]:
    """The starting point, and its model as it is to be tuned."""
    if settings.published is not None:
        start, where = open_published(settings.published), settings.published.source
    elif "start" in inputs:
        start, where = load_blip2(inputs["start"]), str(inputs["start"])
    else:
        raise ConfigError(
            "instruct_tuning.published: name a model, as there is no input `start`, the export of stage 2"
        )
    if start.model is None or start.tokenizer is None:
        raise StorageError(f"{where}: no language model in it, or no tokenizer; give the export of stage 2")
    if (room := start.former.config.text.max_positions) < settings.limits.question:
        raise ConfigError(
            f"instruct_tuning.limits.question: {settings.limits.question} tokens are more than the Q-Former's {room} "
            "positions; lower it"
        )
    if "{instruction}" not in settings.prompting.prompt:
        raise ConfigError(f"instruct_tuning.prompting.prompt: {settings.prompting.prompt!r} has no {{instruction}}")
    logger.info("start: %s", where)
    start.model.instruct(settings.prompting.prompt, settings.prompting.chat, settings.instruction_aware)
    return start, start.model


def _frozen_hashes(start: ExportedBlip2, model: Blip2) -> dict[str, str]:
    return {"tower": weights_hash(start.tower), "language model": weights_hash(model.language)}


def _cut(history: Rows, training: TrainingConfig) -> dict[str, int]:
    """Counts over the steps that the history has, and of how many samples these are."""
    steps = [row for row in history if CUT[0] in row]
    found = {name.removeprefix("cut_"): int(sum(row[name] for row in steps)) for name in CUT}
    return {**found, "samples": len(steps) * training.batch_samples_global}
