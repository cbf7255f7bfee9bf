"""Answers to instructions about pictures: written, or chosen from candidates (InstructBLIP 2.6).

Several frames of a video go through tower and Q-Former each with the same instruction; the language model reads the
queries of all of them in a row.

Shapes: B rows, F frames, N of both, P patches, D width of the image encoder, Q queries, S tokens that the language
model reads, W width of its embeddings.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from blip_pipelines.config import ConfigError, speed_only
from blip_pipelines.data.instruction_tokens import InstructionTokens
from blip_pipelines.inference.ranking import BATCH_ANSWERS, rank
from blip_pipelines.models.blip2 import Blip2


@dataclass(frozen=True)
class AnswerConfig:
    """How answers are found; the defaults are those of LAVIS for short answers.

    Args:
        beams: of an answer that is written; 1 is greedy.
        min_tokens, max_tokens: of it.
        length_penalty: exponent of its length, by which its log-probability is divided; below 0 favours short ones.
        repetition_penalty: of tokens that are there already; 1 for none.
        per_token: candidates are ranked by the mean log-probability of their tokens, instead of the sum.
        contrast: from a candidate's score so many times its score without the picture are taken off; at 1 what remains
            is what the picture says for it, not how common its words are (Holtzman et al. 2021, 3). Ranks twice.
        batch_answers: candidates that are read at once.
    """

    beams: int = 5
    min_tokens: int = 1
    max_tokens: int = 10
    length_penalty: float = -1.0
    repetition_penalty: float = 1.5
    per_token: bool = False
    contrast: float = 0.0
    batch_answers: int = speed_only(BATCH_ANSWERS)

    def __post_init__(self) -> None:
        for name in ("beams", "min_tokens", "batch_answers"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: {getattr(self, name)} is below 1")
        if self.max_tokens < self.min_tokens:
            raise ConfigError(f"max_tokens: {self.max_tokens} is below min_tokens = {self.min_tokens}")
        if self.contrast < 0:
            raise ConfigError(f"contrast: {self.contrast} is negative")


class Answered(NamedTuple):
    """The answer, and the scores of the candidates that it was chosen from."""

    text: str
    scores: np.ndarray | None = (
        None  # (C,) float64, in the order of the candidates: log-probabilities, less any contrast
    )


class Answerer:
    """A model that is asked.

    Args:
        tokens: with the model's place for an instruction.
    """

    def __init__(self, model: Blip2, tokens: InstructionTokens, config: AnswerConfig):
        self.model, self.tokens, self.config = model, tokens, config

    @property
    def device(self) -> torch.device:
        return self.model.language_projection.weight.device

    @torch.no_grad()
    def answer(
        self, pixels: Tensor, instructions: Sequence[str], candidates: Sequence[Sequence[str] | None]
    ) -> list[Answered]:
        """An answer to each row.

        Args:
            pixels: (B, F, ...) frames, as `Blip2.see` takes them, on the model's device; one for a picture.
            candidates: of which the answer is one; None where it may be anything.
        """
        frames = pixels.shape[1]
        read, image_NPD = self.tokens.for_language(instructions), self.model.encode_image(pixels.flatten(0, 1))
        read_ids_BS, read_mask_BS = (torch.from_numpy(part).to(pixels.device) for part in (read.ids, read.mask))

        def of(rows: list[int], soft_BQW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            """What some rows read, without the padding of others."""
            mask_BS = read_mask_BS[rows]
            longest = int(mask_BS.sum(1).max())
            return soft_BQW[rows], read_ids_BS[rows, :longest], mask_BS[:, :longest]

        asked = self._asked(instructions, frames, pixels.device)
        soft_BQW = self._see(image_NPD, frames, asked)
        answers: list[Answered | None] = [None] * len(instructions)
        if closed := {row: each for row, each in enumerate(candidates) if each is not None}:
            rows, texts = list(closed), list(closed.values())
            scores = self._rank(*of(rows, soft_BQW), texts)
            if contrast := self.config.contrast:
                unseen = self._rank(*of(rows, self._see(torch.zeros_like(image_NPD), frames, asked)), texts)
                scores = [seen - contrast * blind for seen, blind in zip(scores, unseen, strict=True)]
            for row, each, found in zip(rows, texts, scores, strict=True):
                answers[row] = Answered(each[int(found.argmax())], found)
        if free := [row for row, each in enumerate(candidates) if each is None]:
            for row, answer in zip(free, self._write(*of(free, soft_BQW)), strict=True):
                answers[row] = answer
        return [answer for answer in answers if answer is not None]

    def _asked(self, instructions: Sequence[str], frames: int, device: torch.device) -> tuple[Tensor, ...]:
        """What the Q-Former reads, ids and mask of N rows; nothing where it reads no instruction."""
        if not self.model.config.reads_instructions:
            return ()
        question = self.tokens.for_former(instructions)
        return tuple(
            torch.from_numpy(part).to(device).repeat_interleave(frames, 0) for part in (question.ids, question.mask)
        )

    def _see(self, image_NPD: Tensor, frames: int, asked: tuple[Tensor, ...]) -> Tensor:
        """(B, F Q, W) soft prompts, of the image encoder's outputs; zeros for no picture."""
        soft_NQW = self.model.soft_prompts(self.model.former.project_image(image_NPD), *asked)
        return soft_NQW.unflatten(0, (-1, frames)).flatten(1, 2)

    def _rank(
        self, soft_BQW: Tensor, read_ids_BS: Tensor, read_mask_BS: Tensor, candidates: Sequence[Sequence[str]]
    ) -> list[np.ndarray]:
        return rank(
            self.model.language,
            self.model.read(soft_BQW, read_ids_BS, read_mask_BS),
            self.tokens,
            candidates,
            per_token=self.config.per_token,
            batch_answers=self.config.batch_answers,
        )

    def _write(self, soft_BQW: Tensor, read_ids_BS: Tensor, read_mask_BS: Tensor) -> list[Answered]:
        config, settings = self.config, dict[str, Any]()
        if config.beams > 1:
            settings["length_penalty"] = config.length_penalty
        if config.repetition_penalty != 1:
            settings["repetition_penalty"] = config.repetition_penalty
        texts = self.model.generate(
            *(soft_BQW, read_ids_BS, read_mask_BS),
            max_tokens=config.max_tokens,
            min_new_tokens=config.min_tokens,
            num_beams=config.beams,
            **settings,
        )
        return [Answered(text) for text in texts]
