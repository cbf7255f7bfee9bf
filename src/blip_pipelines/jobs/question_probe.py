"""A look at held-out rows while a MED learns to answer: how many closed questions it answers rightly."""

from dataclasses import dataclass, field

import numpy as np
import torch

from blip_pipelines.data.instructions import Instructions
from blip_pipelines.data.question_loader import QuestionTokens
from blip_pipelines.evaluation.question_answering import exact_match
from blip_pipelines.inference.question_answering import MedAnswerConfig, MedAnswerer
from blip_pipelines.jobs.instruction_answers import Asking, answers_of, drawn_rows
from blip_pipelines.jobs.training_data import Images
from blip_pipelines.models.question_answering import QuestionAnswering


@dataclass(frozen=True)
class QuestionProbeConfig:
    """Which rows.

    Args:
        rows: of each data set, drawn by their hash.
        answers: how they are found.
    """

    split: str = "val"
    rows: int = 32
    answers: MedAnswerConfig = field(default_factory=lambda: MedAnswerConfig(rank_in_full=16))


class QuestionProbe:
    """What `train` calls on the first rank: `val/exact/<role>`."""

    def __init__(
        self,
        config: QuestionProbeConfig,
        table: Instructions,
        images: Images,
        model: QuestionAnswering,
        tokens: QuestionTokens,
        half: bool,
    ):
        self.images, self.half = images, half
        self.answerer = MedAnswerer(model, tokens, config.answers)
        held = table.select(split=config.split)
        view = held.select(rows=drawn_rows(held, config.rows))
        every = np.arange(len(view))
        self.view = view.select(rows=every[[each is not None for each in view.candidates(every)]])
        self.roles = np.array(self.view.values("role", np.arange(len(self.view))))

    @torch.no_grad()
    def __call__(self, step: int) -> dict[str, float]:
        every, found = np.arange(len(self.view)), {}
        by_task = dict.fromkeys(self.view.values("task", every), self.answerer)
        with torch.autocast(self.answerer.device.type, torch.bfloat16, enabled=self.half):
            answers = answers_of(by_task, self.view, self.images, every, Asking())
        both = zip(answers, self.view.references(every), strict=True)
        right = np.array([exact_match(answer.text, references) for answer, references in both])
        for role in sorted(set(self.roles)):
            found[f"val/exact/{role}"] = float(right[self.roles == role].mean())
        return found
