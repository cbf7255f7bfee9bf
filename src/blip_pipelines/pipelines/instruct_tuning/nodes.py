"""InstructBLIP: the BLIP-2 of stage 2 learns to follow instructions (InstructBLIP 2)."""

from pathlib import Path
from typing import Any

from blip_pipelines.pipelines.launching import Launched, launched
from blip_pipelines.pipelines.parameters import Stage, read_block

JOB = "blip_pipelines.jobs.instruct_tuning"


def read_parameters(block: dict[str, Any]) -> Stage:
    from blip_pipelines.jobs.instruct_tuning import Config
    from blip_pipelines.jobs.launch import LaunchConfig

    return read_block(Config, LaunchConfig, block, "instruct_tuning")


def tune(instructions: Path, own_images: Path, images: Path, stage2: Path, parameters: dict[str, Any]) -> Launched:
    """Train on the held-in data sets' `train` split.

    Args:
        instructions: the table.
        own_images: pictures that its data sets brought; found by the table.
        images: those of ingestion, which it speaks of where there are no others.
        stage2: the export of stage 2; not read where the parameters name a published model.

    Returns:
        The receipt of the exports and the last checkpoint; the curves; the run record.
    """
    stage = read_parameters(parameters)
    inputs = {"instructions": instructions, "images": images}
    if stage.config.published is None:
        inputs["start"] = stage2
    return launched(JOB, stage, inputs)
