"""Answers to instructions about pictures: written, or chosen from candidates (InstructBLIP 2.6).

Several frames of a video go through tower and Q-Former each with the same instruction; the language model reads the
queries of all of them in a row.

Shapes: B rows, F frames, Q queries, S tokens that the language model reads, W width of its embeddings.
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
        batch_answers: candidates that are read at once.
    """

    beams: int = 5
    min_tokens: int = 1
    max_tokens: int = 10
    length_penalty: float = -1.0
    repetition_penalty: float = 1.5
    per_token: bool = False
    batch_answers: int = speed_only(BATCH_ANSWERS)

    def __post_init__(self) -> None:
        for name in ("beams", "min_tokens", "batch_answers"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: {getattr(self, name)} is below 1")
        if self.max_tokens < self.min_tokens:
            raise ConfigError(f"max_tokens: {self.max_tokens} is below min_tokens = {self.min_tokens}")


class Answered(NamedTuple):
    """The answer, and the scores of the candidates that it was chosen from."""

    text: str
    scores: np.ndarray | None = None  # (C,) float64 log-probabilities, in the order of the candidates


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
        soft_BQW, read_ids_BS, read_mask_BS = self._read(pixels, instructions)

        def of(rows: list[int]) -> tuple[Tensor, Tensor, Tensor]:
            """What some rows read, without the padding of others."""
            mask_BS = read_mask_BS[rows]
            longest = int(mask_BS.sum(1).max())
            return soft_BQW[rows], read_ids_BS[rows, :longest], mask_BS[:, :longest]

        answers: list[Answered | None] = [None] * len(instructions)
        if closed := {row: each for row, each in enumerate(candidates) if each is not None}:
            for row, answer in zip(closed, self._choose(*of(list(closed)), list(closed.values())), strict=True):
                answers[row] = answer
        if free := [row for row, each in enumerate(candidates) if each is None]:
            for row, answer in zip(free, self._write(*of(free)), strict=True):
                answers[row] = answer
        return [answer for answer in answers if answer is not None]

    def _read(self, pixels: Tensor, instructions: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        read, question = self.tokens.for_language(instructions), self.tokens.for_former(instructions)
        device, frames = pixels.device, pixels.shape[1]
        asked: tuple[Tensor, ...] = ()
        if self.model.config.reads_instructions:
            asked = tuple(
                torch.from_numpy(part).to(device).repeat_interleave(frames, 0) for part in (question.ids, question.mask)
            )
        soft_NQW = self.model.soft_prompts(self.model.see(pixels.flatten(0, 1)), *asked)
        soft_BQW = soft_NQW.unflatten(0, (-1, frames)).flatten(1, 2)
        return soft_BQW, torch.from_numpy(read.ids).to(device), torch.from_numpy(read.mask).to(device)

    def _choose(
        self, soft_BQW: Tensor, read_ids_BS: Tensor, read_mask_BS: Tensor, candidates: Sequence[Sequence[str]]
    ) -> list[Answered]:
        scores = rank(
            self.model.language,
            self.model.read(soft_BQW, read_ids_BS, read_mask_BS),
            self.tokens,
            candidates,
            per_token=self.config.per_token,
            batch_answers=self.config.batch_answers,
        )
        return [Answered(texts[int(found.argmax())], found) for texts, found in zip(candidates, scores, strict=True)]

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
