"""The warm start of the projection: a training of its own before one that runs the language model; ours, and short."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from blip_pipelines.training.checkpoint import Rows
from blip_pipelines.training.loop import CHECKPOINTS, TrainingConfig
from blip_pipelines.training.optimizer import OptimizerConfig

WARM_START = "warm_start"
SHOWN: Sequence[str] = ("regression", "nearest", "spelled")


@dataclass(frozen=True)
class WarmStartConfig:
    """The phase before: soft prompts spell the words to be said, without the language model.

    Args:
        steps: 0 leaves it out, as the papers do.
    """

    steps: int = 0
    batch_samples_global: int = 128
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(1e-3))

    def training(self, training: TrainingConfig) -> TrainingConfig:
        """How it is trained, beside the training that follows."""
        return replace(
            training, steps=self.steps, batch_samples_global=self.batch_samples_global, validate_every_steps=0
        )


def folder_of(work: Path) -> Path:
    """Of its checkpoints: inside the folder of checkpoints, where a launcher looks for work to go on with."""
    return work / CHECKPOINTS / WARM_START


def renamed(rows: Rows) -> Rows:
    """Its curve, whose steps and losses are not those of the curves beside it."""
    return [{name if name == "step" else f"{WARM_START}/{name}": value for name, value in row.items()} for row in rows]
