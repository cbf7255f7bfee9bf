"""The batches of instruction tuning: pictures, instructions for two readers, answers."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blip_pipelines.data.instruction_tokens import InstructionTokens, Tokens
from blip_pipelines.data.instructions import Instructions
from blip_pipelines.data.loader import Batch, ReadImages, StepLoader, Steps, share_of
from blip_pipelines.data.mixture import InstructionOrder
from blip_pipelines.data.order import draw


@dataclass(frozen=True, kw_only=True)
class InstructionBatch(Batch):
    """A `Batch` whose tokens are the answers, with the instructions.

    All ids are right padded, to the longest of the global micro-batch.

    Attributes:
        read_ids, read_mask: (B, S) int64 and bool, what the language model reads behind the picture.
        question_ids, question_mask: (B, I) int64 and bool, what the Q-Former reads.
        cut: (B, 3) int64, tokens that were cut from the instruction for either and from the answer.
    """

    read_ids: Tensor
    read_mask: Tensor
    question_ids: Tensor
    question_mask: Tensor
    cut: Tensor


class InstructionLoader(StepLoader):
    """Rows of a mixture of data sets.

    Args:
        instructions: the view to train on.
        order: of that view.
        read_images: `DecodedPixels` or `FrozenFeatures` of that view.
        tokens: of the language model and the Q-Former.
        seed: of the draw of one of a row's answers, by its share of the annotators.
        batch_samples_global, accumulation, rank, ranks: see `Loader`.
        steps, start_step, workers: see `StepLoader`.
    """

    def __init__(
        self,
        instructions: Instructions,
        order: InstructionOrder,
        read_images: ReadImages,
        tokens: InstructionTokens,
        seed: int,
        batch_samples_global: int,
        accumulation: int = 1,
        rank: int = 0,
        ranks: int = 1,
        steps: int = 1,
        start_step: int = 0,
        workers: int = 0,
    ):
        micro, part = share_of(batch_samples_global, accumulation, rank, ranks)
        hold(instructions, order, "instruction", "answers")
        by_step = _Steps(read_images, batch_samples_global, micro, part, instructions, order, tokens, seed)
        super().__init__(by_step, steps, start_step, workers)


def hold(instructions: Instructions, order: InstructionOrder, *columns: str) -> None:
    """Hold in memory what all workers read: ids, the columns, and so many shards as the order mixes."""
    instructions.preload()
    instructions.keep_window(order.window_shards * len(order.rows_by_data_set))
    for name in columns:
        instructions.column(name)


@dataclass(frozen=True)
class _Steps(Steps):
    instructions: Instructions
    order: InstructionOrder
    tokens: InstructionTokens
    seed: int

    def batches(self, step: int) -> list[InstructionBatch]:
        rows = self.order.rows(step * self.batch_samples_global, self.batch_samples_global)
        draws = draw(self.seed, step, "answer", 0, len(rows))[:, 0]
        answers = [
            self.tokens.for_answers(self.instructions.targets(rows[micro], draws[micro])) for micro in self.micros
        ]
        target_tokens = sum(int(answer.mask[:, 1:].sum()) for answer in answers)
        batches = []
        for micro, answer in zip(self.micros, answers, strict=True):
            pixels = self.read_images(rows[micro][self.part], step, micro.start + self.part.start)
            parts = self.instructions, self.tokens, rows[micro], answer, pixels, target_tokens, self.part
            batches.append(assemble(*parts))
        return batches


def assemble(
    instructions: Instructions,
    tokens: InstructionTokens,
    rows: np.ndarray,
    answer: Tokens,
    pixels: np.ndarray,
    target_tokens: int,
    part: slice,
) -> InstructionBatch:
    """The batch of a part of some rows.

    Args:
        answer: of all the rows.
        pixels: of those of the part.
        target_tokens: of the whole accumulated global batch.
    """
    texts = instructions.instructions(rows)
    read, question = tokens.for_language(texts), tokens.for_former(texts)
    tensors: dict[str, np.ndarray] = {
        "pixels": pixels,
        "token_ids": answer.ids[part],
        "token_mask": answer.mask[part],
        "image_ids": instructions.image_ids[rows[part]],
        "text_ids": instructions.text_ids[rows[part]],
        "rows": np.arange(len(rows))[part],
        "read_ids": read.ids[part],
        "read_mask": read.mask[part],
        "question_ids": question.ids[part],
        "question_mask": question.mask[part],
        "cut": np.stack([read.cut, question.cut, answer.cut], 1)[part],
    }
    found: dict[str, Any] = {name: torch.from_numpy(value) for name, value in tensors.items()}
    return InstructionBatch(**found, target_tokens=target_tokens)
