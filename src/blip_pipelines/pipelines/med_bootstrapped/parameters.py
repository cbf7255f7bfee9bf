"""The block `med_bootstrapped`: it says only what differs from `med_pretraining`, with which it is to be compared."""

from dataclasses import dataclass

from blip_pipelines.jobs.med_pretraining import MedPretrainingConfig


@dataclass(frozen=True)
class MedBootstrappedConfig(MedPretrainingConfig):
    """`MedPretrainingConfig`, and where it starts.

    Args:
        continued: from the model of the round before, instead of the usual start; no better in BLIP's table 13.
    """

    continued: bool = False
