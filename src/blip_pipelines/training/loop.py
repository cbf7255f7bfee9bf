"""The training loop: one optimizer step as the paper has it, and what happens between steps.

A task is a module whose forward turns a micro-batch into losses by name, each of them this rank's share: the sum over
ranks and micro-steps is the loss of the global batch. The loop knows no model and no objective.

The promise: a run that is killed at any moment and started again ends with the same bits as one that is not, on the
same machine type, versions, number of ranks and threads. So draws are functions of seed, step and row, kernels are
deterministic, and nothing that depends on time or on where a run was cut enters the arithmetic.
"""

import hashlib
import logging
import math
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

from blip_pipelines.config import ConfigError, speed_only
from blip_pipelines.data.storage import write_json
from blip_pipelines.models.precision import Precision, dtype_of, is_half
from blip_pipelines.training import checkpoint
from blip_pipelines.training.checkpoint import CheckpointError, Rows
from blip_pipelines.training.distributed import World
from blip_pipelines.training.meter import Meter, measure_peak_flops
from blip_pipelines.training.optimizer import OptimizerConfig, learning_rate, make_adamw, set_learning_rate
from blip_pipelines.training.progress import Progress

CHECKPOINTS = "checkpoints"
SPEED = "speed.json"

logger = logging.getLogger(__name__)
deterministic: Any = torch.utils.deterministic


@dataclass(frozen=True)
class TrainingConfig:
    """How long, how large, how precise; and how often to look.

    Args:
        batch_samples_global: of one optimizer step, over all ranks and micro-steps.
        accumulation: micro-steps of an optimizer step; ITC's candidates are those of one micro-step.
        precision: of the matrix products under autocast; parameters and losses are float32. See `Precision`.
        clip_norm: largest norm of the gradient; 0 does not clip.
        compile: the layers; a resumed run may then compile for other shapes and be equal to rounding only.
        history_every_steps: losses kept for the curves.
        log_every_steps: losses are read from the device this often.
        peak_flops: of the device, for MFU; measured at the start if not given.
    """

    steps: int
    batch_samples_global: int
    accumulation: int = 1
    precision: Precision = "bfloat16"
    clip_norm: float = 1.0
    compile: bool = False
    history_every_steps: int = 1
    validate_every_steps: int = 0
    checkpoint_every_steps: int = speed_only(100)
    log_every_steps: int = speed_only(10)
    progress_every_seconds: float = speed_only(30.0)
    peak_flops: float | None = speed_only(None)

    def __post_init__(self) -> None:
        for name in ("steps", "batch_samples_global", "accumulation", "history_every_steps", "checkpoint_every_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"training.{name}: {getattr(self, name)} is not at least 1")


class TrainingError(RuntimeError):
    """Training cannot go on; the message says at which step and why."""


class Stopped(Exception):
    """Told to stop by SIGTERM: the state is saved."""


def train(
    task: nn.Module,
    batches_from: Callable[[int], Iterable[Sequence[Any]]],
    optimizer_config: OptimizerConfig,
    config: TrainingConfig,
    world: World,
    work: Path,
    seed: int,
    fingerprint: str = "",
    validate: Callable[[int], Mapping[str, float]] | None = None,
    shown: Sequence[str] = ("loss",),
) -> Rows:
    """Train `task` in place to its last step, from the newest sound checkpoint in `work` if there is one.

    Args:
        task: forward(batch, step) -> losses, "loss" among them; `before_step(step)` and `after_micro_step()` if it has
            them; `flops_per_sample` if it knows; `frozen`, names of submodules that checkpoints only name.
        batches_from: the micro-batches of each optimizer step, from the given step on; each has `to(device)`.
        validate: called on rank 0 with the number of steps done; its numbers join the history.
        shown: losses on the progress line.

    Returns:
        The history on rank 0, rows {"step": steps done, name: value}, losses global; on other ranks nothing of use.

    Raises:
        Stopped: after SIGTERM, with the state saved at the end of a step.
        TrainingError: a loss is not finite.
        StorageError, CheckpointError: a checkpoint cannot be written, or belongs to something else.
    """
    with reproducible(world.device), stop_requests() as stop_requested:
        task.to(world.device).train()
        optimizer = make_adamw(task, optimizer_config)
        folder = work / CHECKPOINTS
        facts = {
            **{"fingerprint": fingerprint, "ranks": world.ranks, "threads": torch.get_num_threads()},
            "precision": str(dtype_of(config.precision)).removeprefix("torch."),
            **{name: metadata.version(name) for name in ("torch", "transformers")},
            "frozen": checkpoint.frozen_hashes(task),
        }
        start, history, flops = _resume(folder, task, optimizer, facts, world)
        wrapped = wrap(task, config, world)
        flops = flops or getattr(task, "flops_per_sample", None)
        meter = _make_meter(config, world, flops)
        progress = Progress(config.progress_every_seconds)
        pending = _Pending(world)
        stop_agreed = torch.zeros((), device=world.device)
        done = start

        for step, batches in enumerate(meter.timed(batches_from(start) if start < config.steps else ()), start):
            rate = learning_rate(optimizer_config, step, config.steps)
            set_learning_rate(optimizer, rate)
            counter = FlopCounterMode(display=False) if step == 0 and not flops and not config.compile else None
            with counter or nullcontext():
                losses = train_step(task, wrapped, optimizer, batches, step, seed, config, world)
            if counter:
                flops = meter.flops_per_sample = counter.get_total_flops() * world.ranks / config.batch_samples_global
            done = step + 1
            meter.step()

            # Agreed one step late: the sum of this step is read in the next, when it has long arrived.
            stop = stop_agreed.item() > 0
            stop_agreed = world.sum(torch.full((), float(stop_requested()), device=world.device))
            last = done == config.steps
            save = last or stop or done % config.checkpoint_every_steps == 0
            look = last or (config.validate_every_steps > 0 and done % config.validate_every_steps == 0)
            if done % config.history_every_steps == 0 or last:
                pending.add({"step": done, "learning_rate": rate}, losses)
            if save or look or done % config.log_every_steps == 0 or done == start + 1:
                history += pending.read()
            if world.is_first:
                with meter.paused():
                    if look and validate:
                        history.append({"step": done, **_evaluate(task, validate, done)})
                    if save:
                        kept = {**facts, "flops_per_sample": flops}
                        checkpoint.save(folder, done, task, optimizer, history, kept)
                if save:
                    write_json(work / SPEED, meter.numbers())
                if last or progress.due:
                    progress.show(meter.line(done, config.steps, _newest(history, shown)), last)
            if last or stop:
                world.barrier()  # nobody leaves before it is saved
            if last:
                break
            if stop:
                raise Stopped(f"stopped by SIGTERM after step {done} of {config.steps}; saved")
        else:
            if start < config.steps:
                raise TrainingError(
                    f"the batches ended after step {done} of {config.steps}; `batches_from` gives too few"
                )
        task.eval()
        return history


def train_step(
    task: nn.Module,
    wrapped: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Any],
    step: int,
    seed: int,
    config: TrainingConfig,
    world: World,
) -> dict[str, Tensor]:
    """One optimizer step over the micro-batches; returns this rank's losses and the gradient norm, on the device."""
    _call(task, "before_step", step)  # the momentum encoder follows, the temperature is clamped
    losses: dict[str, Tensor] = {}
    for micro, batch in enumerate(batches):
        last = micro == len(batches) - 1
        _seed_dropout(seed, step, micro, world.rank)
        with nullcontext() if last else _no_sync(wrapped):
            with torch.autocast(world.device.type, torch.bfloat16, enabled=is_half(config.precision)):
                shares = wrapped(batch.to(world.device), step)
            (shares["loss"] * world.ranks).backward()  # all-reduce takes the mean over ranks
        _call(task, "after_micro_step")  # the queue takes this micro-batch's features
        losses = {name: losses.get(name, 0.0) + share.detach() for name, share in shares.items()}

    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = nn.utils.clip_grad_norm_(parameters, config.clip_norm or math.inf)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {**losses, "gradient_norm": norm}


def wrap(task: nn.Module, config: TrainingConfig, world: World) -> nn.Module:
    """The task as the step calls it: layers compiled by config, gradients averaged where there are several ranks."""
    if config.compile:
        # Each layer of each stack: alike layers share one compilation, and what depends on the step stays outside.
        for stack in [module for module in task.modules() if isinstance(module, nn.ModuleList)]:
            for layer in stack:
                layer.compile()
    if world.ranks == 1:
        return task
    parallel = DistributedDataParallel(_Started(task), forward_sync_buffers=False, gradient_as_bucket_view=True)
    # DDP lays its buckets out anew after the first backward. A resumed run would do its first step in the old layout,
    # and with more than two ranks the sums round by layout: so the first backward is an empty one, in every run.
    parallel(None, 0)["loss"].backward()
    task.zero_grad(set_to_none=True)
    return parallel


class _Started(nn.Module):
    """The task, which answers None with a loss that touches every parameter and is zero."""

    def __init__(self, task: nn.Module):
        super().__init__()
        self.task = task
        self.trainable = [parameter for parameter in task.parameters() if parameter.requires_grad]

    def forward(self, batch: Any, step: int) -> dict[str, Tensor]:
        if batch is None:
            return {"loss": torch.stack([parameter.sum() * 0 for parameter in self.trainable]).sum()}
        return self.task(batch, step)


class _Pending:
    """Losses on the device that nobody has read yet: reading makes the host wait, so it is done for many at once."""

    def __init__(self, world: World):
        self.world = world
        self.rows: list[tuple[dict[str, float], dict[str, Tensor]]] = []

    def add(self, row: dict[str, float], losses: dict[str, Tensor]) -> None:
        self.rows.append((row, losses))

    def read(self) -> Rows:
        """The rows with global losses; a collective.

        Raises:
            TrainingError: one of them is not finite.
        """
        if not self.rows:
            return []
        names = list(self.rows[0][1])
        shares = torch.stack([torch.stack([losses[name].float() for name in names]) for _, losses in self.rows])
        by_rank = self.world.gather(shares[None]).double().tolist()
        found = []
        for index, (row, _) in enumerate(self.rows):
            # In the order of ranks, so that it does not matter how many steps are read together.
            total = {name: sum(rank[index][column] for rank in by_rank) for column, name in enumerate(names)}
            total["gradient_norm"] = by_rank[0][index][names.index("gradient_norm")]
            if not all(map(math.isfinite, total.values())):
                raise TrainingError(
                    f"step {row['step']}: not finite: {total}. Lower the learning rate, lengthen the warm-up or train "
                    "in float32; the last checkpoint is from before"
                )
            found.append({**row, **total})
        self.rows = []
        return found


@contextmanager
def reproducible(device: torch.device) -> Iterator[None]:
    """Deterministic kernels, no autotuning; the random state outside is left as it was."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        deterministic.fill_uninitialized_memory,
        torch.backends.cudnn.benchmark,
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = False  # guards against reading garbage, costs time
    torch.backends.cudnn.benchmark = False
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        deterministic.fill_uninitialized_memory = before[2]
        torch.backends.cudnn.benchmark = before[3]


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Whether SIGTERM has come; it does nothing else while this is open. Signals reach the main thread only."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return
    before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGTERM, before)


def _resume(
    folder: Path, task: nn.Module, optimizer: torch.optim.Optimizer, facts: Mapping[str, Any], world: World
) -> tuple[int, Rows, float | None]:
    # One rank looks which is sound, so that all take the same.
    found = world.broadcast(checkpoint.newest_sound(folder) if world.is_first else None)
    if found is None:
        return 0, [], None
    state, history = checkpoint.load(found, task, optimizer)
    if state["fingerprint"] != facts["fingerprint"]:
        raise CheckpointError(f"{found}: of other parameters or data than this run; remove {folder}")
    if world.is_first:
        logger.info("going on from step %d", state["step"])
        for name in ("torch", "transformers", "ranks", "threads", "precision"):
            if state[name] != facts[name]:
                logger.warning(
                    "%s was %s and is %s: the result is equal to rounding, not bit for bit",
                    name,
                    state[name],
                    facts[name],
                )
    return state["step"], history, state["flops_per_sample"]


def _make_meter(config: TrainingConfig, world: World, flops: float | None) -> Meter:
    peak = config.peak_flops
    if peak is None and world.is_first:
        peak = measure_peak_flops(world.device, dtype_of(config.precision))
    return Meter(config.batch_samples_global, world.ranks, flops, peak)


def _evaluate(task: nn.Module, validate: Callable[[int], Mapping[str, float]], done: int) -> dict[str, float]:
    task.eval()
    with torch.no_grad():
        numbers = {name: float(value) for name, value in validate(done).items()}
    task.train()
    return numbers


def _newest(history: Rows, shown: Sequence[str]) -> dict[str, float]:
    row = next((row for row in reversed(history) if "loss" in row), {})
    return {name: row[name] for name in shown if name in row}


def _seed_dropout(seed: int, step: int, micro: int, rank: int) -> None:
    digest = hashlib.blake2b(f"{seed}/{step}/{micro}/{rank}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little") >> 1)


def _no_sync(wrapped: nn.Module) -> AbstractContextManager[None]:
    """Gradients stay on their rank."""
    return wrapped.no_sync() if isinstance(wrapped, DistributedDataParallel) else nullcontext()


def _call(task: nn.Module, hook: str, *arguments: Any) -> None:
    if method := getattr(task, hook, None):
        method(*arguments)
