"""A look at held-out rows while a model learns to follow instructions: loss, and how many answers are right."""

from dataclasses import dataclass, field

import numpy as np
import torch

from blip_pipelines.data.instruction_loader import assemble
from blip_pipelines.data.instruction_tokens import InstructionTokens
from blip_pipelines.data.instructions import Instructions
from blip_pipelines.evaluation.question_answering import exact_match
from blip_pipelines.inference.answering import AnswerConfig, Answerer
from blip_pipelines.jobs.instruction_answers import Asking, answers_of, drawn_rows
from blip_pipelines.jobs.training_data import Images
from blip_pipelines.models.blip2 import Blip2
from blip_pipelines.models.precision import Precision, is_half
from blip_pipelines.objectives.instruct import InstructConfig, InstructionTuning


@dataclass(frozen=True)
class ProbeConfig:
    """Which rows.

    Args:
        rows: of each data set, drawn by their hash.
        most_candidates: an answer is chosen where there are at most so many, and else written.
        answers: how they are found.
    """

    split: str = "val"
    rows: int = 16
    most_candidates: int | None = 32
    answers: AnswerConfig = field(default_factory=lambda: AnswerConfig(beams=1, repetition_penalty=1.0))


class InstructionProbe:
    """What `train` calls on the first rank: by role `val/lm/<role>`, the loss, and `val/exact/<role>`, the share of the
    closed questions whose answer is one of the references.
    """

    def __init__(
        self,
        config: ProbeConfig,
        table: Instructions,
        images: Images,
        model: Blip2,
        tokens: InstructionTokens,
        objective: InstructConfig,
        precision: Precision,
    ):
        self.images, self.tokens, self.asking = images, tokens, Asking(most_candidates=config.most_candidates)
        self.answerer = Answerer(model, tokens, config.answers)
        self.task, self.half = InstructionTuning(model, objective), is_half(precision)
        held = table.select(split=config.split)
        self.view = held.select(rows=drawn_rows(held, config.rows))
        self.roles = np.array(self.view.values("role", np.arange(len(self.view))))

    @torch.no_grad()
    def __call__(self, step: int) -> dict[str, float]:
        found: dict[str, float] = {}
        with torch.autocast(self.answerer.device.type, torch.bfloat16, enabled=self.half):
            for role in sorted(set(self.roles)):
                rows = np.flatnonzero(self.roles == role)
                found[f"val/lm/{role}"] = self._loss(rows)
                closed = rows[[each is not None for each in self.view.candidates(rows)]]
                if len(closed):
                    by_task = dict.fromkeys(self.view.values("task", closed), self.answerer)
                    answers = answers_of(by_task, self.view, self.images, closed, self.asking)
                    both = zip(answers, self.view.references(closed), strict=True)
                    right = [exact_match(answer.text, references) for answer, references in both]
                    found[f"val/exact/{role}"] = float(np.mean(right))
        return found

    def _loss(self, rows: np.ndarray) -> float:
        answers = self.tokens.for_answers(self.view.targets(rows))
        targets, read_images, total = int(answers.mask[:, 1:].sum()), self.images.reader(self.view), 0.0
        for start in range(0, len(rows), self.asking.batch_rows):
            part = slice(start, start + self.asking.batch_rows)
            batch = assemble(self.view, self.tokens, rows, answers, read_images(rows[part]), targets, part)
            total += self.task(batch.to(self.answerer.device), 0)["lm"].item()
        return total
