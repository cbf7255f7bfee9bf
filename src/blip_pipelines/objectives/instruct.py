"""Instruction tuning: the LM loss on the answer, with the instruction read twice (InstructBLIP 2.3 and 2.5).

The Q-Former reads the instruction beside its queries, so that the soft prompts hold what it asks for; the language
model reads it behind them. A decoder-only model goes on with the answer; an encoder-decoder reads picture and
instruction in its encoder and answers in its decoder. Asked for is the answer alone, with its end.

Every value that `forward` returns is a *share*, as in MED pretraining: summed over ranks and over the micro-steps of
an optimizer step it is the value of the whole global batch.

Shapes: B own rows, T answer tokens, Q queries, W width of the embeddings.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from blip_pipelines.config import ConfigError
from blip_pipelines.data.instruction_loader import InstructionBatch
from blip_pipelines.models.blip2 import Blip2
from blip_pipelines.objectives import language_modelling
from blip_pipelines.objectives.generative import frozen_parts, questions_of

CUT = ("cut_instructions", "cut_questions", "cut_answers")


@dataclass(frozen=True)
class InstructConfig:
    """Constants of the objective; the default is InstructBLIP's."""

    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing <= 1:
            raise ConfigError(f"objective.label_smoothing: {self.label_smoothing} is outside 0 to 1")


class InstructionTuning(nn.Module):
    """The task that the training loop trains; see `MedPretraining` for its hooks.

    Args:
        blip2: where it does not read instructions, its Q-Former sees the picture alone (the paper's ablation).

    Attributes:
        frozen: submodules that checkpoints only name.
    """

    def __init__(self, blip2: Blip2, config: InstructConfig):
        super().__init__()
        self.blip2, self.config = blip2, config
        self.frozen = frozen_parts(blip2)

    def forward(self, batch: InstructionBatch, step: int) -> dict[str, Tensor]:
        """Losses of this rank's part of a micro-batch, scalars, each a share of the global value.

        Returns:
            "loss" with gradient, the cross-entropy per token of an answer; "lm", the same without; and how many
            instructions and answers were cut to fit (`CUT`).
        """
        soft_BQW = self.blip2.soft_prompts(self.blip2.see(batch.pixels), *questions_of(self.blip2, batch))
        loss = language_modelling.lm_share(
            self.blip2.hidden(soft_BQW, batch.token_ids, batch.read_ids, batch.read_mask),
            batch.token_ids,
            language_modelling.target_positions(batch.token_mask, 0),
            self.blip2.lm_head,
            batch.target_tokens,
            self.config.label_smoothing,
        )
        cut = (batch.cut > 0).sum(0).to(torch.float32)
        return {"loss": loss, "lm": loss.detach(), **dict(zip(CUT, cut, strict=True))}
