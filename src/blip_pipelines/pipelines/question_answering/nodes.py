"""MED learns to answer questions (BLIP 5.3)."""

from pathlib import Path
from typing import Any

from blip_pipelines.jobs.receipt import Receipt
from blip_pipelines.pipelines.launching import launched
from blip_pipelines.pipelines.parameters import Stage, read_block

JOB = "blip_pipelines.jobs.question_answering"


def read_parameters(block: dict[str, Any]) -> Stage:
    from blip_pipelines.jobs.launch import LaunchConfig
    from blip_pipelines.pipelines.question_answering.parameters import QuestionAnsweringStage

    return read_block(QuestionAnsweringStage, LaunchConfig, block, "question_answering")


def learn_to_answer(
    instructions: Path, own_images: Path, images: Path, first: Path, last: Path, parameters: dict[str, Any]
) -> tuple[Receipt, list[dict[str, float]], dict[str, Any]]:
    """Train on the held-in data sets' `train` split.

    Args:
        instructions: the table.
        own_images: pictures that its data sets brought; found by the table.
        images: those of ingestion, which it speaks of where there are no others.
        first, last: the MED before CapFilt and after its last round; the parameters say which one goes on.

    Returns:
        The receipt of the export and the last checkpoint; the curves; the run record.
    """
    stage = read_parameters(parameters)
    values = {key: value for key, value in stage.values.items() if key != "start"}
    start = first if stage.config.start == "before_capfilt" else last
    inputs = {"instructions": instructions, "images": images, "start": start}
    done = launched(JOB, Stage(stage.config, values, stage.launch), inputs)
    return done.receipt, done.history, done.record
