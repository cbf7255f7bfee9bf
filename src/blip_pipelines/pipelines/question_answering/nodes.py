"""MED learns to answer questions (BLIP 5.3)."""

from pathlib import Path
from typing import Any

from blip_pipelines.pipelines.launching import Launched, launched
from blip_pipelines.pipelines.parameters import Stage, read_block

JOB = "blip_pipelines.jobs.question_answering"


def read_parameters(block: dict[str, Any]) -> Stage:
    from blip_pipelines.jobs.launch import LaunchConfig
    from blip_pipelines.jobs.question_answering import Config

    return read_block(Config, LaunchConfig, block, "question_answering")


def learn_to_answer(
    instructions: Path, own_images: Path, images: Path, med: Path, parameters: dict[str, Any]
) -> Launched:
    """Train on the held-in data sets' `train` split.

    Args:
        instructions: the table.
        own_images: pictures that its data sets brought; found by the table.
        images: those of ingestion, which it speaks of where there are no others.
        med: that learns.

    Returns:
        The receipt of the export and the last checkpoint; the curves; the run record.
    """
    inputs = {"instructions": instructions, "images": images, "start": med}
    return launched(JOB, read_parameters(parameters), inputs)
