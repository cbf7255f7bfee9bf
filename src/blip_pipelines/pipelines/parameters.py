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
from blip_pipelines.pipelines.rounds import first_round

STAGES = (
    "ingestion",
    "med_pretraining",
    "capfilt",
    "med_bootstrapped",
    "blip2_stage1",
    "blip2_stage2",
    "instructions",
    "question_answering",
    "instruct_tuning",
    "evaluation",
    "release",
)
EXTENDS = {"med_bootstrapped": "med_pretraining"}  # stages whose block says only what differs from another's


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


def blocks_of(stage: str) -> tuple[str, ...]:
    """The blocks that a stage reads, later ones laid over earlier ones; all rounds read those of the first."""
    block = first_round(stage)
    return (EXTENDS[block], block) if block in EXTENDS else (block,)


def parameters_of(stage: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """What `read_stage` reads, unchecked; an absent block is empty."""
    found: dict[str, Any] = {}
    for block in blocks_of(stage):
        found = laid_over(found, values.get(block, {}))
    return found


def read_stage(stage: str, values: Mapping[str, Any]) -> Stage:
    """The block of one stage out of all parameters, as `nodes.read_parameters` of the stage reads it.

    Raises:
        ConfigError: the block is missing or wrong.
    """
    found: dict[str, Any] = {}
    for block in blocks_of(stage):
        if block not in values:
            raise ConfigError(f"{block}: no such block of parameters; add conf/base/parameters_{block}.yml")
        found = laid_over(found, values[block])
    return import_module(f"blip_pipelines.pipelines.{first_round(stage)}.nodes").read_parameters(found)


def laid_over(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """The block `base` with the values of `over` in their places, block by block."""
    both = {**base, **over}
    for key in base.keys() & over.keys():
        if isinstance(base[key], Mapping) and isinstance(over[key], Mapping):
            both[key] = laid_over(base[key], over[key])
    return both
