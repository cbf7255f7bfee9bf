"""Tiny models and inputs that tests of several rooms share."""

import torch

from blip_pipelines.models.med import Med, MedConfig
from blip_pipelines.models.stem import Stem, convolutions
from blip_pipelines.models.text import TextConfig
from blip_pipelines.models.vision import VisionConfig

PAD, CLS, SEP, DEC, ENC = 0, 1, 2, 3, 4  # as of a pruned vocabulary: not where BERT has them


def tiny_config(
    *, image_width: int = 24, text_width: int = 16, layers: int = 2, stem: bool = False, **text: float
) -> MedConfig:
    size = {"image_size": 84, "patch_size": 21} if stem else {"image_size": 8, "patch_size": 4}
    ids = {"pad_id": PAD, "cls_id": CLS, "sep_id": SEP, "dec_id": DEC, "enc_id": ENC}
    return MedConfig(
        vision=VisionConfig(**size, width=image_width, layers=layers, heads=2, mlp_width=32),
        text=TextConfig(
            vocabulary=40, width=text_width, layers=layers, heads=2, ffn_width=24, max_positions=12, **ids, **text
        ),
        projection=8,
    )


def tiny_med(seed: int = 0, **config) -> Med:
    return Med(tiny_config(**config), seed).eval()


def random_stem() -> Stem:
    """The frozen stem's network with random weights that keep the size of what passes through."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for layer in convolutions():
        fan_in = layer.shape[1] * layer.shape[2] * layer.shape[3]
        weights[f"{layer.name}.weight"] = torch.randn(layer.shape, generator=generator) * (2 / fan_in) ** 0.5
        weights[f"{layer.name}.bias"] = torch.zeros(layer.shape[0])
    return Stem(weights)


def tiny_texts(lengths: tuple[int, ...] = (7, 4, 5), seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids (B, T) `[CLS] words [SEP] [PAD]...` and their bool mask."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.full((len(lengths), max(lengths)), PAD)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.randint(5, 40, (length,), generator=generator)
        ids[row, 0], ids[row, length - 1] = CLS, SEP
    return ids, ids != PAD


def tiny_pixels(batch: int = 3, size: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def stock_config(config: MedConfig):
    """The stock configuration written out by hand, as an oracle that does not go through our export."""
    from transformers import BlipConfig

    vision, text = config.vision, config.text
    return BlipConfig(
        vision_config={
            "hidden_size": vision.width,
            "intermediate_size": vision.mlp_width,
            "num_hidden_layers": vision.layers,
            "num_attention_heads": vision.heads,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
        },
        text_config={
            "vocab_size": text.vocabulary,
            "hidden_size": text.width,
            "intermediate_size": text.ffn_width,
            "num_hidden_layers": text.layers,
            "num_attention_heads": text.heads,
            "max_position_embeddings": text.max_positions,
            "pad_token_id": PAD,
            "bos_token_id": DEC,
            "sep_token_id": SEP,
            "eos_token_id": SEP,
        },
        image_text_hidden_size=config.projection,
    )
