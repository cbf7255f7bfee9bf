"""The warm start of the projection: a training of its own before one that runs the language model; ours, and short."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from blip_pipelines.config import ConfigError
from blip_pipelines.training.checkpoint import Rows
from blip_pipelines.training.loop import CHECKPOINTS, TrainingConfig
from blip_pipelines.training.optimizer import OptimizerConfig

WARM_START = "warm_start"
SHOWN: Sequence[str] = ("regression", "nearest", "spelled", "kept")


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


@dataclass(frozen=True)
class InstructWarmStartConfig(WarmStartConfig):
    """That of instruction tuning, whose start can describe pictures and should not lose that.

    Args:
        kept_queries: the first so many go on to say what they said of a picture, behind the others, which spell the
            answer. 0: all spell it.
    """

    kept_queries: int = 0

    def __post_init__(self) -> None:
        if self.kept_queries < 0:
            raise ConfigError(f"warm_start.kept_queries: {self.kept_queries} is below 0")
        if self.kept_queries and not self.steps:
            raise ConfigError("warm_start.kept_queries: without warm_start.steps nothing is kept; give both or none")


def folder_of(work: Path) -> Path:
    """Of its checkpoints: inside the folder of checkpoints, where a launcher looks for work to go on with."""
    return work / CHECKPOINTS / WARM_START


def renamed(rows: Rows) -> Rows:
    """Its curve, whose steps and losses are not those of the curves beside it."""
    return [{name if name == "step" else f"{WARM_START}/{name}": value for name, value in row.items()} for row in rows]
