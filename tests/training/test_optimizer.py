"""The schedule, and the learning rate that each parameter really gets."""

import math

import pytest
import torch
from torch import nn

from blip_pipelines.config import ConfigError
from blip_pipelines.training.optimizer import (
    OptimizerConfig,
    learning_rate,
    learning_rate_scales,
    make_adamw,
    set_learning_rate,
)


def test_schedule_rises_linearly_to_the_peak_and_falls_as_a_cosine_to_the_minimum() -> None:
    config = OptimizerConfig(1.0, warmup_steps=4, warmup_start=0.2, minimum=0.1)
    rates = [learning_rate(config, step, 13) for step in range(13)]
    assert rates[:4] == pytest.approx([0.4, 0.6, 0.8, 1.0])
    assert rates[4] == pytest.approx(1.0)  # the cosine starts where the warm-up ended
    assert rates[8] == pytest.approx(0.1 + 0.9 * 0.5)  # half way down at half time
    assert rates[6] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)
    assert rates[12] == pytest.approx(0.1)


def test_warmup_longer_than_the_run_never_jumps() -> None:
    config = OptimizerConfig(1.0, warmup_steps=100)
    assert [learning_rate(config, step, 4) for step in range(4)] == pytest.approx([0.01, 0.02, 0.03, 0.04])


NAMES = [
    "model.vision_model.embeddings.class_embedding",
    "model.vision_model.encoder.layers.0.mlp.fc1.weight",
    "model.vision_model.encoder.layers.11.mlp.fc1.weight",
    "model.vision_model.post_layernorm.weight",
    "model.text_encoder.encoder.layer.0.output.dense.weight",
]


def test_layer_decay_falls_from_the_last_layer_to_the_embeddings_of_the_vision_tower() -> None:
    scales = learning_rate_scales(NAMES, OptimizerConfig(1.0, layer_decay=0.5))
    assert [scales[name] for name in NAMES] == [0.5**13, 0.5**12, 0.5**1, 1.0, 1.0]


def test_scale_by_prefix_multiplies_and_an_unknown_prefix_is_an_error() -> None:
    scales = learning_rate_scales(NAMES, OptimizerConfig(1.0, scales={"model.text": 3.0}))
    assert [scales[name] for name in NAMES] == [1.0, 1.0, 1.0, 1.0, 3.0]
    with pytest.raises(ConfigError, match=r"optimizer\.scales\.model\.texxt"):
        learning_rate_scales(NAMES, OptimizerConfig(1.0, scales={"model.texxt": 3.0}))


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.vision_model = nn.ModuleDict(
            {"encoder": nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(2, 2) for _ in range(2))})}
        )
        self.head = nn.Linear(2, 2)
        self.idle = nn.Linear(2, 2).requires_grad_(False)


def test_scaled_learning_rate_moves_each_parameter_by_its_scale() -> None:
    """The first Adam step moves a weight by the learning rate, whatever the size of its gradient."""
    tower = Tower()
    before = {name: parameter.detach().clone() for name, parameter in tower.named_parameters()}
    optimizer = make_adamw(tower, OptimizerConfig(9.0, layer_decay=0.1, weight_decay=0.0))
    set_learning_rate(optimizer, 1e-2)
    for parameter in tower.parameters():
        parameter.grad = torch.full_like(parameter, 7.0) if parameter.requires_grad else None
    optimizer.step()
    moved = {name: (before[name] - parameter).detach() for name, parameter in tower.named_parameters()}
    for name, rate in {
        "vision_model.encoder.layers.0": 1e-4,
        "vision_model.encoder.layers.1": 1e-3,
        "head": 1e-2,
    }.items():
        torch.testing.assert_close(moved[f"{name}.weight"], torch.full((2, 2), rate), rtol=1e-3, atol=1e-7)
    assert not moved["idle.weight"].any()


@pytest.mark.parametrize(("decay_all", "expected"), [(False, {"weight"}), (True, {"weight", "bias"})])
def test_weight_decay_leaves_out_biases_and_norms_unless_told(decay_all: bool, expected: set[str]) -> None:
    layer = nn.Linear(2, 2)
    optimizer = make_adamw(layer, OptimizerConfig(1.0, weight_decay=0.3, decay_all=decay_all))
    names = {id(parameter): name for name, parameter in layer.named_parameters()}
    decayed = {
        names[id(member)] for group in optimizer.param_groups if group["weight_decay"] for member in group["params"]
    }
    assert decayed == expected
