"""The parameters of a stage, read strictly: one block of `conf/<env>/parameters_<stage>.yml` each.

A block holds the configuration of the stage's work and, under `launch`, how that is started. Its module may import
torch, so a block is read only when its stage is about to run.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from blip_pipelines.config import ConfigError, read

STAGES = ("ingestion", "med_pretraining", "evaluation", "release")


@dataclass(frozen=True)
class Stage:
    """One block, checked.

    Args:
        config: what the job reads; its fields are the keys of the block.
        values: the same as plain values.
        launch: how the work is started: `jobs.launch.LaunchConfig`, or `work.WorkConfig` where no job is launched.
    """

    config: Any
    values: dict[str, Any]
    launch: Any


def read_block(kind: type, launch: type, block: Mapping[str, Any], stage: str) -> Stage:
    """A block as `kind`, its `launch` as that.

    Raises:
        ConfigError: a key that nothing reads, or a value of the wrong kind.
    """
    values = {key: value for key, value in block.items() if key != "launch"}
    return Stage(read(kind, values, stage), values, read(launch, block.get("launch", {}), f"{stage}.launch"))


def check_stages(values: Mapping[str, Any]) -> None:
    """Raise ConfigError on a top-level key that is no stage."""
    for key in values:
        if key not in STAGES:
            near = difflib.get_close_matches(str(key), STAGES, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"known blocks: {', '.join(STAGES)}"
            raise ConfigError(f"{key}: unknown block of parameters; {hint}")


def read_stage(stage: str, values: Mapping[str, Any]) -> Stage:
    """The block of one stage out of all parameters, as `nodes.read_parameters` of the stage reads it.

    Raises:
        ConfigError: the block is missing or wrong.
    """
    if stage not in values:
        raise ConfigError(f"{stage}: no such block of parameters; add conf/base/parameters_{stage}.yml")
    return import_module(f"blip_pipelines.pipelines.{stage}.nodes").read_parameters(values[stage])
