"""A look at held-out rows while a language model is taught to: loss and captions, each subset apart."""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from blip_pipelines.data.loader import Batch
from blip_pipelines.data.pairs import Pairs
from blip_pipelines.evaluation.captioning import score_captions
from blip_pipelines.evaluation.held_out import HeldOut, subsets_of
from blip_pipelines.inference.generation import GenerationConfig
from blip_pipelines.inference.language_decoder import write_captions
from blip_pipelines.jobs.blip2_parts import Blip2Parts
from blip_pipelines.models.blip2 import Blip2
from blip_pipelines.models.precision import Precision, is_half
from blip_pipelines.objectives.generative import GenerativeConfig, GenerativePretraining
from blip_pipelines.objectives.language_modelling import target_positions
from blip_pipelines.training.distributed import World


@dataclass(frozen=True)
class ProbeConfig:
    """Which rows.

    Args:
        subsets: of the split; null for all it has. Data without subsets are looked at as a whole.
        rows: of a subset, the first ones, for the loss.
        captions: images of them to write captions for, scored by CIDEr-D; 0 for none.
    """

    split: str = "val"
    subsets: tuple[str, ...] | None = None
    rows: int = 64
    captions: int = 0
    generation: GenerationConfig = field(default_factory=lambda: GenerationConfig("greedy", min_tokens=3))


class LanguageProbe:
    """What `train` calls on the first rank: `val/lm/<subset>`, and `val/cider/<subset>` where it is asked for."""

    def __init__(
        self,
        config: ProbeConfig,
        pairs: Pairs,
        parts: Blip2Parts,
        model: Blip2,
        objective: GenerativeConfig,
        max_tokens: int,
        precision: Precision,
    ):
        self.config, self.model, self.half = config, model, is_half(precision)
        # Of a world of its own: the other ranks are not here, and the loss of these rows is theirs alone.
        self.task = GenerativePretraining(model, objective, World())
        self.scenes: dict[str, tuple[HeldOut, Batch]] = {}
        held_out = pairs.select(split=config.split)
        for subset in subsets_of(held_out, config.subsets):
            rows = held_out.select(subset=subset)
            held = HeldOut(subset, rows.select(rows=np.arange(min(len(rows), config.rows))))
            ids, mask = parts.language.tokenizer(held.captions, max_tokens, objective.prompt)
            pixels = torch.from_numpy(parts.images.reader(held.rows)(np.arange(len(held.rows))))
            prompt_tokens = parts.language.tokenizer.prompt_tokens(objective.prompt)
            self.scenes[subset] = held, _batch(pixels, torch.from_numpy(ids), torch.from_numpy(mask), prompt_tokens)

    @torch.no_grad()
    def __call__(self, step: int) -> dict[str, float]:
        device, found = self.model.language_projection.weight.device, {}
        with torch.autocast(device.type, torch.bfloat16, enabled=self.half):
            for subset, (held, batch) in self.scenes.items():
                found[f"val/lm/{subset}"] = self.task(batch.to(device), 0)["lm"].item()
                if self.config.captions:
                    images = held.gallery.images[: self.config.captions]
                    captions = write_captions(self.model, batch.pixels[images].to(device), self.config.generation)
                    scores = score_captions(captions.texts, held.references[: len(images)])
                    found[f"val/cider/{subset}"] = scores.corpus["cider"]
        return found


def _batch(pixels: Tensor, token_ids_BT: Tensor, token_mask_BT: Tensor, prompt_tokens: int) -> Batch:
    every_row = torch.arange(len(pixels))
    targets = int(target_positions(token_mask_BT, prompt_tokens).sum())
    return Batch(pixels, token_ids_BT, token_mask_BT, every_row, every_row, every_row, targets, prompt_tokens)
