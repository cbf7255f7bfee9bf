"""BLIP-2 stage 2: a frozen language model learns nothing, the Q-Former learns to speak to it (BLIP-2 3.3).

A decoder-only model is asked for the whole caption after the soft prompts. An encoder-decoder reads a first part of it
beside them and is asked for the rest (prefix LM). `objectives.warm_start` is a step before both, for short runs.

Every value that `forward` returns is a *share*, as in MED pretraining: summed over ranks and over the micro-steps of
an optimizer step it is the value of the whole global batch.

Differs: LAVIS leaves the split of prefix LM to its data sets, and none of them does it. Where a caption is split is
drawn by seed, step and row here, and both parts have a word.

Shapes: B own rows, T answer tokens, S prefix tokens, Q queries, K queries that have a token, W width of the embeddings.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from blip_pipelines.config import ConfigError
from blip_pipelines.data.instruction_loader import InstructionBatch
from blip_pipelines.data.loader import Batch
from blip_pipelines.models.blip2 import Blip2
from blip_pipelines.objectives import draws, language_modelling
from blip_pipelines.objectives.contrastive import Ranks


@dataclass(frozen=True)
class GenerativeConfig:
    """Constants of the objective; the default is BLIP-2's.

    Attributes:
        prompt: the loader begins every caption with it; read by the language model, not asked for.
    """

    label_smoothing: float = 0.0
    prompt: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing <= 1:
            raise ConfigError(f"objective.label_smoothing: {self.label_smoothing} is outside 0 to 1")


class GenerativePretraining(nn.Module):
    """The task that the training loop trains; see `MedPretraining` for its hooks.

    Args:
        ranks: who shares a micro-batch; rank r holds the r-th block of its rows, all blocks of one shape.
        seed: of the draws of splits.

    Attributes:
        frozen: submodules that checkpoints only name.

    Raises:
        ConfigError: the Q-Former is to read instructions, and pretraining has none.
    """

    def __init__(self, blip2: Blip2, config: GenerativeConfig, ranks: Ranks, seed: int = 0):
        super().__init__()
        if blip2.config.reads_instructions:
            raise ConfigError("reads_instructions: pretraining has no instructions; set it to false in stage 2")
        self.blip2, self.config, self.ranks, self.seed = blip2, config, ranks, seed
        self.frozen = frozen_parts(blip2)
        self._micro_step = 0

    def before_step(self, step: int) -> None:
        self._micro_step = 0

    def after_micro_step(self) -> None:
        self._micro_step += 1

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Losses of this rank's part of a micro-batch, scalars, each a share of the global value.

        Returns:
            "loss" with gradient, the cross-entropy per token that is asked for; "lm", the same without.
        """
        soft_BQW = self.blip2.soft_prompts(self.blip2.see(batch.pixels))
        answers, divisor = self._answers(batch, step)
        loss = language_modelling.lm_share(
            self.blip2.hidden(soft_BQW, answers.token_ids, answers.read_ids, answers.read_mask),
            answers.token_ids,
            answers.target,
            self.blip2.lm_head,
            1,
            self.config.label_smoothing,
        )
        loss = loss / divisor
        return {"loss": loss, "lm": loss.detach()}

    def _answers(self, batch: Batch, step: int) -> tuple["Answers", Tensor | int]:
        """What the language model reads and is asked for, and what a sum over that is divided by."""
        if self.blip2.language.decoder_only:
            target_BT = language_modelling.target_positions(batch.token_mask, batch.prompt_tokens)
            return Answers(batch.token_ids, target_BT), max(batch.target_tokens, 1)
        tokenizer = self.blip2.language.tokenizer
        answers = split_prefix(
            batch.token_ids,
            batch.token_mask,
            draws.uniform(self.seed, step, f"split, micro-step {self._micro_step}", batch.rows),
            batch.prompt_tokens,
            tokenizer.prompt_ids("", special=True),
            self.blip2.after_ids,
            tokenizer.pad,
        )
        return answers, divisor_of(answers.target, batch, self.ranks)


class Answers(NamedTuple):
    """What the language model is asked for, and what it reads of the caption beforehand."""

    token_ids: Tensor  # (B, T) int64, start words end pad...
    target: Tensor  # (B, T - 1) bool: position t is asked for token t + 1
    read_ids: Tensor | None = None  # (B, S) int64; None: the prompt's second part
    read_mask: Tensor | None = None  # (B, S) bool


def split_prefix(
    token_ids_BT: Tensor,
    token_mask_BT: Tensor,
    draw_B: Tensor,
    prompt_tokens: int,
    closing: list[int],
    instead: list[int],
    pad_id: int,
) -> Answers:
    """Captions split into a prefix to read and a rest to be asked for, each of at least a word, all ways alike.

    The prompt belongs to the prefix. A caption too short to split is asked for whole.

    Args:
        token_ids_BT: `start words end pad...`.
        draw_B: in [0, 1), float64.
        closing: ids that follow a prefix.
        instead: what is read where there is no prefix.
    """
    tokens, device = token_ids_BT.shape[1], token_ids_BT.device
    length_B1 = token_mask_BT.sum(1, keepdim=True)
    shortest = max(prompt_tokens, 1)
    ways_B1 = length_B1 - 2 - shortest
    prefix_B1 = torch.where(ways_B1 > 0, shortest + (draw_B[:, None] * ways_B1).long(), 0)

    place_T = torch.arange(tokens, device=device)
    source_BT = torch.where(place_T > 0, place_T + prefix_B1, 0)
    is_there_BT = source_BT < length_B1
    suffix_BT = token_ids_BT.gather(1, source_BT.clamp(max=tokens - 1)).where(is_there_BT, pad_id)
    target_BT = (is_there_BT & (source_BT > prompt_tokens))[:, 1:]

    # Room for the longest prefix that any row could draw: the shape is known without asking the device.
    room = max(tokens - 3 + len(closing), len(instead), 0)
    place_S = torch.arange(room, device=device)
    words_BS = pad(token_ids_BT[:, 1:], (0, room))[:, :room]
    behind_BS = (place_S - prefix_B1).clamp(0, len(closing))
    closing_BS = torch.tensor([*closing, pad_id], device=device)[behind_BS]
    prefix_BS = words_BS.where(place_S < prefix_B1, closing_BS)
    instead_S = torch.tensor(instead + [pad_id] * (room - len(instead)), dtype=torch.int64, device=device)
    is_split_B1 = prefix_B1 > 0
    read_B1 = torch.where(is_split_B1, prefix_B1 + len(closing), len(instead))
    return Answers(suffix_BT, target_BT, prefix_BS.where(is_split_B1, instead_S), place_S < read_B1)


def divisor_of(weight: Tensor, batch: Batch, ranks: Ranks) -> Tensor:
    """What a sum by `weight` is divided by to be a share of the mean; a collective, scalar float64.

    The global mean of a micro-step, each weighed by its share of the tokens that the batch counts: how many of those
    the later micro-steps ask for is not known yet.

    Args:
        weight: of each place of this rank's part, or bool.
    """
    counted = language_modelling.target_positions(batch.token_mask, batch.prompt_tokens).sum()
    both = ranks.gather(torch.stack([weight.double().sum(), counted.double()])[None]).sum(0).clamp(min=1)
    return both[0] * max(batch.target_tokens, 1) / both[1]


def questions_of(blip2: Blip2, batch: Batch) -> tuple[Tensor, ...]:
    """What the Q-Former reads beside its queries: the batch's instructions with their mask, if it reads any."""
    if blip2.config.reads_instructions and isinstance(batch, InstructionBatch):
        return batch.question_ids, batch.question_mask
    return ()


def frozen_parts(blip2: Blip2) -> tuple[str, ...]:
    """Names of the submodules that a task around `blip2` never changes."""
    return ("blip2.language",) if blip2.tower is None else ("blip2.language", "blip2.tower")
