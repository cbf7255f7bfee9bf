"""Ask an exported BLIP-2 or InstructBLIP the held-out rows of an instruction table (`asked_rows`)."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blip_pipelines.config import read
from blip_pipelines.data.instruction_tokens import INSTRUCTION, InstructionTokens, TokenLimits
from blip_pipelines.data.storage import StorageError
from blip_pipelines.data.transforms import ImageConfig
from blip_pipelines.inference.answering import AnswerConfig, Answerer
from blip_pipelines.jobs.asked_rows import AskedRowsConfig, ask
from blip_pipelines.jobs.instruct_tuning import PromptConfig
from blip_pipelines.jobs.training_data import Images
from blip_pipelines.models.blip2_exports import load_blip2
from blip_pipelines.training.distributed import World


@dataclass(frozen=True)
class EvaluateInstructionsConfig(AskedRowsConfig):
    """What is asked, and how.

    Args:
        prompting: for a model whose own prompt has no place for an instruction, as after stage 2.
        limits: of instructions and candidates.
        answers: how they are found; by_task: for a task, in place of that.
        most_candidates: an answer is chosen where there are at most so many, and else written; null: always chosen.
    """

    prompting: PromptConfig = field(default_factory=PromptConfig)
    limits: TokenLimits = field(default_factory=TokenLimits)
    answers: AnswerConfig = field(default_factory=AnswerConfig)
    by_task: dict[str, AnswerConfig] = field(default_factory=dict)
    most_candidates: int | None = None


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
    view = settings.rows_of(inputs, "evaluate_instructions")
    assert view.images is not None
    image = read(ImageConfig, exported.image, f"{inputs['model']}/blip2.json: image")
    images = Images(image, exported.tower, view.images, work, world)
    model.tower = None  # its outputs are read from the cache

    def answerer_of(task: str) -> Answerer:
        return Answerer(model, tokens, settings.by_task.get(task, settings.answers))

    return ask(view, answerer_of, images, settings, settings.most_candidates, work, world)
