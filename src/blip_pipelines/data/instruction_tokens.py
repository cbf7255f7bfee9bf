"""An instruction as both of its readers take it, and the answer to it (InstructBLIP 2.3 and 2.5).

The language model reads an instruction at its place in the prompt, the Q-Former reads it beside its queries. Where one
is too long its beginning goes, as the question stands at its end, behind context and OCR tokens; of an answer the end
goes. How much went is counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from blip_pipelines.config import ConfigError
from blip_pipelines.data.language_tokens import LanguageTokenizer
from blip_pipelines.data.tokens import CaptionTokenizer, padded

INSTRUCTION = "{instruction}"


@dataclass(frozen=True)
class InstructionPlace:
    """What a language model reads around an instruction, behind the picture.

    Attributes:
        opening, closing: ids before and after it.
        lead: blanks that belong to its first word, as many tokenizers have it.
    """

    opening: tuple[int, ...] = ()
    closing: tuple[int, ...] = ()
    lead: str = ""


@dataclass(frozen=True)
class TokenLimits:
    """Most tokens; the defaults are InstructBLIP's.

    Args:
        instruction: of an instruction, for the language model, without what the prompt has around it.
        question: of an instruction, for the Q-Former, [CLS] and [SEP] included.
        answer: with its start and its end.
    """

    instruction: int = 128
    question: int = 128
    answer: int = 256

    def __post_init__(self) -> None:
        for name, least in ("instruction", 1), ("question", 3), ("answer", 3):
            if getattr(self, name) < least:
                raise ConfigError(f"limits.{name}: {getattr(self, name)} is below {least}, which leaves no word")


class Tokens(NamedTuple):
    """Right padded ids (B, T) int64, their mask (B, T) bool, and how many tokens of each text were cut, (B,) int64."""

    ids: np.ndarray
    mask: np.ndarray
    cut: np.ndarray


class InstructionTokens:
    """Turns instructions and answers into ids.

    Args:
        language: of the language model.
        place: where it finds an instruction.
        former: of the Q-Former.
    """

    def __init__(
        self, language: LanguageTokenizer, place: InstructionPlace, former: CaptionTokenizer, limits: TokenLimits
    ):
        self.language, self.place, self.former, self.limits = language, place, former, limits

    def for_language(self, instructions: Sequence[str]) -> Tokens:
        """What the language model reads behind the picture: `opening words closing`."""
        pieces = self.language.pieces([self.place.lead + text for text in instructions])
        rows = [(*self.place.opening, *ids[-self.limits.instruction :], *self.place.closing) for ids in pieces]
        return Tokens(*padded(rows, self.language.pad), _cut(pieces, self.limits.instruction))

    def for_former(self, instructions: Sequence[str]) -> Tokens:
        """What the Q-Former reads: `[CLS] words [SEP]`."""
        pieces, room = self.former.pieces(instructions), self.limits.question - 2
        rows = [(self.former.cls, *ids[-room:], self.former.sep) for ids in pieces]
        return Tokens(*padded(rows, self.former.pad), _cut(pieces, room))

    def for_answers(self, answers: Sequence[str]) -> Tokens:
        """What the language model is asked for: `start words end`."""
        pieces, room = self.language.pieces(answers), self.limits.answer - 2
        rows = [(self.language.start, *ids[:room], self.language.end) for ids in pieces]
        return Tokens(*padded(rows, self.language.pad), _cut(pieces, room))


def _cut(pieces: Sequence[Sequence[int]], room: int) -> np.ndarray:
    return np.array([max(len(ids) - room, 0) for ids in pieces], np.int64)
