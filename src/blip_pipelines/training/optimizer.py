"""AdamW with warm-up and cosine, counted in steps, and a learning rate scale per parameter that is really applied.

Differs: BLIP and LAVIS step the cosine once an epoch, warm up inside the first epoch only, and store a layer-wise
scale that no schedule reads. BLIP decays every parameter; here biases and norms are left out unless `decay_all`.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import nn

from blip_pipelines.config import ConfigError

_LAYER = re.compile(r"^(?P<tower>.*vision_model)\.encoder\.layers\.(?P<index>\d+)\.")
_EMBEDDINGS = re.compile(r"^.*vision_model\.embeddings\.")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule.

    Args:
        learning_rate: the peak.
        minimum: the learning rate at the last step.
        warmup_steps: of linear rise from `warmup_start`.
        layer_decay: factor per layer of the vision transformer, counted from its end.
        scales: factor on the learning rate by prefix of the parameter's name.
        decay_all: weight decay on biases and norms too, as BLIP.
    """

    learning_rate: float
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    weight_decay: float = 0.05
    warmup_steps: int = 0
    warmup_start: float = 0.0
    minimum: float = 0.0
    layer_decay: float = 1.0
    scales: dict[str, float] = field(default_factory=dict)
    decay_all: bool = False


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """The learning rate of optimizer step `step` (from 0) out of `steps`."""
    if step < config.warmup_steps:
        risen = (step + 1) / config.warmup_steps
        return config.warmup_start + risen * (config.learning_rate - config.warmup_start)
    passed = (step - config.warmup_steps) / max(steps - 1 - config.warmup_steps, 1)
    cosine = 0.5 * (1 + math.cos(math.pi * min(passed, 1.0)))
    return config.minimum + cosine * (config.learning_rate - config.minimum)


def make_adamw(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Fused AdamW over the trainable parameters, a group for each pair of scale and decay.

    Raises:
        ConfigError: a prefix in `scales` matches no trainable parameter.
    """
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, scale in learning_rate_scales(named, config).items():
        parameter = named[name]
        decay = config.weight_decay if parameter.ndim > 1 or config.decay_all else 0.0
        groups.setdefault((scale, decay), []).append(parameter)
    return torch.optim.AdamW(
        [{"params": members, "scale": scale, "weight_decay": decay} for (scale, decay), members in groups.items()],
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.epsilon,
        fused=True,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]


def learning_rate_scales(names: Iterable[str], config: OptimizerConfig) -> dict[str, float]:
    """The factor on the learning rate of each parameter.

    In a vision transformer of L layers the embeddings get layer_decay ** (L + 1), layer i (from 0) ** (L - i), what
    follows the layers 1; parameters elsewhere 1.
    """
    names = list(names)
    for prefix in config.scales:
        if not any(name.startswith(prefix) for name in names):
            raise ConfigError(f"optimizer.scales.{prefix}: no trainable parameter has this prefix")
    layers: dict[str, int] = {}
    for name in names:
        if match := _LAYER.match(name):
            layers[match["tower"]] = max(layers.get(match["tower"], 0), int(match["index"]) + 1)
    scales = {}
    for name in names:
        scale = math.prod(factor for prefix, factor in config.scales.items() if name.startswith(prefix))
        if match := _LAYER.match(name):
            scale *= config.layer_decay ** (layers[match["tower"]] - int(match["index"]))
        elif _EMBEDDINGS.match(name):
            scale *= config.layer_decay ** (layers.get(name.partition(".embeddings.")[0], 0) + 1)
        scales[name] = scale
    return scales
