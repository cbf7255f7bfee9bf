"""BLIP-2 stage 2: the Q-Former learns to speak to a frozen language model (BLIP-2 3.3)."""

from pathlib import Path
from typing import Any

from blip_pipelines.pipelines.launching import Launched, launched
from blip_pipelines.pipelines.med_pretraining.nodes import check_seal
from blip_pipelines.pipelines.parameters import Stage, read_block

JOB = "blip_pipelines.jobs.blip2_stage2"


def read_parameters(block: dict[str, Any]) -> Stage:
    from blip_pipelines.jobs.blip2_stage2 import Config
    from blip_pipelines.jobs.launch import LaunchConfig

    return read_block(Config, LaunchConfig, block, "blip2_stage2")


def pretrain(
    pairs: Path,
    images: Path,
    packages: Path,
    checked: dict[str, str],
    stage1: Path,
    med: Path,
    parameters: dict[str, Any],
) -> Launched:
    """Train on the `train` split.

    Args:
        pairs, images: the data set.
        packages: wheels, one of which holds the language model; read where the parameters name it.
        checked: the hash of the pairs that keep their contracts.
        stage1: the export of stage 1.
        med: from which stage 1 started; read only for the ablation without it.

    Returns:
        The receipt of the exports and the last checkpoint; the curves; the run record.

    Raises:
        UncheckedPairsError: the pairs are not those that were checked.
    """
    check_seal(pairs, checked)
    stage = read_parameters(parameters)
    inputs = {"pairs": pairs, "images": images, "packages": packages, "start": stage1}
    if stage.config.needs_med:
        inputs["med"] = med
    return launched(JOB, stage, inputs)
