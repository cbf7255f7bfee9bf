from dataclasses import dataclass, field
from typing import Literal

import pytest

from blip_pipelines.config import ConfigError, arithmetic, read, speed_only


@dataclass(frozen=True)
class Optimizer:
    learning_rate: float
    betas: tuple[float, float] = (0.9, 0.999)


@dataclass(frozen=True)
class Stage:
    optimizer: Optimizer
    steps: int = 10
    precision: Literal["float32", "bfloat16"] = "float32"
    queue: int | None = None
    origins: tuple[str, ...] = ("human",)
    weights: dict[str, float] = field(default_factory=dict)
    workers: int = speed_only(0)


def test_nested_values_are_read_with_their_kinds():
    stage = read(Stage, {"optimizer": {"learning_rate": "1e-3", "betas": [0, 1]}, "weights": {"itc": 1}}, "stage")
    assert stage.optimizer == Optimizer(1e-3, (0.0, 1.0))
    assert stage.weights == {"itc": 1.0}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"optimizer": {"learning_rat": 1.0}},
            r"stage\.optimizer\.learning_rat: unknown parameter; did you mean 'learning_rate'",
        ),
        ({"optimizer": {}}, r"stage\.optimizer\.learning_rate: missing"),
        ({"optimizer": {"learning_rate": 1.0}, "steps": 1.5}, r"stage\.steps: expected int, found 1\.5"),
        ({"optimizer": {"learning_rate": 1.0}, "steps": True}, r"stage\.steps: expected int, found True"),
        ({"optimizer": {"learning_rate": 1.0}, "precision": "half"}, r"stage\.precision: 'half' is not one of"),
        ({"optimizer": {"learning_rate": 1.0, "betas": [0.9]}}, r"stage\.optimizer\.betas: expected 2 values"),
        ({"optimizer": {"learning_rate": 1.0}, "origins": "human"}, r"stage\.origins: expected a list"),
        ({"optimizer": None}, r"stage\.optimizer: expected a block"),
    ],
)
def test_a_wrong_value_is_an_error_that_names_its_place(values, message):
    with pytest.raises(ConfigError, match=message):
        read(Stage, values, "stage")


def test_speed_does_not_enter_the_arithmetic():
    slow = read(Stage, {"optimizer": {"learning_rate": 1.0}, "workers": 0}, "stage")
    fast = read(Stage, {"optimizer": {"learning_rate": 1.0}, "workers": 8}, "stage")
    assert arithmetic(slow) == arithmetic(fast)
    assert arithmetic(slow) != arithmetic(read(Stage, {"optimizer": {"learning_rate": 2.0}}, "stage"))
