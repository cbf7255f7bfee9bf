"""The block `evaluation`: how models are measured on captions and retrieval, and what those that answer are asked."""

from dataclasses import dataclass, field

from blip_pipelines.jobs.evaluate_instructions import EvaluateInstructionsConfig
from blip_pipelines.jobs.evaluate_question_answering import AskConfig
from blip_pipelines.jobs.measuring import MeasuringConfig
from blip_pipelines.pipelines.parameters import Stage

ASKING = ("questions", "med_questions")


@dataclass(frozen=True)
class EvaluationConfig(MeasuringConfig):
    """`MeasuringConfig`, and questions out of the instruction table: `questions` for models that speak through a
    language model, `med_questions` for a MED.
    """

    questions: EvaluateInstructionsConfig = field(default_factory=EvaluateInstructionsConfig)
    med_questions: AskConfig = field(default_factory=AskConfig)


def measuring(stage: Stage) -> Stage:
    """What a job that measures captions or retrieval is given."""
    return Stage(stage.config, {key: value for key, value in stage.values.items() if key not in ASKING}, stage.launch)


def asking(stage: Stage, block: str = "questions") -> Stage:
    """What a job that asks questions is given, out of one of the blocks `ASKING`."""
    return Stage(getattr(stage.config, block), stage.values.get(block, {}), stage.launch)
