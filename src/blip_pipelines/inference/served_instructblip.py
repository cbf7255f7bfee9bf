"""Models that answer as people are served them: a picture and an instruction in, an answer out."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from blip_pipelines.config import ConfigError
from blip_pipelines.data.instruction_tokens import INSTRUCTION, InstructionTokens, TokenLimits
from blip_pipelines.data.storage import StorageError
from blip_pipelines.inference.answering import AnswerConfig, Answerer
from blip_pipelines.inference.question_answering import MedAnswerer
from blip_pipelines.inference.served import (
    INSTRUCTED_PARAMETERS,
    MAX_BEAMS,
    ParamSchema,
    PythonModel,
    batches_of,
    column_of,
    defaults_of,
    image_bytes,
    invalid,
    read_pixels,
    refuse,
)
from blip_pipelines.models.blip2_exports import load_blip2

MAX_TOKENS = 256
MAX_CANDIDATES = 2_000


class Answering(PythonModel, ABC):
    """One answer per row.

    Row: `image`, `instruction`, and optionally `candidates`, of which the answer is then the likeliest. Returns
    `answer`, and of a row with candidates `scores`, their log-probabilities.
    """

    parameters: ParamSchema

    @abstractmethod
    def answerer(self, settings: dict[str, Any]) -> Answerer | MedAnswerer:
        """What answers by values of `parameters`.

        Raises:
            ConfigError: they cannot be.
        """

    @abstractmethod
    def see(self, contents: list[bytes], rows: Sequence[int]) -> Tensor:
        """(B, ...) encoded files as the answerer reads them; `rows` number them in messages."""

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        answerer = self._answerer({**defaults_of(self.parameters), **(params or {})})
        images, instructions = (column_of(model_input, name, required=True) for name in ("image", "instruction"))
        candidates = [
            None if each is None else [str(text) for text in each] for each in column_of(model_input, "candidates")
        ]
        for row, (instruction, each) in enumerate(zip(instructions, candidates, strict=True)):
            if not isinstance(instruction, str) or not instruction.strip():
                raise refuse(row, "instruction", "missing; say what is asked")
            if each is not None and not 0 < len(each) <= MAX_CANDIDATES:
                raise refuse(row, "candidates", f"{len(each)} of them; give 1 to {MAX_CANDIDATES}, or leave them out")
        answers: list[dict[str, Any]] = []
        for rows in batches_of(np.arange(len(model_input))):
            pixels = self.see([image_bytes(images[row], row) for row in rows], rows)[:, None]
            asked = [instructions[row] for row in rows], [candidates[row] for row in rows]
            for answer in answerer.answer(pixels, *asked):
                scores = None if answer.scores is None else answer.scores.tolist()
                answers.append({"answer": answer.text, "scores": scores})
        return pd.DataFrame(answers, columns=["answer", "scores"])

    def _answerer(self, settings: dict[str, Any]) -> Answerer | MedAnswerer:
        for name, bound in ("num_beams", MAX_BEAMS), ("max_tokens", MAX_TOKENS):
            if not 1 <= settings[name] <= bound:
                raise invalid(f"{name}: {settings[name]} is outside 1 to {bound}")
        try:
            return self.answerer(settings)
        except ConfigError as error:
            raise invalid(str(error)) from error


class Instructed(Answering):
    """InstructBLIP.

    Parameters: `num_beams`, `min_tokens`, `max_tokens`, `length_penalty` and `repetition_penalty` of an answer that is
    written, `per_token` and `contrast` of a ranking.
    """

    parameters = INSTRUCTED_PARAMETERS

    def load_context(self, context: Any) -> None:
        """Load the exported folder; MLflow calls this by keyword, so `context` keeps its name."""
        self.folder = Path(context.artifacts["model"])
        exported = load_blip2(self.folder)
        if exported.model is None or exported.tokenizer is None or INSTRUCTION not in exported.model.config.prompt:
            raise StorageError(f"{self.folder}: not tuned on instructions; give the export of instruct_tuning")
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model, self.size = exported.model.to(self.device), exported.image["size"]
        limits = TokenLimits(question=min(TokenLimits.question, exported.former.config.text.max_positions))
        self.tokens = InstructionTokens(self.model.language.tokenizer, self.model.place, exported.tokenizer, limits)

    def answerer(self, settings: dict[str, Any]) -> Answerer:
        return Answerer(self.model, self.tokens, AnswerConfig(beams=settings.pop("num_beams"), **settings))

    def see(self, contents: list[bytes], rows: Sequence[int]) -> Tensor:
        return read_pixels(contents, rows, self.size).to(self.device)
