"""The batches of question answering: pictures, questions, and all distinct answers of each with their weights."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blip_pipelines.data.instruction_loader import hold
from blip_pipelines.data.instructions import Instructions
from blip_pipelines.data.loader import Batch, ReadImages, StepLoader, Steps, share_of
from blip_pipelines.data.mixture import InstructionOrder
from blip_pipelines.data.tokens import CaptionTokenizer


@dataclass(frozen=True, kw_only=True)
class QuestionBatch(Batch):
    """A `Batch` of B questions whose tokens are the A answers of all of them, one row an answer.

    Attributes:
        question_ids, question_mask: (B, I) int64 and bool.
        question_of: (A,) int64, ascending: the question that each answer belongs to.
        weights: (A,) float32, its share of the annotators times the weight of its row.
        samples: questions of the whole accumulated global batch.
    """

    question_ids: Tensor
    question_mask: Tensor
    question_of: Tensor
    weights: Tensor
    samples: int


@dataclass(frozen=True)
class QuestionTokens:
    """How many tokens a question and an answer may have, special ones included; what is longer is cut at its end."""

    tokenizer: CaptionTokenizer
    question: int
    answer: int


class QuestionLoader(StepLoader):
    """Rows of a mixture of data sets; see `InstructionLoader` for the arguments."""

    def __init__(
        self,
        instructions: Instructions,
        order: InstructionOrder,
        read_images: ReadImages,
        tokens: QuestionTokens,
        batch_samples_global: int,
        accumulation: int = 1,
        rank: int = 0,
        ranks: int = 1,
        steps: int = 1,
        start_step: int = 0,
        workers: int = 0,
    ):
        micro, part = share_of(batch_samples_global, accumulation, rank, ranks)
        hold(instructions, order, "instruction", "answers", "weight")
        by_step = _Steps(read_images, batch_samples_global, micro, part, instructions, order, tokens)
        super().__init__(by_step, steps, start_step, workers)


@dataclass(frozen=True)
class _Steps(Steps):
    instructions: Instructions
    order: InstructionOrder
    tokens: QuestionTokens

    def batches(self, step: int) -> list[QuestionBatch]:
        rows = self.order.rows(step * self.batch_samples_global, self.batch_samples_global)
        batches = []
        for micro in self.micros:
            mine = rows[micro][self.part]
            pixels = self.read_images(mine, step, micro.start + self.part.start)
            places = np.arange(self.part.start, self.part.stop)
            batches.append(
                assemble(self.instructions, self.tokens, mine, pixels, self.batch_samples_global, rows=places)
            )
        return batches


def assemble(
    instructions: Instructions,
    tokens: QuestionTokens,
    asked: np.ndarray,
    pixels: np.ndarray,
    samples: int,
    rows: np.ndarray | None = None,
) -> QuestionBatch:
    """The batch of some rows of the table.

    Args:
        asked: those rows; pixels: their pictures.
        samples: by which their losses are divided.
        rows: their places in the global micro-batch; None counts them.
    """
    answers = instructions.weighted_answers(asked)
    of_row = instructions.values("weight", asked)
    weights = [answer.weight * weight for each, weight in zip(answers, of_row, strict=True) for answer in each]
    answer_ids, answer_mask = tokens.tokenizer([answer.text for each in answers for answer in each], tokens.answer)
    question_ids, question_mask = tokens.tokenizer(instructions.instructions(asked), tokens.question)
    tensors: dict[str, np.ndarray] = {
        "pixels": pixels,
        "token_ids": answer_ids,
        "token_mask": answer_mask,
        "image_ids": instructions.image_ids[asked],
        "text_ids": instructions.text_ids[asked],
        "rows": np.arange(len(asked)) if rows is None else rows,
        "question_ids": question_ids,
        "question_mask": question_mask,
        "question_of": np.repeat(np.arange(len(asked)), [len(each) for each in answers]),
        "weights": np.array(weights, np.float32),
    }
    found: dict[str, Any] = {name: torch.from_numpy(value) for name, value in tensors.items()}
    return QuestionBatch(**found, target_tokens=int(answer_mask[:, 1:].sum()), samples=samples)
