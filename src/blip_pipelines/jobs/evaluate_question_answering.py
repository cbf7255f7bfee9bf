"""Ask a MED that learned to answer the held-out rows of an instruction table, each data set by its own metric.

An answer is chosen from the candidates where a row has any, or written. Every rank asks its share of the rows; the
first measures and writes `evaluation.answers.PREDICTIONS`, one row a question.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from blip_pipelines.config import ConfigError, read, speed_only
from blip_pipelines.data.instructions import Instructions
from blip_pipelines.data.question_loader import QuestionTokens
from blip_pipelines.data.transforms import ImageConfig
from blip_pipelines.inference.generation import GenerationConfig
from blip_pipelines.inference.question_answering import MedAnswerConfig, MedAnswerer
from blip_pipelines.jobs.exported import Precision
from blip_pipelines.jobs.instruction_answers import Asking, answers_of, drawn_rows, measure
from blip_pipelines.jobs.question_answering import QuestionLimits
from blip_pipelines.jobs.receipt import OUTPUTS
from blip_pipelines.jobs.training_data import Images
from blip_pipelines.models.question_answering import load_question_answering
from blip_pipelines.training.distributed import World


@dataclass(frozen=True)
class AskConfig:
    """What is asked, and how.

    Args:
        split: of the rows.
        data_sets: to ask; null for all.
        rows: of each data set, drawn by a hash, so that every model is asked the same; null for all.
        limits: as in training.
        answers: how they are found; by_task: how they are written for a task, in place of `answers.writing`.
        frames: of a video.
        bootstrap_draws: for the interval of the gain over one answer for all.
    """

    split: str = "test"
    data_sets: tuple[str, ...] | None = None
    rows: int | None = None
    limits: QuestionLimits = field(default_factory=QuestionLimits)
    answers: MedAnswerConfig = field(default_factory=MedAnswerConfig)
    by_task: dict[str, GenerationConfig] = field(default_factory=dict)
    frames: int = 4
    bootstrap_draws: int = 10_000
    seed: int = 0
    precision: Precision = "float32"
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
    table = Instructions.open(inputs["instructions"], inputs["images"])
    view = table.select(split=settings.split, data_set=settings.data_sets)
    view = view.select(rows=drawn_rows(view, settings.rows, settings.seed))
    if not len(view):
        raise ConfigError(f"evaluate_question_answering: no row of split {settings.split!r} in the chosen data sets")
    assert table.images is not None
    image = read(ImageConfig, exported.image, f"{inputs['model']}/med.json: image")
    images = Images(image, exported.stem, table.images, work, world)

    mine, tasks = np.array_split(np.arange(len(view)), world.ranks)[world.rank], set(view.column("task"))
    answerers = {task: MedAnswerer(model, tokens, _answers(settings, task)) for task in tasks}
    asking = Asking(settings.frames, None, settings.batch_rows)
    with torch.autocast(world.device.type, torch.bfloat16, enabled=settings.precision == "bfloat16"):
        answers = answers_of(answerers, view, images, mine, asking)
    answers = [answer for share in world.gather_objects(answers) for answer in share]
    metrics: dict[str, float] = {}
    if world.is_first:
        metrics = measure(view, answers, settings.bootstrap_draws, settings.seed, work / OUTPUTS)
    return {"metrics": metrics, "rows": len(view)}


def _answers(settings: AskConfig, task: str) -> MedAnswerConfig:
    answers = settings.answers
    writing = settings.by_task.get(task, answers.writing)
    return MedAnswerConfig(writing, answers.rank_in_full, answers.batch_answers)
