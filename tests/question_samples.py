"""Small batches of questions, and a plain training run over them on any number of ranks."""

from typing import Any

import torch
from model_samples import tiny_med, tiny_texts

from blip_pipelines.data.question_loader import QuestionBatch
from blip_pipelines.models.question_answering import QuestionAnswering
from blip_pipelines.objectives.question_answering import AnswerLossConfig, AnswerTraining

ANSWERS = (1, 3, 2, 1)  # of each question of a global micro-batch


def make_task(**config: float) -> AnswerTraining:
    model = QuestionAnswering(tiny_med(image_width=16, text_width=16))
    return AnswerTraining(model, AnswerLossConfig(**config)).double()


def batch(seed: int = 0, micro_steps: int = 1) -> QuestionBatch:
    """A global micro-batch of four questions with seven answers."""
    generator = torch.Generator().manual_seed(seed)
    questions, answers = len(ANSWERS), sum(ANSWERS)
    question_ids, question_mask = tiny_texts((7, 4, 5, 6), seed=seed)
    token_ids, token_mask = tiny_texts((3, 4, 5, 3, 4, 6, 3), seed=seed + 1)
    weights = torch.rand(answers, generator=generator)
    return QuestionBatch(
        pixels=torch.rand(questions, 3, 8, 8, generator=generator, dtype=torch.float64),
        token_ids=token_ids,
        token_mask=token_mask,
        image_ids=torch.arange(questions),
        text_ids=torch.arange(questions),
        rows=torch.arange(questions),
        target_tokens=int(token_mask[:, 1:].sum()),
        question_ids=question_ids,
        question_mask=question_mask,
        question_of=torch.repeat_interleave(torch.arange(questions), torch.tensor(ANSWERS)),
        weights=weights,
        samples=questions * micro_steps,
    )


def part(whole: QuestionBatch, rank: int, ranks: int) -> QuestionBatch:
    """One rank's block of questions."""
    questions = len(whole.rows) // ranks
    first = rank * questions
    own = slice(first, first + questions)
    mine = (whole.question_of >= first) & (whole.question_of < first + questions)
    of_questions = ("pixels", "image_ids", "text_ids", "rows", "question_ids", "question_mask")
    of_answers = ("token_ids", "token_mask", "weights")
    values: dict[str, Any] = {**vars(whole)}
    values |= {name: values[name][own] for name in of_questions}
    values |= {name: values[name][mine] for name in of_answers}
    return QuestionBatch(**{**values, "question_of": whole.question_of[mine] - first})
