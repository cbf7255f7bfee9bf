"""A MED that answers questions, as people are served it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blip_pipelines.data.question_loader import QuestionTokens
from blip_pipelines.inference.generation import GenerationConfig
from blip_pipelines.inference.question_answering import MedAnswerConfig, MedAnswerer
from blip_pipelines.inference.served import MAX_TEXT_TOKENS, VQA_PARAMETERS, read_pixels
from blip_pipelines.inference.served_instructblip import Answering
from blip_pipelines.models.question_answering import load_question_answering


class Questioned(Answering):
    """Parameters: `num_beams`, `min_tokens` and `max_tokens` of an answer that is written."""

    parameters = VQA_PARAMETERS

    def load_context(self, context: Any) -> None:
        """Load the exported folder; MLflow calls this by keyword, so `context` keeps its name."""
        self.folder = Path(context.artifacts["model"])
        exported = load_question_answering(self.folder)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model, self.size = exported.model.to(self.device), exported.image["size"]
        self.stem = exported.stem.to(self.device) if exported.stem else None
        room = min(MAX_TEXT_TOKENS, self.model.config.text.max_positions)
        self.tokens = QuestionTokens(exported.tokenizer, room, room)

    def answerer(self, settings: dict[str, Any]) -> MedAnswerer:
        writing = GenerationConfig("beam", beams=settings.pop("num_beams"), **settings)
        return MedAnswerer(self.model, self.tokens, MedAnswerConfig(writing))

    @torch.no_grad()
    def see(self, contents: list[bytes], rows: Sequence[int]) -> Tensor:
        pixels = read_pixels(contents, rows, self.size).to(self.device)
        return self.stem(pixels) if self.stem else pixels
