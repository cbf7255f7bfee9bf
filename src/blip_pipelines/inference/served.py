"""The models people are served: MLflow "models from code" over an exported folder.

`blip-captioner` writes a caption for an image, `blip2` does through a language model (`served_blip2`); `instructblip`
answers what it is asked about one (`served_instructblip`), and so does `blip-vqa`, a MED (`served_vqa`).
`blip-retriever` embeds images and texts in one space, and scores candidate texts for an image by ITC and ITM. MLflow
stores the folder and a file of two lines that makes the model; the code itself comes from the installed package. Images
arrive as base64 text (a data URI may stand before it) or as bytes, and are untrusted: what cannot be decoded is refused
by row and reason.
"""

import base64
import binascii
import hashlib
import io
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature, set_model
from mlflow.pyfunc import PythonModel
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
from mlflow.types.schema import Array
from PIL import Image
from torch import Tensor

from blip_pipelines.config import ConfigError
from blip_pipelines.data.images import ImageLimits, decode
from blip_pipelines.data.records import Refused
from blip_pipelines.data.transforms import to_pixels
from blip_pipelines.inference import scoring
from blip_pipelines.inference.generation import Captions, GenerationConfig, generate
from blip_pipelines.models.exports import load_med

__all__ = [
    "SERVED",
    "CaptionWriter",
    "Captioner",
    "ParamSchema",
    "PythonModel",
    "Retriever",
    "Served",
    "batches_of",
    "column_of",
    "defaults_of",
    "image_bytes",
    "invalid",
    "read_pixels",
    "refuse",
    "set_model",
]

BATCH_IMAGES = 64
MAX_TEXT_TOKENS = 64
MIN_TOKENS = 3  # [DEC] and two words: BLIP's 5 would forbid the short captions of small data sets
MAX_SIDE = 10_000
MAX_BEAMS = 16
REQUIREMENTS = ("mlflow", "numpy", "pandas", "pillow", "safetensors", "torch", "transformers")


class _MedModel(PythonModel):
    """What both models have in common: the exported folder, loaded once, and untrusted images."""

    def load_context(self, context: Any) -> None:
        """Load the exported folder; MLflow calls this by keyword, so `context` keeps its name."""
        self.folder = Path(context.artifacts["model"])
        exported = load_med(self.folder)
        if exported.tokenizer is None:
            raise MlflowException(f"{context.artifacts['model']}: no tokenizer; export the model with its tokenizer")
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.med, self.tokenizer, self.size = exported.med.to(self.device), exported.tokenizer, exported.image["size"]
        self.stem = exported.stem.to(self.device) if exported.stem else None

    @torch.no_grad()
    def encode(self, contents: Sequence[bytes], rows: Sequence[int]) -> Tensor:
        """(B, N, D) image tokens on the CPU; `rows` number the images in messages."""
        batches = read_pixels(contents, rows, self.size).to(self.device).split(BATCH_IMAGES)
        return scoring.encode_images(self.med, (self.stem(batch) if self.stem else batch for batch in batches))


class CaptionWriter(PythonModel, ABC):
    """One caption per row.

    Row: `image`, and optionally `prompt`. Parameters: `strategy` (beam, nucleus, greedy), `num_beams`, `top_p`,
    `min_tokens`, `max_tokens`, `seed`. Returns `caption` and its `log_probability`. The same image and parameters give
    the same caption, sampled ones too.
    """

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        settings = {**defaults_of(CAPTIONER_PARAMETERS), **(params or {})}
        seed = settings.pop("seed")
        if not 1 <= (beams := settings["num_beams"]) <= MAX_BEAMS:
            raise MlflowException.invalid_parameter_value(f"num_beams: {beams} is outside 1 to {MAX_BEAMS}")
        try:
            config = GenerationConfig(beams=settings.pop("num_beams"), **settings)
        except ConfigError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from error
        contents = [image_bytes(image, row) for row, image in enumerate(column_of(model_input, "image", required=True))]
        prompts = np.array([prompt or "" for prompt in column_of(model_input, "prompt")], dtype=object)
        written: dict[str, Any] = {"caption": [""] * len(contents), "log_probability": [0.0] * len(contents)}
        for prompt in sorted(set(prompts)):
            for rows in batches_of(np.flatnonzero(prompts == prompt)):
                chosen = [contents[row] for row in rows]
                for row, text, gain in zip(rows, *self._write(chosen, rows, config, prompt, seed), strict=True):
                    written["caption"][row], written["log_probability"][row] = text, gain
        return pd.DataFrame(written)

    def _write(
        self, contents: list[bytes], rows: Sequence[int], config: GenerationConfig, prompt: str, seed: int
    ) -> tuple[list[str], list[float]]:
        draw_ids = [int.from_bytes(hashlib.sha256(content).digest()[:7], "big") for content in contents]
        try:
            captions = self.write(contents, rows, config, prompt, seed, torch.tensor(draw_ids, dtype=torch.int64))
        except ValueError as error:  # a prompt or a length that leaves no room
            raise MlflowException.invalid_parameter_value(str(error)) from error
        return captions.texts, captions.log_probability.tolist()

    @abstractmethod
    def write(
        self,
        contents: list[bytes],
        rows: Sequence[int],
        config: GenerationConfig,
        prompt: str,
        seed: int,
        draw_ids: Tensor,
    ) -> Captions:
        """Captions of at most `BATCH_IMAGES` encoded files with one prompt; `rows` number them in messages.

        Raises:
            ValueError: the prompt or the length leaves no room.
        """


class Captioner(_MedModel, CaptionWriter):
    """By the decoder of a MED; captions go on from `prompt`."""

    @torch.no_grad()
    def write(
        self,
        contents: list[bytes],
        rows: Sequence[int],
        config: GenerationConfig,
        prompt: str,
        seed: int,
        draw_ids: Tensor,
    ) -> Captions:
        image = self.med.project_image(self.encode(contents, rows).to(self.device))
        return generate(self.med, image, self.tokenizer, config, prompt=prompt, seed=seed, draw_ids=draw_ids)


class Retriever(_MedModel):
    """Embeddings, and scores of candidate texts.

    Row: `image`, `text`, `texts`, each optional. An image gives `image_embedding`, a text `text_embedding`: unit
    vectors whose product is the ITC similarity. An image with a list of candidate `texts` gives `similarities` (ITC)
    and `match_probabilities` (ITM), in the order of the candidates.
    """

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        images, texts, candidates = (column_of(model_input, name) for name in ("image", "text", "texts"))
        answers = []
        for rows in batches_of(np.arange(len(model_input))):
            answers += self._answer(
                rows, [images[row] for row in rows], [texts[row] for row in rows], [candidates[row] for row in rows]
            )
        return pd.DataFrame(answers, columns=RETRIEVER_OUTPUTS)

    def _answer(self, rows: Sequence[int], images: list, texts: list, candidates: list) -> list[dict[str, Any]]:
        seen = [at for at, image in enumerate(images) if image is not None]
        for at, row in enumerate(rows):
            if images[at] is None and (texts[at] is None or candidates[at] is not None):
                raise refuse(row, "image", "missing; give an image, a text, or an image with candidate texts")
        contents = [image_bytes(images[at], rows[at]) for at in seen]
        answers: list[dict[str, Any]] = [dict.fromkeys(RETRIEVER_OUTPUTS) for _ in rows]
        asked = [(at, text) for at, text in enumerate(texts) if text is not None]
        pairs = [(at, text) for at in seen if candidates[at] is not None for text in candidates[at]]
        words = [str(text) for _, text in asked + pairs]
        if words:
            token_ids, token_mask = map(torch.from_numpy, self.tokenizer(words, MAX_TEXT_TOKENS))
            text_RE = scoring.text_features(self.med, token_ids, token_mask)
            for place, (at, _) in enumerate(asked):
                answers[at]["text_embedding"] = text_RE[place].tolist()
        if seen:
            image_IND = self.encode(contents, [rows[at] for at in seen])
            image_IE = scoring.image_features(self.med, image_IND)
            for place, at in enumerate(seen):
                answers[at]["image_embedding"] = image_IE[place].tolist()
                if candidates[at] is not None:
                    answers[at] |= {"similarities": [], "match_probabilities": []}
        if pairs:
            image_of_pair = np.searchsorted(seen, [at for at, _ in pairs])
            text_of_pair = np.arange(len(asked), len(words))
            logits = scoring.match_logits(self.med, image_IND, token_ids, token_mask, image_of_pair, text_of_pair)
            similarities = (image_IE[image_of_pair] * text_RE[text_of_pair]).sum(1)
            probabilities = scoring.match_probabilities(logits)
            for (at, _), similarity, probability in zip(
                pairs, similarities.tolist(), probabilities.tolist(), strict=True
            ):
                answers[at]["similarities"].append(similarity)
                answers[at]["match_probabilities"].append(probability)
        return answers


CAPTIONER_PARAMETERS = ParamSchema(
    [
        ParamSpec("strategy", DataType.string, "beam"),
        ParamSpec("num_beams", DataType.long, 3),
        ParamSpec("top_p", DataType.double, 0.9),
        ParamSpec("min_tokens", DataType.long, MIN_TOKENS),
        ParamSpec("max_tokens", DataType.long, 20),
        ParamSpec("seed", DataType.long, 0),
    ]
)
INSTRUCTED_PARAMETERS = ParamSchema(
    [
        ParamSpec("num_beams", DataType.long, 1),
        ParamSpec("min_tokens", DataType.long, 1),
        ParamSpec("max_tokens", DataType.long, 30),
        ParamSpec("length_penalty", DataType.double, 1.0),
        ParamSpec("repetition_penalty", DataType.double, 1.0),
        ParamSpec("per_token", DataType.boolean, False),
        ParamSpec("contrast", DataType.double, 0.0),
    ]
)
VQA_PARAMETERS = ParamSchema(
    [
        ParamSpec("num_beams", DataType.long, 3),
        ParamSpec("min_tokens", DataType.long, 1),
        ParamSpec("max_tokens", DataType.long, 10),
    ]
)
RETRIEVER_OUTPUTS = ["image_embedding", "text_embedding", "similarities", "match_probabilities"]


@dataclass(frozen=True)
class Served:
    """What registering a served model takes."""

    code: Path  # the file that MLflow stores and runs
    signature: Callable[[], ModelSignature]
    example: Callable[[], Any]

    @staticmethod
    def requirements() -> list[str]:
        """Pins of what serving imports; the package itself is installed from its source."""
        return [f"{name}=={metadata.version(name).split('+')[0]}" for name in REQUIREMENTS]


def _answering_signature(parameters: ParamSchema) -> ModelSignature:
    inputs = Schema(
        [
            *(ColSpec(DataType.string, name) for name in ("image", "instruction")),
            ColSpec(Array(DataType.string), "candidates", required=False),
        ]
    )
    outputs = Schema([ColSpec(DataType.string, "answer"), ColSpec(Array(DataType.double), "scores", required=False)])
    return ModelSignature(inputs, outputs, parameters)


def _captioner_signature() -> ModelSignature:
    inputs = Schema([ColSpec(DataType.string, "image"), ColSpec(DataType.string, "prompt", required=False)])
    outputs = Schema([ColSpec(DataType.string, "caption"), ColSpec(DataType.double, "log_probability")])
    return ModelSignature(inputs, outputs, CAPTIONER_PARAMETERS)


def _retriever_signature() -> ModelSignature:
    inputs = Schema(
        [
            ColSpec(DataType.string, "image", required=False),
            ColSpec(DataType.string, "text", required=False),
            ColSpec(Array(DataType.string), "texts", required=False),
        ]
    )
    outputs = Schema([ColSpec(Array(DataType.double), name, required=False) for name in RETRIEVER_OUTPUTS])
    return ModelSignature(inputs, outputs)


def example_image() -> str:
    file = io.BytesIO()
    Image.new("RGB", (32, 32), (200, 60, 40)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


SERVED = {
    "blip-captioner": Served(
        Path(__file__).with_name("serve_captioner.py"),
        _captioner_signature,
        lambda: pd.DataFrame({"image": [example_image()]}),
    ),
    "blip-retriever": Served(
        Path(__file__).with_name("serve_retriever.py"),
        _retriever_signature,
        lambda: pd.DataFrame({"image": [example_image()], "texts": [["a red square", "a dog"]]}),
    ),
}
SERVED["blip2"] = replace(SERVED["blip-captioner"], code=Path(__file__).with_name("serve_blip2.py"))
SERVED["instructblip"] = Served(
    Path(__file__).with_name("serve_instructblip.py"),
    partial(_answering_signature, INSTRUCTED_PARAMETERS),
    lambda: pd.DataFrame({"image": [example_image()], "instruction": ["Is it red?"], "candidates": [["yes", "no"]]}),
)
SERVED["blip-vqa"] = replace(
    SERVED["instructblip"],
    code=Path(__file__).with_name("serve_vqa.py"),
    signature=partial(_answering_signature, VQA_PARAMETERS),
)
SERVED["blip-filter"] = SERVED["blip-retriever"]  # asked in the same way; its match probabilities are what it is for


def read_pixels(contents: Sequence[bytes], rows: Sequence[int], size: int) -> Tensor:
    """(B, 3, size, size) uint8 of encoded files; `rows` number them in messages.

    Raises:
        MlflowException: the caller's error; one of them is no image.
    """
    limits = ImageLimits(min_side=1, max_side=MAX_SIDE)
    pixels = np.empty((len(contents), 3, size, size), np.uint8)
    for at, (content, row) in enumerate(zip(contents, rows, strict=True)):
        try:
            pixels[at] = to_pixels(decode(content, limits=limits), size)
        except Refused as error:
            raise refuse(row, "image", f"{error.reason}: {error}") from error
    return torch.from_numpy(pixels)


def column_of(table: pd.DataFrame, name: str, required: bool = False) -> list[Any]:
    """Values of a column, None where there is none."""
    if name not in table:
        if required:
            raise MlflowException.invalid_parameter_value(f"the column '{name}' is missing")
        return [None] * len(table)
    return [None if np.isscalar(value) and pd.isna(value) else value for value in table[name]]


def image_bytes(image: Any, row: int) -> bytes:
    """The encoded file behind base64 text or bytes."""
    if isinstance(image, bytes | bytearray | memoryview):
        return bytes(image)
    if not isinstance(image, str):
        raise refuse(row, "image", f"expected base64 text or bytes, found {type(image).__name__}")
    text = image.partition(",")[2] if image.startswith("data:") else image
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise refuse(row, "image", f"not valid base64 ({error}); send the encoded file as base64 text") from error


def refuse(row: int, column: str, reason: str) -> MlflowException:
    return invalid(f"row {row}, {column}: {reason}")


def invalid(message: str) -> MlflowException:
    """The caller's error."""
    return MlflowException.invalid_parameter_value(message)


def batches_of(rows: np.ndarray) -> Iterator[list[int]]:
    for start in range(0, len(rows), BATCH_IMAGES):
        yield rows[start : start + BATCH_IMAGES].tolist()


def defaults_of(schema: ParamSchema) -> dict[str, Any]:
    return {spec.name: spec.default for spec in schema.params}
