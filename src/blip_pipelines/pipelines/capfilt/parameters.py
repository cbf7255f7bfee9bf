"""The block `capfilt`. It imports what it configures, torch included: read it only when the stage is about to run."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from blip_pipelines.config import ConfigError, speed_only
from blip_pipelines.data.composition import RuleConfig
from blip_pipelines.data.contracts import ContractsConfig
from blip_pipelines.jobs import capfilt_judge, capfilt_write
from blip_pipelines.jobs.med_pretraining import ProbeConfig
from blip_pipelines.objectives.med import MedObjectiveConfig
from blip_pipelines.training.loop import TrainingConfig
from blip_pipelines.training.optimizer import OptimizerConfig


@dataclass(frozen=True)
class FinetuneConfig:
    """A job `med_pretraining` that goes on from a model: sizes, tokenizer and stem are that model's.

    Args:
        objective: the captioner has weights of LM alone, the filter of ITC and ITM.
        origins: captions to train on; in later rounds those of origin web are what the last round kept.
        image: what differs from the model's `ImageConfig`, such as `crop_scale`.
    """

    training: TrainingConfig
    optimizer: OptimizerConfig
    objective: MedObjectiveConfig
    origins: tuple[str, ...] = ("human",)
    image: dict[str, Any] = field(default_factory=dict)
    window_shards: int = 8
    max_tokens: int = 30
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    seed: int = 0
    loader_workers: int = speed_only(0)


@dataclass(frozen=True)
class CapfiltConfig:
    """One round of CapFilt; further ones have the same parameters.

    Args:
        rounds: how many rounds there are; read from conf/base, whatever the environment.
        decoupled: two models, as BLIP's (its table 12: a captioner and a filter that share parameters drop less of
            what they wrote). Otherwise the captioner is trained on the losses of both and is the filter too.
    """

    captioner: FinetuneConfig
    filter: FinetuneConfig
    write: capfilt_write.Config = field(default_factory=capfilt_write.Config)
    judge: capfilt_judge.Config = field(default_factory=capfilt_judge.Config)
    rule: RuleConfig = field(default_factory=RuleConfig)
    contracts: ContractsConfig = field(default_factory=ContractsConfig)
    rounds: int = speed_only(1)  # a round's result does not depend on how many follow
    decoupled: bool = True

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ConfigError(f"capfilt.rounds: {self.rounds}; there is at least one round")
        if self.captioner.objective.prompt != self.write.prompt:
            raise ConfigError(
                f"capfilt.write.prompt: {self.write.prompt!r} is not capfilt.captioner.objective.prompt, "
                f"{self.captioner.objective.prompt!r}, with which the captioner learns to speak"
            )


def job_values(block: Mapping[str, Any], model: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of the job `med_pretraining` that a `FinetuneConfig` stands for.

    Args:
        block: plain values of a `FinetuneConfig`; model: the note `med.json` beside the model to go on from.
    """
    sizes = {name: model["config"][name] for name in ("vision", "text", "projection", "initializer")}
    return {"origins": ["human"], **block, **sizes, "image": {**model["image"], **block.get("image", {})}}
