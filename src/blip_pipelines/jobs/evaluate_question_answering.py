"""Ask a MED that learned to answer the held-out rows of an instruction table (`asked_rows`)."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from blip_pipelines.config import read, speed_only
from blip_pipelines.data.question_loader import QuestionTokens
from blip_pipelines.data.transforms import ImageConfig
from blip_pipelines.inference.generation import GenerationConfig
from blip_pipelines.inference.question_answering import MedAnswerConfig, MedAnswerer
from blip_pipelines.jobs.asked_rows import AskedRowsConfig, ask
from blip_pipelines.jobs.question_answering import QuestionLimits
from blip_pipelines.jobs.training_data import Images
from blip_pipelines.models.question_answering import load_question_answering
from blip_pipelines.training.distributed import World


@dataclass(frozen=True)
class AskConfig(AskedRowsConfig):
    """What is asked, and how.

    Args:
        limits: as in training.
        answers: how they are found; by_task: how they are written for a task, in place of `answers.writing`.
    """

    limits: QuestionLimits = field(default_factory=QuestionLimits)
    answers: MedAnswerConfig = field(default_factory=MedAnswerConfig)
    by_task: dict[str, GenerationConfig] = field(default_factory=dict)
    batch_rows: int = speed_only(64)


Config = AskConfig


def run(config: dict[str, Any], inputs: dict[str, Path], work: Path, world: World) -> dict[str, Any]:
    """Facts: `metrics`, flat, as `evaluation.answers.AnswerMetrics`; `rows`, how many were asked.

    Args:
        inputs: `model`, the export of the job `question_answering`; `instructions`; `images`.

    Raises:
        ConfigError: no row is to be asked, or the model's positions do not reach.
    """
    settings = read(Config, config, "evaluate_question_answering")
    exported = load_question_answering(inputs["model"])
    model = exported.model.to(world.device)
    settings.limits.check(model.config.text.max_positions)
    tokens = QuestionTokens(exported.tokenizer, settings.limits.question, settings.limits.answer)
    view = settings.rows_of(inputs, "evaluate_question_answering")
    assert view.images is not None
    image = read(ImageConfig, exported.image, f"{inputs['model']}/med.json: image")
    images = Images(image, exported.stem, view.images, work, world)

    def answerer_of(task: str) -> MedAnswerer:
        answers = settings.answers
        return MedAnswerer(model, tokens, replace(answers, writing=settings.by_task.get(task, answers.writing)))

    return ask(view, answerer_of, images, settings, None, work, world)
