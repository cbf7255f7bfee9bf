"""Ask an exported BLIP-2 or InstructBLIP the held-out rows of an instruction table, each data set by its own metric.

An answer is chosen from the candidates where a row has any, or written. Every rank asks its share of the rows; the
first measures and writes `evaluation.answers.PREDICTIONS`, one row a question.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from blip_pipelines.config import ConfigError, read, speed_only
from blip_pipelines.data.instruction_tokens import INSTRUCTION, InstructionTokens, TokenLimits
from blip_pipelines.data.instructions import Instructions
from blip_pipelines.data.storage import StorageError
from blip_pipelines.data.transforms import ImageConfig
from blip_pipelines.inference.answering import AnswerConfig, Answerer
from blip_pipelines.jobs.exported import Precision
from blip_pipelines.jobs.instruct_tuning import PromptConfig
from blip_pipelines.jobs.instruction_answers import Asking, answers_of, drawn_rows, measure
from blip_pipelines.jobs.receipt import OUTPUTS
from blip_pipelines.jobs.training_data import Images
from blip_pipelines.models.blip2_exports import load_blip2
from blip_pipelines.training.distributed import World


@dataclass(frozen=True)
class EvaluateInstructionsConfig:
    """What is asked, and how.

    Args:
        split: of the rows.
        data_sets: to ask; null for all.
        rows: of each data set, drawn by a hash, so that every model is asked the same; null for all.
        prompting: for a model whose own prompt has no place for an instruction, as after stage 2.
        limits: of instructions and candidates.
        answers: how they are found; by_task: for a task, in place of that.
        most_candidates: an answer is chosen where there are at most so many, and else written; null: always chosen.
        frames: of a video.
        bootstrap_draws: for the interval of the gain over one answer for all.
    """

    split: str = "test"
    data_sets: tuple[str, ...] | None = None
    rows: int | None = None
    prompting: PromptConfig = field(default_factory=PromptConfig)
    limits: TokenLimits = field(default_factory=TokenLimits)
    answers: AnswerConfig = field(default_factory=AnswerConfig)
    by_task: dict[str, AnswerConfig] = field(default_factory=dict)
    most_candidates: int | None = None
    frames: int = 4
    bootstrap_draws: int = 10_000
    seed: int = 0
    precision: Precision = "float32"
    batch_rows: int = speed_only(32)


Config = EvaluateInstructionsConfig


def run(config: dict[str, Any], inputs: dict[str, Path], work: Path, world: World) -> dict[str, Any]:
    """Facts: `metrics`, flat, as `evaluation.answers.AnswerMetrics`; `rows`, how many were asked.

    Args:
        inputs: `model`, the folder of `export_blip2` with a language model; `instructions`; `images`.

    Raises:
        ConfigError: no row is to be asked, or the Q-Former's positions do not reach.
        StorageError: the folder has no language model or no tokenizer.
    """
    settings = read(Config, config, "evaluate_instructions")
    exported = load_blip2(inputs["model"])
    if exported.model is None or exported.tokenizer is None:
        raise StorageError(f"{inputs['model']}: no language model in it, or no tokenizer; give a model after stage 2")
    model = exported.model.to(world.device)
    if INSTRUCTION not in model.config.prompt:
        model.speak(settings.prompting.prompt, settings.prompting.chat)
    tokens = InstructionTokens(model.language.tokenizer, model.place, exported.tokenizer, settings.limits)
    table = Instructions.open(inputs["instructions"], inputs["images"])
    view = table.select(split=settings.split, data_set=settings.data_sets)
    view = view.select(rows=drawn_rows(view, settings.rows, settings.seed))
    if not len(view):
        raise ConfigError(f"evaluate_instructions: no row of split {settings.split!r} in the chosen data sets")
    assert table.images is not None
    image = read(ImageConfig, exported.image, f"{inputs['model']}/blip2.json: image")
    images = Images(image, exported.tower, table.images, work, world)
    model.tower = None  # its outputs are read from the cache

    mine = np.array_split(np.arange(len(view)), world.ranks)[world.rank]
    answerers = {
        task: Answerer(model, tokens, settings.by_task.get(task, settings.answers))
        for task in set(view.values("task", np.arange(len(view))))
    }
    asking = Asking(settings.frames, settings.most_candidates, settings.batch_rows)
    with torch.autocast(world.device.type, torch.bfloat16, enabled=settings.precision == "bfloat16"):
        answers = answers_of(answerers, view, images, mine, asking)
    answers = [answer for share in world.gather_objects(answers) for answer in share]
    metrics: dict[str, float] = {}
    if world.is_first:
        metrics = measure(view, answers, settings.bootstrap_draws, settings.seed, work / OUTPUTS)
    return {"metrics": metrics, "rows": len(view)}
