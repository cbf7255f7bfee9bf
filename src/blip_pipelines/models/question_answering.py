"""MED that answers questions (BLIP 5.3): an image-grounded encoder reads the question, a decoder writes the answer.

The decoder's cross-attention looks at the states of the question's words, never at the image. It starts as the MED's
decoder, whose cross-attention looked at images; so from here on nothing is shared between encoder and decoder, as in
the released BLIP, and both are the MED's modules under the stock names of `BlipForQuestionAnswering`.

Shapes: B questions, A answers, N image tokens, I question tokens, T answer tokens, D width.
"""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from blip_pipelines.config import ConfigError, read
from blip_pipelines.data.storage import StorageError, read_json, sha256_file
from blip_pipelines.data.tokens import CaptionTokenizer
from blip_pipelines.models.exports import NOTE, WEIGHTS
from blip_pipelines.models.keys_values import KeysValues, TextKeysValues
from blip_pipelines.models.med import Decoding, Med, MedConfig
from blip_pipelines.models.packing import Rows
from blip_pipelines.models.stem import Stem
from blip_pipelines.models.text import TextDecoder, with_first

KIND = "question_answering"  # the folder of the export


class QuestionAnswering(Decoding):
    """The model; what it returns is this rank's rows.

    Args:
        med: gives its weights, as they are; its projections and ITM head are left out.

    Raises:
        ConfigError: image and text differ in width.
    """

    def __init__(self, med: Med):
        super().__init__()
        vision, text = med.config.vision, med.config.text
        if vision.width != text.width:
            raise ConfigError(
                f"question answering needs one width, as the decoder's cross-attention turns from images to texts; "
                f"vision.width is {vision.width}, text.width {text.width}"
            )
        self.config: MedConfig = med.config
        self.vision_model = copy.deepcopy(med.vision_model)
        self.text_encoder = copy.deepcopy(med.text_encoder)
        self.text_decoder: TextDecoder = copy.deepcopy(med.text_decoder)

    def encode_image(self, pixels: Tensor) -> Tensor:
        """(B, N, D) image tokens of what `VisionTransformer` reads."""
        return self.vision_model(pixels)

    def read_question(self, image_BND: Tensor, token_ids_BI: Tensor, token_mask_BI: Tensor) -> TextKeysValues:
        """The questions as the decoder sees them; puts [ENC] at position 0 itself.

        Args:
            image_BND: an image for each question; of a video the tokens of its frames in a row.
        """
        token_ids_BI = with_first(token_ids_BI, self.config.text.enc_id)
        image = KeysValues([layer.crossattention.keys_values(image_BND) for layer in self.text_encoder.layers])
        rows = Rows.of(token_ids_BI, token_mask_BI)
        states_BID = rows.unpack(self.text_encoder(token_ids_BI, rows, token_mask_BI[:, None, None], image))
        layers = [layer.crossattention.keys_values(states_BID) for layer in self.text_decoder.bert.layers]
        return TextKeysValues(layers, token_mask_BI)


@dataclass(frozen=True)
class ExportedAnswering:
    """What `load_question_answering` found in a folder."""

    model: QuestionAnswering
    tokenizer: CaptionTokenizer
    image: dict[str, Any]  # how pixels are made: the values of `data.transforms.ImageConfig`
    stem: Stem | None


def load_question_answering(folder: Path) -> ExportedAnswering:
    """The model of a folder that `export_med` wrote with the kind `question_answering`, in evaluation mode on the CPU.

    Raises:
        StorageError: a file is missing, damaged or of another model.
    """
    note, path = read_json(folder / NOTE), folder / KIND / WEIGHTS
    expected = note["sha256"].get(f"{KIND}/{WEIGHTS}")
    if expected is None or not path.exists() or sha256_file(path) != expected:
        raise StorageError(f"{path}: missing or damaged; export the model again")
    model = QuestionAnswering(Med(read(MedConfig, note["config"], f"{folder / NOTE}: config")))
    state = safetensors.torch.load_file(path)
    wanted = {name for name, _ in model.named_parameters()}
    if missing := sorted(wanted - set(state)):
        raise StorageError(f"{path}: no weights for {missing[:5]}; export the model again")
    model.load_state_dict({name: state[name] for name in wanted}, strict=False)
    stem = Stem.load(folder) if note["stem"] else None
    if stem is not None and stem.hash != note["stem"]:
        raise StorageError(f"{folder}: its stem is not the one in {NOTE}; export the model again")
    tokenizer = CaptionTokenizer.load(folder / KIND)
    return ExportedAnswering(model.eval(), tokenizer, note["image"], stem)
