"""Small batches for the MED objective, and a plain training run over them on any number of ranks."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from model_samples import tiny_med, tiny_texts
from torch.nn.parallel import DistributedDataParallel

from blip_pipelines.data.loader import Batch
from blip_pipelines.objectives import matching
from blip_pipelines.objectives.med import LossWeights, MedObjectiveConfig, MedPretraining
from blip_pipelines.training.distributed import World

ALONE = World()
ROWS = 6  # of a global micro-batch
CONFIG = {
    "momentum": 0.8,
    "queue_samples": 10,  # two micro-batches wrap it
    "alpha_max": 0.3,
    "alpha_ramp_steps": 2,
    "negatives_uniform_share": 0.25,
    "temperature": 0.2,
}


def micro_batches(step: int, accumulation: int, prompt_tokens: int = 0, rows: int = ROWS) -> list[Batch]:
    """The global micro-batches of a step; images and texts repeat, in a batch and over steps, and lengths differ."""
    generator = torch.Generator().manual_seed(step)
    images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    word_ids, word_mask = tiny_texts((7, 4, 5, 4, 6), seed=2)
    batches, targets = [], 0
    for _ in range(accumulation):
        image_ids, text_ids = (torch.randint(0, most, (rows,), generator=generator) for most in (4, 5))
        if step == 1:
            text_ids[:] = 3  # equal captions: no row has a negative
        mask = word_mask[text_ids]
        longest = int(mask.sum(1).max())
        targets += int((mask.sum(1) - 1 - prompt_tokens).clamp(min=0).sum())
        ids = word_ids[text_ids][:, :longest]
        batches.append((images[image_ids], ids, mask[:, :longest], image_ids, text_ids, torch.arange(rows)))
    return [Batch(*batch, targets, prompt_tokens) for batch in batches]


def part(batch: Batch, rank: int, ranks: int) -> Batch:
    """One rank's block of rows."""
    rows = len(batch.rows) // ranks
    own = slice(rank * rows, (rank + 1) * rows)
    tensors = {name: value[own] for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    return replace(batch, **tensors)


def make_task(world=ALONE, accumulation: int = 1, weights=(1.0, 0.7, 1.3), **config) -> MedPretraining:
    objective = MedObjectiveConfig(weights=LossWeights(*weights), **{**CONFIG, **config})
    task = MedPretraining(tiny_med(seed=3), objective, world, seed=5, accumulation=accumulation)
    return task.double().train()


def descend(task, world, batches_of, steps: int) -> dict[str, Any]:
    """Plain gradient descent for a few steps; losses global, the rest as this rank has it."""
    wrapped = task if world.ranks == 1 else DistributedDataParallel(task, forward_sync_buffers=False)
    losses, gradients = [], []
    for step in range(steps):
        hooks(task, "before_step", step)
        total: dict[str, torch.Tensor] = {}
        for batch in batches_of(step):
            shares = wrapped(part(batch, world.rank, world.ranks), step)
            (shares["loss"] * world.ranks).backward()
            hooks(task, "after_micro_step")
            for name, share in shares.items():
                total[name] = total.get(name, 0) + world.sum(share)
        trained = {name: parameter for name, parameter in task.named_parameters() if parameter.requires_grad}
        losses.append(total)
        gradients.append({name: parameter.grad.clone() for name, parameter in trained.items()})
        with torch.no_grad():
            for parameter in trained.values():
                parameter -= 0.1 * parameter.grad
                parameter.grad = None
    return {"losses": losses, "gradients": gradients}


def descend_plainly(task, loss_of: Callable[[int], torch.Tensor], steps: int) -> dict[str, Any]:
    """The same by the loss of a step as a test works it out, for tasks of one loss, `lm`."""
    named = {name: parameter for name, parameter in task.named_parameters() if parameter.requires_grad}
    losses, gradients = [], []
    for step in range(steps):
        loss = loss_of(step)
        found = torch.autograd.grad(loss, list(named.values()))
        losses.append({"loss": loss.detach(), "lm": loss.detach()})
        gradients.append(dict(zip(named, found, strict=True)))
        with torch.no_grad():
            for parameter, gradient in zip(named.values(), found, strict=True):
                parameter -= 0.1 * gradient
    return {"losses": losses, "gradients": gradients}


def hooks(task, name: str, *arguments) -> None:
    """As the training loop calls them."""
    if hook := getattr(task, name, None):
        hook(*arguments)


def train_small(world, steps: int, accumulation: int, prompt_tokens: int, weights, config: dict) -> dict[str, Any]:
    """What `descend` gives, and the state and the drawn negatives, as this rank has them."""
    task = make_task(world, accumulation, weights, **config)
    drawn, pairs_before = [], matching.matching_pairs

    def watched(text_of_image, image_of_text, rank, ranks):
        drawn.append(torch.stack([world.gather(text_of_image), image_of_text]))
        return pairs_before(text_of_image, image_of_text, rank, ranks)

    matching.matching_pairs = watched
    try:
        found = descend(task, world, lambda step: micro_batches(step, accumulation, prompt_tokens), steps)
        state = {name: value.clone() for name, value in task.state_dict().items()}
        return {**found, "state": state, "negatives": drawn}
    finally:
        matching.matching_pairs = pairs_before


def train_variants(world, variants: dict[str, tuple]) -> dict[str, Any]:
    return {name: train_small(world, *arguments) for name, arguments in variants.items()}
