"""The block `med_bootstrapped`: it says only what differs from `med_pretraining`, with which it is to be compared."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from blip_pipelines.jobs.med_pretraining import MedPretrainingConfig


@dataclass(frozen=True)
class MedBootstrappedConfig(MedPretrainingConfig):
    """`MedPretrainingConfig`, and where it starts.

    Args:
        continued: from the model of the round before, instead of the usual start; no better in BLIP's table 13.
    """

    continued: bool = False


def laid_over(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """The block `base` with the values of `over` in their places, block by block."""
    both = {**base, **over}
    for key in base.keys() & over.keys():
        if isinstance(base[key], Mapping) and isinstance(over[key], Mapping):
            both[key] = laid_over(base[key], over[key])
    return both
