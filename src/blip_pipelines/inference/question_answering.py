"""Answers of a MED to questions: written, or of a list of candidates the likeliest (BLIP 5.3 and appendix B).

Picture and question are read once, as keys and values, and candidates go on from there in batches. Where there are
many, BLIP looks at the probability of their first token alone and scores the best of them in full.

Shapes: B questions, F frames, N image tokens, P pairs of a question and a candidate, T tokens of a candidate,
R positions with a target, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from blip_pipelines.config import ConfigError, speed_only
from blip_pipelines.data.question_loader import QuestionTokens
from blip_pipelines.inference.answering import Answered
from blip_pipelines.inference.generation import GenerationConfig, generate
from blip_pipelines.models.attention import at_least_float32
from blip_pipelines.models.keys_values import TextKeysValues
from blip_pipelines.models.question_answering import QuestionAnswering


@dataclass(frozen=True)
class MedAnswerConfig:
    """How answers are found; the defaults are BLIP's.

    Args:
        writing: of a free answer.
        rank_in_full: candidates of a question that are scored to their end, those of the likeliest first tokens; the
            others get a score below all of theirs.
        batch_answers: candidates that are read at once.
    """

    writing: GenerationConfig = field(default_factory=lambda: GenerationConfig("beam", min_tokens=1, max_tokens=10))
    rank_in_full: int = 128
    batch_answers: int = speed_only(256)

    def __post_init__(self) -> None:
        for name in ("rank_in_full", "batch_answers"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: {getattr(self, name)} is below 1")


class MedAnswerer:
    """A MED that is asked, with the face of `answering.Answerer`."""

    def __init__(self, model: QuestionAnswering, tokens: QuestionTokens, config: MedAnswerConfig):
        self.model, self.tokens, self.config = model, tokens, config

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @torch.no_grad()
    def answer(
        self, pixels: Tensor, instructions: Sequence[str], candidates: Sequence[Sequence[str] | None]
    ) -> list[Answered]:
        """An answer to each row.

        Args:
            pixels: (B, F, ...) frames, as `VisionTransformer` reads them, on the model's device; one for a picture.
                The tokens of all frames stand in a row, as BLIP reads videos (5.6).
            candidates: of which the answer is one; None where it may be anything.
        """
        image_BND = self.model.encode_image(pixels.flatten(0, 1)).unflatten(0, pixels.shape[:2]).flatten(1, 2)
        ids, mask = (torch.from_numpy(part).to(self.device) for part in self._question(instructions))
        question = self.model.read_question(image_BND, ids, mask)
        answers: list[Answered | None] = [None] * len(instructions)
        closed = {row: each for row, each in enumerate(candidates) if each is not None}
        if closed:
            scores = self.rank(_rows(question, list(closed)), list(closed.values()))
            for (row, texts), found in zip(closed.items(), scores, strict=True):
                answers[row] = Answered(texts[int(found.argmax())], found)
        if free := [row for row in range(len(instructions)) if row not in closed]:
            written = generate(self.model, _rows(question, free), self.tokens.tokenizer, self.config.writing)
            for row, text in zip(free, written.texts, strict=True):
                answers[row] = Answered(text)
        return [answer for answer in answers if answer is not None]

    @torch.no_grad()
    def rank(self, question: TextKeysValues, candidates: Sequence[Sequence[str]]) -> list[np.ndarray]:
        """Scores of the candidates of each question, (C,) float64, the highest the best: log-probabilities, the end
        included; of candidates that were dropped for their first token, that token's less a constant.
        """
        texts = list(dict.fromkeys(text for each in candidates for text in each))
        place = {text: index for index, text in enumerate(texts)}
        ids_CT, mask_CT = self.tokens.tokenizer(texts, self.tokens.answer)
        first_BV = self._first(question)
        chosen: list[np.ndarray] = []
        scores: list[np.ndarray] = []
        for row, each in enumerate(candidates):
            mine = np.array([place[text] for text in each])
            first = first_BV[row, ids_CT[mine, 1]]
            best = np.argsort(-first, kind="stable")[: self.config.rank_in_full]
            chosen.append(best)
            scores.append(first)
        row_of_P = np.repeat(np.arange(len(chosen)), [len(best) for best in chosen])
        text_of_P = np.array([place[candidates[row][at]] for row, best in enumerate(chosen) for at in best], np.int64)
        full_P = np.empty(len(text_of_P))
        for start in range(0, len(full_P), self.config.batch_answers):
            part = slice(start, start + self.config.batch_answers)
            longest = int(mask_CT[text_of_P[part]].sum(1).max())
            ids, mask, rows = (
                torch.from_numpy(values).to(self.device)
                for values in (ids_CT[text_of_P[part], :longest], mask_CT[text_of_P[part], :longest], row_of_P[part])
            )
            full_P[part] = log_probabilities(self.model, question.select(rows), ids, mask).double().cpu().numpy()
        ends = np.cumsum([len(best) for best in chosen])[:-1]
        for found, best, full in zip(scores, chosen, np.split(full_P, ends), strict=True):
            found -= found.max() - full.min() + 1  # whoever was dropped stays in its order, below the rest
            found[best] = full
        return scores

    def _question(self, instructions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        return self.tokens.tokenizer(instructions, self.tokens.question)

    def _first(self, question: TextKeysValues) -> np.ndarray:
        """(B, V) float64 log-probabilities of the first token of an answer."""
        start_B1 = torch.full((len(question), 1), self.model.config.text.dec_id, device=self.device)
        logits_BV = at_least_float32(self.model.decode_logits(start_B1, None, question)[:, 0])
        return logits_BV.log_softmax(-1).double().cpu().numpy()


def log_probabilities(
    model: QuestionAnswering, question: TextKeysValues, token_ids_PT: Tensor, token_mask_PT: Tensor
) -> Tensor:
    """(P,) at least float32, the sum over an answer's words and its end.

    Args:
        question: a row for each answer.
        token_ids_PT: `[CLS] words [SEP] [PAD]...`.
    """
    pair_R, place_R = token_mask_PT[:, 1:].nonzero(as_tuple=True)
    hidden_RD = model.decode_hidden(token_ids_PT[:, :-1], token_mask_PT[:, :-1], question)[pair_R, place_R]
    asked_R1 = token_ids_PT[:, 1:][pair_R, place_R][:, None]
    gained_R = at_least_float32(model.lm_head(hidden_RD)).log_softmax(-1).gather(1, asked_R1)[:, 0]
    return gained_R.new_zeros(len(token_ids_PT)).index_add_(0, pair_R, gained_R)


def _rows(question: TextKeysValues, rows: list[int]) -> TextKeysValues:
    return question.select(torch.tensor(rows, device=question.mask_BS.device))
