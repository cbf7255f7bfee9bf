"""Rounds of CapFilt: each is a stage `capfilt` and a stage `med_bootstrapped`, from the second on with its number.

Which stages there are must be known before any environment is chosen, so the number of rounds is read from conf/base.
"""

from collections.abc import Callable, Mapping
from functools import partial, update_wrapper
from pathlib import Path
from typing import Any

from blip_pipelines.config import ConfigError

BASE = Path("conf/base/parameters_capfilt.yml")


def in_round(name: str, number: int) -> str:
    """The name of a stage or data set in a round: `capfilt`, `capfilt_2`, ..."""
    return name if number == 1 else f"{name}_{number}"


def first_round(stage: str) -> str:
    """The name that a stage has in the first round; it is also that of its block of parameters."""
    name, _, number = stage.rpartition("_")
    return name if number.isdigit() else stage


def models_of(rounds: int) -> tuple[str, ...]:
    """The stages that pretrain a MED, in their order."""
    return ("med_pretraining", *(in_round("med_bootstrapped", number) for number in range(1, rounds + 1)))


def with_known(function: Callable[..., Any], **known: Any) -> Callable[..., Any]:
    """A node's function with arguments that its place in the pipeline decides."""
    return update_wrapper(partial(function, **known), function)


def check_rounds(values: Mapping[str, Any], root: Path) -> None:
    """Raise ConfigError where an environment or `--params` ask for rounds that are no stages."""
    asked = values.get("capfilt", {}).get("rounds", 1)
    if asked != (known := configured_rounds(root)):
        raise ConfigError(
            f"capfilt.rounds: {asked}, and {BASE} says {known}; each round is a stage, and which stages there are is "
            f"the same in every environment: change it there, then `make dvc-yaml`"
        )


def configured_rounds(root: Path) -> int:
    """`capfilt.rounds` of conf/base in the project at `root`; 1 where there is none."""
    import yaml

    path = root / BASE
    block = yaml.safe_load(path.read_text("utf-8"))["capfilt"] if path.exists() else {}
    return int(block.get("rounds", 1))
