"""The block `evaluation`: how models are measured on captions and retrieval, and what those that answer are asked."""

from dataclasses import dataclass, field

from blip_pipelines.jobs.evaluate_instructions import EvaluateInstructionsConfig
from blip_pipelines.jobs.measuring import MeasuringConfig
from blip_pipelines.pipelines.parameters import Stage


@dataclass(frozen=True)
class EvaluationConfig(MeasuringConfig):
    """`MeasuringConfig`, and `questions` out of the instruction table."""

    questions: EvaluateInstructionsConfig = field(default_factory=EvaluateInstructionsConfig)


def measuring(stage: Stage) -> Stage:
    """What a job that measures captions or retrieval is given."""
    return Stage(stage.config, {key: value for key, value in stage.values.items() if key != "questions"}, stage.launch)


def asking(stage: Stage) -> Stage:
    """What a job that asks questions is given."""
    return Stage(stage.config.questions, stage.values.get("questions", {}), stage.launch)
