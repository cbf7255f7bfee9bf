"""BLIP-2 after stage 2 as people are served it: asked like the captioner, answered by a language model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blip_pipelines.data.language_tokens import IMAGE
from blip_pipelines.data.storage import StorageError
from blip_pipelines.inference.generation import Captions, GenerationConfig
from blip_pipelines.inference.language_decoder import write_captions
from blip_pipelines.inference.served import CaptionWriter, read_pixels
from blip_pipelines.models.blip2_exports import load_blip2


class Blip2Captioner(CaptionWriter):
    """By the language model; `prompt` is what it is told, with `{image}` where the picture goes, or the picture first.

    Without a prompt it is told what it was trained with. Where it was trained in turns of a chat, a prompt is a turn.
    """

    def load_context(self, context: Any) -> None:
        """Load the exported folder; MLflow calls this by keyword, so `context` keeps its name."""
        self.folder = Path(context.artifacts["model"])
        exported = load_blip2(self.folder)
        if exported.model is None:
            raise StorageError(f"{self.folder}: no language model in it; give the export of stage 2")
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model, self.size = exported.model.to(self.device), exported.image["size"]

    def write(
        self,
        contents: list[bytes],
        rows: Sequence[int],
        config: GenerationConfig,
        prompt: str,
        seed: int,
        draw_ids: Tensor,
    ) -> Captions:
        pixels = read_pixels(contents, rows, self.size).to(self.device)
        around = None
        if prompt:
            around = self.model.prompt_ids(prompt if IMAGE in prompt else f"{IMAGE} {prompt}")
        return write_captions(self.model, pixels, config, around=around, seed=seed, draw_ids=draw_ids)
