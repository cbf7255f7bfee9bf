"""Parameters of the release."""

from dataclasses import dataclass, field

from blip_pipelines.evaluation.gate import GateConfig


@dataclass(frozen=True)
class ReleaseConfig:
    """Args:
    alias: that new versions get, for people and servers to ask for; the gate makes one of them `champion`.
    gate: what a champion must be.
    """

    alias: str = "candidate"
    gate: GateConfig = field(default_factory=GateConfig)
