"""Rounds of CapFilt: each is a stage `capfilt` and a stage `med_bootstrapped`, from the second on with its number.

Which stages there are must be known before any environment is chosen, so the number of rounds is read from conf/base.
"""

from pathlib import Path

BASE = Path("conf/base/parameters_capfilt.yml")


def in_round(name: str, number: int) -> str:
    """The name of a stage or data set in a round: `capfilt`, `capfilt_2`, ..."""
    return name if number == 1 else f"{name}_{number}"


def block_of(stage: str) -> str:
    """The block of parameters of a stage: that of its first round."""
    name, _, number = stage.rpartition("_")
    return name if number.isdigit() else stage


def configured_rounds(root: Path) -> int:
    """`capfilt.rounds` of conf/base in the project at `root`; 1 where there is none."""
    import yaml

    path = root / BASE
    block = yaml.safe_load(path.read_text("utf-8"))["capfilt"] if path.exists() else {}
    return int(block.get("rounds", 1))
