"""MED pretraining again, on the corpus that CapFilt composed (BLIP 3.3)."""

from pathlib import Path
from typing import Any

from blip_pipelines.pipelines.launching import Launched, launched
from blip_pipelines.pipelines.med_pretraining.nodes import check_seal
from blip_pipelines.pipelines.parameters import Stage, laid_over, read_block

JOB = "blip_pipelines.jobs.med_pretraining"


def read_parameters(block: dict[str, Any]) -> Stage:
    """The block, laid over that of `med_pretraining`."""
    from blip_pipelines.jobs.launch import LaunchConfig
    from blip_pipelines.pipelines.med_bootstrapped.parameters import MedBootstrappedConfig

    return read_block(MedBootstrappedConfig, LaunchConfig, block, "med_bootstrapped")


def pretrain(
    pairs: Path,
    images: Path,
    packages: Path,
    checked: dict[str, str],
    before: Path,
    pretraining: dict[str, Any],
    parameters: dict[str, Any],
) -> Launched:
    """Train a new model from the usual start, or go on from the one before.

    Args:
        pairs: the composed corpus; checked: the hash of the pairs that keep their contracts.
        before: the model whose captioner and filter made the corpus.
        pretraining, parameters: the blocks `med_pretraining` and `med_bootstrapped`.

    Returns:
        The receipt of the exports and the last checkpoint; the curves; the run record.

    Raises:
        UncheckedPairsError: the pairs are not those that were checked.
    """
    check_seal(pairs, checked)
    stage = read_parameters(laid_over(pretraining, parameters))
    inputs = {"pairs": pairs, "images": images, "packages": packages}
    if stage.config.continued:
        inputs["start"] = before
    values = {key: value for key, value in stage.values.items() if key != "continued"}
    return launched(JOB, Stage(stage.config, values, stage.launch), inputs)
