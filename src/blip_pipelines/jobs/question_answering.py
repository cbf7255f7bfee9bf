"""MED learns to answer questions about pictures (BLIP 5.3), from the same table as instruction tuning.

Inputs: `instructions`, `images`, and `start`, the export of a pretrained MED, which also gives the tokenizer and the
frozen stem.

Outputs: the export of `models.exports.export_med` of the kind question_answering, `checkpoint/` (everything training
left) and `history.json`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blip_pipelines.config import ConfigError, read, speed_only
from blip_pipelines.data.instructions import Instructions
from blip_pipelines.data.mixture import InstructionOrder
from blip_pipelines.data.question_loader import QuestionLoader, QuestionTokens
from blip_pipelines.data.transforms import ImageConfig
from blip_pipelines.jobs.exported import its_tokenizer
from blip_pipelines.jobs.question_probe import QuestionProbe, QuestionProbeConfig
from blip_pipelines.jobs.receipt import OUTPUTS
from blip_pipelines.jobs.training_data import Images, keep_training
from blip_pipelines.models.exports import export_med, load_med
from blip_pipelines.models.precision import is_half
from blip_pipelines.models.question_answering import KIND, QuestionAnswering
from blip_pipelines.objectives.question_answering import AnswerLossConfig, AnswerTraining
from blip_pipelines.training.distributed import World
from blip_pipelines.training.loop import TrainingConfig, train
from blip_pipelines.training.optimizer import OptimizerConfig


@dataclass(frozen=True)
class QuestionLimits:
    """Tokens of a question and of an answer, special ones included; what is longer is cut at its end."""

    question: int = 35
    answer: int = 10

    def check(self, positions: int) -> None:
        for name, value in vars(self).items():
            if not 2 < value <= positions:
                raise ConfigError(f"question_answering.limits.{name}: {value} is outside 3 to {positions}, the model's")


@dataclass(frozen=True)
class QuestionAnsweringConfig:
    """Everything that decides what comes out.

    Args:
        image: what differs from the `ImageConfig` of the start, such as `augment`.
        data_sets: to train on; null for all that are held in.
        multipliers: of their probabilities, by data set; null for those that the table brings.
        window_shards: shards whose rows are mixed with one another.
        loader_workers: processes that prepare batches ahead.
    """

    training: TrainingConfig
    optimizer: OptimizerConfig
    objective: AnswerLossConfig = field(default_factory=AnswerLossConfig)
    limits: QuestionLimits = field(default_factory=QuestionLimits)
    image: dict[str, Any] = field(default_factory=dict)
    data_sets: tuple[str, ...] | None = None
    multipliers: dict[str, float] | None = None
    window_shards: int = 8
    probe: QuestionProbeConfig = field(default_factory=QuestionProbeConfig)
    seed: int = 0
    loader_workers: int = speed_only(0)


Config = QuestionAnsweringConfig


def run(config: dict[str, Any], inputs: Mapping[str, Path], work: Path, world: World) -> dict[str, Any]:
    """Facts: `rows`; `probabilities` and `shares` by data set, as set and as drawn; `parameters`; the `last` loss.

    Raises:
        ConfigError: there is nothing to train on, or the model's positions do not reach.
    """
    settings = read(QuestionAnsweringConfig, config, "question_answering")
    start = load_med(inputs["start"])
    tokenizer = its_tokenizer(start, inputs["start"])
    model = QuestionAnswering(start.med)
    settings.limits.check(model.config.text.max_positions)
    table = Instructions.open(inputs["instructions"], inputs["images"])
    rows = table.select(split="train", role="held_in", data_set=settings.data_sets)
    order = InstructionOrder.of(rows, settings.multipliers, settings.seed, settings.window_shards)
    tokens = QuestionTokens(tokenizer, settings.limits.question, settings.limits.answer)
    image = read(ImageConfig, {**start.image, **settings.image}, "question_answering.image")
    assert table.images is not None
    images = Images(image, start.stem, table.images, work, world)

    training = settings.training
    read_images = images.reader(rows, settings.seed, train=True)

    def batches_from(step: int) -> QuestionLoader:
        return QuestionLoader(
            *(rows, order, read_images, tokens),
            *(training.batch_samples_global, training.accumulation, world.rank, world.ranks, training.steps, step),
            workers=settings.loader_workers,
        )

    probe = None
    if world.is_first and training.validate_every_steps:
        probe = QuestionProbe(settings.probe, table, images, model, tokens, is_half(training.precision))
    history = train(
        *(AnswerTraining(model, settings.objective), batches_from, settings.optimizer, training, world, work),
        *(settings.seed, work.name),
        validate=probe,
        shown=("lm",),
    )
    if world.is_first:
        export_med(
            *(model, work / OUTPUTS, tokenizer, {**start.image, **settings.image}),
            stem=start.stem,
            label_smoothing=settings.objective.label_smoothing,
            kinds=(KIND,),
        )
        keep_training(work, history, images, training)
    return {
        "rows": len(rows),
        "probabilities": order.probabilities,
        "shares": order.shares(training.steps * training.batch_samples_global),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "last": next((row for row in reversed(history) if "lm" in row), {}),
        "probe": next((row for row in reversed(history) if any(name.startswith("val/") for name in row)), {}),
    }
