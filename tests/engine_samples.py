"""A task small enough to train in milliseconds that has every kind of state a real one has, and jobs around it.

The launched jobs of the tests are this module: it is importable by name in the workers, as every job is.
"""

import os
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from blip_pipelines.config import read, speed_only
from blip_pipelines.data.storage import write_json
from blip_pipelines.training import checkpoint
from blip_pipelines.training.distributed import World
from blip_pipelines.training.loop import TrainingConfig, TrainingError, train
from blip_pipelines.training.optimizer import OptimizerConfig

WIDTH = 8


class TinyTask(nn.Module):
    """Regression with dropout, tied weights, an average that follows, and a ring of past batches' features."""

    def __init__(self, world: World | None = None, dropout: float = 0.1, accumulation: int = 1, batch: int = 8):
        super().__init__()
        self.world, self.batch, self.accumulation = world or World(), batch, accumulation
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first = nn.Linear(WIDTH, WIDTH)
            self.again = nn.Linear(WIDTH, WIDTH)
            self.out = nn.Linear(WIDTH, 1)
        self.again.weight = self.first.weight
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("average", self.out.weight.detach().clone())
        self.register_buffer("ring", torch.zeros(16, WIDTH))
        self.register_buffer("pointer", torch.tensor(0))
        self._seen: Tensor | None = None

    def before_step(self, step: int) -> None:
        with torch.no_grad():
            self.average.lerp_(self.out.weight, 0.1)

    def after_micro_step(self) -> None:
        assert self._seen is not None
        slots = (self.pointer + torch.arange(len(self._seen))) % len(self.ring)
        self.ring[slots] = self._seen
        self.pointer.copy_((self.pointer + len(self._seen)) % len(self.ring))

    def forward(self, batch: Tensor, step: int) -> dict[str, Tensor]:
        hidden = self.again(torch.tanh(self.dropout(self.first(batch))))
        wrong = self.out(hidden).to(batch.dtype) - batch.sum(1, keepdim=True)
        hidden = hidden.to(batch.dtype)
        self._seen = self.world.gather(hidden.detach())
        near = (hidden @ self.ring.T).pow(2).mean(1) + (hidden * self.average).sum(1).pow(2)
        divisor = self.batch * self.accumulation
        fit, spread = wrong.pow(2).sum() / divisor, near.sum() / divisor
        return {"fit": fit.detach(), "spread": spread.detach(), "loss": fit + 0.1 * spread}


def batches_from(
    start: int, world: World | None = None, accumulation: int = 1, batch: int = 8
) -> Iterator[list[Tensor]]:
    """Micro-batches of this rank as a pure function of the step, for ever."""
    world = world or World()
    while True:
        rows = torch.randn(accumulation, batch, WIDTH, generator=torch.Generator().manual_seed(start))
        own = slice(world.rank * batch // world.ranks, (world.rank + 1) * batch // world.ranks)
        yield [micro[own] for micro in rows]
        start += 1


@dataclass(frozen=True)
class Config:
    """Of the job in this module.

    Args:
        fail: where it goes wrong and how: {"step": 3, "rank": 1, "how": "raise"}.
    """

    training: TrainingConfig
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(0.01, warmup_steps=3))
    seed: int = 0
    dropout: float = 0.1
    step_seconds: float = speed_only(0.0)
    fail: dict[str, Any] | None = speed_only(None)  # noqa: RUF009


def run(config: dict[str, Any], inputs: dict[str, Path], work: Path, world: World) -> dict[str, Any]:
    """The job: train the tiny task, leave its state and history."""
    parsed = read(Config, config, "tiny")
    accumulation, batch = (
        parsed.training.accumulation,
        parsed.training.batch_samples_global // parsed.training.accumulation,
    )
    task = TinyTask(world, parsed.dropout, accumulation, batch)

    def batches(start: int) -> Iterator[list[Tensor]]:
        for step, micro_batches in enumerate(batches_from(start, world, accumulation, batch), start):
            time.sleep(parsed.step_seconds)
            if parsed.fail and (parsed.fail["step"], parsed.fail["rank"]) == (step, world.rank):
                _fail(parsed.fail["how"], work)
            yield micro_batches

    history = train(task, batches, parsed.optimizer, parsed.training, world, work, parsed.seed)
    if world.is_first:
        newest = checkpoint.checkpoints(work / "checkpoints")[0]
        shutil.copytree(newest, work / "out" / "checkpoint")
        write_json(work / "out" / "history.json", history)
    return {"steps": parsed.training.steps, "inputs": sorted(inputs)}


def _fail(how: str, work: Path) -> None:
    how, once, _ = how.partition(" once")
    before = work / f"failed-{how}"
    if once and before.exists():
        return
    before.touch()
    if how == "raise":
        raise ValueError("bad sample: caption 17 is empty")
    os.kill(os.getpid(), {"kill": signal.SIGKILL, "terminate": signal.SIGTERM}[how])


def train_whole_and_cut(world: World, folder: str, precision: str) -> dict[str, Any]:
    """Train once uninterrupted and once cut in two; on each rank what both leave. For `on_ranks`."""
    config = TrainingConfig(
        steps=6, batch_samples_global=12, accumulation=2, precision=precision, checkpoint_every_steps=2, peak_flops=1e9
    )
    left = {}
    for name, cuts in ("whole", [6]), ("cut", [3, 6]):
        for until in cuts:
            task = TinyTask(world, 0.3 if world.ranks > 2 else 0.0, config.accumulation, 6)
            batches = [*zip(range(until), batches_from(0, world, config.accumulation, 6), strict=False)]
            try:
                history = train(
                    *(task, lambda start, batches=batches: [batch for _, batch in batches[start:]]),
                    *(OptimizerConfig(0.01), config, world, Path(folder) / name, 3),
                )
            except TrainingError:  # the batches ended
                world.barrier()
        newest = checkpoint.checkpoints(Path(folder) / name / "checkpoints")[0]
        left[name] = {
            "weights": {key: value.clone() for key, value in task.state_dict().items()},
            "files": {file: (newest / file).read_bytes() for file in (checkpoint.TENSORS, checkpoint.HISTORY)},
            "history": history,
        }
        world.barrier()
    return left
