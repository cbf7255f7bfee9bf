"""Training on pairs of images and captions with a look at held-out ones: what MED and the Q-Former do alike."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from torch import nn

from blip_pipelines.data.pairs import Pairs
from blip_pipelines.data.tokens import CaptionTokenizer
from blip_pipelines.inference.image_text import ImageText
from blip_pipelines.jobs.probe import Probe, ProbeConfig
from blip_pipelines.jobs.training_data import DataSettings, Images, batches_of
from blip_pipelines.training.checkpoint import Rows
from blip_pipelines.training.distributed import World
from blip_pipelines.training.loop import train
from blip_pipelines.training.optimizer import OptimizerConfig


class PairSettings(DataSettings, Protocol):
    """The part of a training job's configuration that decides how it trains."""

    @property
    def optimizer(self) -> OptimizerConfig: ...
    @property
    def probe(self) -> ProbeConfig: ...


def train_on_pairs(
    task: nn.Module,
    model: ImageText,
    pairs: Pairs,
    train_pairs: Pairs,
    images: Images,
    tokenizer: CaptionTokenizer,
    settings: PairSettings,
    prompt: str,
    work: Path,
    world: World,
    shown: Sequence[str],
) -> Rows:
    """The history of the training; see `training.loop.train`.

    Args:
        model: what `task` trains, as the probe asks it.
        pairs: the whole table, from which the probe takes its rows.
        train_pairs: the view to train on.
        shown: names of losses for the line of progress.
    """
    training, probe = settings.training, None
    if world.is_first and training.validate_every_steps:
        probe = Probe(settings.probe, model, pairs, images, tokenizer, settings, world.device)
    return train(
        task,
        batches_of(train_pairs, images, tokenizer, settings, prompt, world),
        *(settings.optimizer, training, world, work, settings.seed, work.name),
        validate=probe,
        shown=shown,
    )
