"""Stage 1 of BLIP-2: a Q-Former learns, from the composed corpus, what a frozen image encoder shows (BLIP-2 3.2)."""

from pathlib import Path
from typing import Any

from blip_pipelines.pipelines.launching import Launched, launched
from blip_pipelines.pipelines.med_pretraining.nodes import check_seal
from blip_pipelines.pipelines.parameters import Stage, read_block

JOB = "blip_pipelines.jobs.blip2_stage1"


def read_parameters(block: dict[str, Any]) -> Stage:
    from blip_pipelines.jobs.blip2_stage1 import Config
    from blip_pipelines.jobs.launch import LaunchConfig

    return read_block(Config, LaunchConfig, block, "blip2_stage1")


def learn_queries(
    pairs: Path, images: Path, packages: Path, checked: dict[str, str], med: Path, parameters: dict[str, Any]
) -> Launched:
    """Train the Q-Former on the `train` split.

    Args:
        pairs: the composed corpus; checked: the hash of the pairs that keep their contracts.
        packages: wheels; read where the parameters name them.
        med: the model whose image encoder is frozen and whose text side the Q-Former starts from, unless the parameters
            name others.

    Returns:
        The receipt of the exports and the last checkpoint; the curves; the run record.

    Raises:
        UncheckedPairsError: the pairs are not those that were checked.
    """
    check_seal(pairs, checked)
    stage = read_parameters(parameters)
    inputs = {"pairs": pairs, "images": images, "packages": packages}
    if stage.config.needs_med:
        inputs["med"] = med
    return launched(JOB, stage, inputs)
