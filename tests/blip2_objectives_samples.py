"""Small batches for the objectives of BLIP-2, and a plain training run over them on any number of ranks."""

from typing import Any

import torch
from blip2_samples import tiny_image, tiny_language, tiny_qformer
from model_samples import tiny_texts
from objectives_samples import ALONE, descend
from tokenizers.processors import TemplateProcessing

from blip_pipelines.data.loader import Batch
from blip_pipelines.models.blip2 import Blip2, Blip2Config
from blip_pipelines.objectives.generative import GenerativeConfig, GenerativePretraining
from blip_pipelines.objectives.qformer import QFormerLossWeights, QFormerObjectiveConfig, QFormerPretraining
from blip_pipelines.objectives.warm_start import ProjectionWarmStart, Told, move_behind

ROWS = 6  # of a global micro-batch
SAID = ("a red crab on the house", "the", "", "a big dog", "it is the small picture of a house", "dog on it")


def micro_batches(step: int, accumulation: int, prompt_tokens: int = 0, texts=None, rows: int = ROWS) -> list[Batch]:
    """The global micro-batches of a step; images and texts repeat, in a batch and over steps, and lengths differ."""
    generator = torch.Generator().manual_seed(step)
    images = tiny_image(4).double()
    word_ids, word_mask = tiny_texts((7, 4, 5, 4, 6), seed=2) if texts is None else texts
    drawn, targets = [], 0
    for _ in range(accumulation):
        image_ids, text_ids = (torch.randint(0, most, (rows,), generator=generator) for most in (4, len(word_ids)))
        if texts is not None:  # each caption once
            text_ids = torch.randperm(len(word_ids), generator=generator)[:rows]
        elif step == 1:
            text_ids[:] = 3  # equal captions: no row has a negative
        longest = int(word_mask[text_ids].sum(1).max())
        ids, mask = word_ids[text_ids][:, :longest], word_mask[text_ids][:, :longest]
        targets += int((mask.sum(1) - 1 - prompt_tokens).clamp(min=0).sum())
        drawn.append((images[image_ids], ids, mask, image_ids, text_ids, torch.arange(rows)))
    return [Batch(*batch, targets, prompt_tokens) for batch in drawn]


def make_qformer_task(world=ALONE, accumulation: int = 1, weights=(1.0, 0.7, 1.3), **config) -> QFormerPretraining:
    values = {"temperature": 0.2, "negatives_uniform_share": 0.25, **config}
    objective = QFormerObjectiveConfig(weights=QFormerLossWeights(*weights), **values)
    return QFormerPretraining(tiny_qformer(3), objective, world, seed=5, accumulation=accumulation).double().train()


def tiny_blip2(kind: str, prompt: str = "picture : {image} it is") -> Blip2:
    """With a T5 whose tokenizer ends a text, as the published one does."""
    language = tiny_language(kind)
    if kind == "t5":
        end = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", language.tokenizer.end)])
        language.tokenizer.stock.backend_tokenizer.post_processor = end
    return Blip2(tiny_qformer(3), language, Blip2Config(prompt), seed=3)


def make_generative_task(world=ALONE, kind: str = "opt", **config) -> GenerativePretraining:
    return GenerativePretraining(tiny_blip2(kind), GenerativeConfig(**config), world, seed=5).double().train()


def make_warm_start(world=ALONE, kind: str = "llama") -> ProjectionWarmStart:
    return ProjectionWarmStart(tiny_blip2(kind), world).double().train()


def make_keeping_warm_start(world=ALONE, kind: str = "llama") -> ProjectionWarmStart:
    blip2 = tiny_blip2(kind)
    told = Told(blip2, 1)
    move_behind(blip2.former, 1)
    return ProjectionWarmStart(blip2, world, told).double().train()


def spoken_batches(task, step: int, accumulation: int, prompt_tokens: int = 0) -> list[Batch]:
    texts = [torch.from_numpy(part) for part in task.blip2.language.tokenizer(SAID, 12)]
    return micro_batches(step, accumulation, prompt_tokens, texts)


def train_qformer(world, accumulation: int, prompt_tokens: int) -> dict[str, Any]:
    task = make_qformer_task(world, accumulation)
    return descend(task, world, lambda step: micro_batches(step, accumulation, prompt_tokens), 2)


def train_qformers(world, variants: dict[str, tuple]) -> dict[str, Any]:
    return {name: train_qformer(world, *arguments) for name, arguments in variants.items()}


TASKS = {
    "generative": make_generative_task,
    "warm start": make_warm_start,
    "warm start that keeps": make_keeping_warm_start,
}


def train_generative(world, variants: dict[str, tuple]) -> dict[str, Any]:
    """By name: which task, which language model, how many micro-steps."""
    found = {}
    for name, (make, kind, accumulation) in variants.items():
        task = TASKS[make](world, kind)
        found[name] = descend(
            task, world, lambda step, task=task, count=accumulation: spoken_batches(task, step, count), 2
        )
    return found


def close(found, expected, what: str, bound: float = 1e-9) -> None:
    """Float64 throughout but for the shares of counts."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name in expected:
            close(found[name], expected[name], f"{what}: {name}", bound)
        return
    bound = bound if expected.dtype == torch.float64 else 1e-6
    torch.testing.assert_close(found, expected, rtol=bound, atol=bound / 10, msg=lambda text: f"{what}: {text}")


def compare(found: dict, expected: dict, what: str, bound: float = 1e-9) -> None:
    """Two runs of `descend`."""
    for part_name in ("losses", "gradients"):
        for step, pair in enumerate(zip(found[part_name], expected[part_name], strict=True)):
            close(*pair, f"{what}, {part_name} of step {step}", bound)
