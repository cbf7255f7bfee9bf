"""A BLIP-2 or InstructBLIP in the published layout: what `save_pretrained` of the stock classes writes.

Salesforce's models come so, from a folder or the hub. A BLIP-2 has lost the text side of its Q-Former after stage 1;
InstructBLIP needs it again, from the model that stage 1 left (LAVIS issues 344 and 414).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

from blip_pipelines.data.tokens import DECODE, ENCODE, CaptionTokenizer
from blip_pipelines.models.blip2 import Blip2, Blip2Config
from blip_pipelines.models.blip2_exports import ExportedBlip2
from blip_pipelines.models.exports import quietly
from blip_pipelines.models.frozen_tower import TowerConfig, open_tower
from blip_pipelines.models.language import LanguageModel
from blip_pipelines.models.precision import Precision
from blip_pipelines.models.qformer import QFormer, QFormerConfig
from blip_pipelines.models.qformer_start import QFormerStartConfig, start_from_blip2, start_qformer
from blip_pipelines.models.stock_blip2 import read_language
from blip_pipelines.models.text import TextConfig
from blip_pipelines.models.weights import StartError, Weights, read_weights

OTHERS = r"language_model\.|vision_model\.(?!post_layernorm)"  # read by their own loaders
PROJECTION = "language_projection."


@dataclass(frozen=True)
class PublishedConfig:
    """Which one.

    Args:
        source: folder or hub id of `Blip2ForConditionalGeneration` or `InstructBlipForConditionalGeneration`.
        precision: of the language model.
        text_side: of a BLIP-2, folder or hub id of the `Blip2ForImageTextRetrieval` of its stage 1.
        tokenizer: of the Q-Former, folder or hub id; null: the one that comes with an InstructBLIP.
    """

    source: str
    precision: Precision = "bfloat16"
    text_side: str | None = None
    tokenizer: str | None = None


def open_published(config: PublishedConfig) -> ExportedBlip2:
    """Read it, on the CPU.

    Raises:
        StartError: there is no such model, or a key of it is unknown.
    """
    source = config.source
    with quietly():
        try:
            stock: Any = AutoConfig.from_pretrained(source)
        except (OSError, ValueError) as error:
            raise StartError(f"{source}: no model that stock transformers can read ({error})") from error
        if stock.model_type not in ("blip-2", "instructblip"):
            raise StartError(f"{source}: a {stock.model_type!r} is no BLIP-2 and no InstructBLIP")
    instructs = stock.model_type == "instructblip"
    words = _former_tokenizer(source, config.tokenizer) if instructs or config.tokenizer else None
    tower = open_tower(TowerConfig(source))
    with quietly():  # the size of the word table is that of whoever has one
        sizes = AutoConfig.from_pretrained(config.text_side) if config.text_side else stock
    former = QFormer(_former_config(stock, words, sizes.qformer_config.vocab_size).behind(tower))
    if config.text_side is not None:
        start_qformer(former, QFormerStartConfig(model=config.text_side))
    weights = read_weights(source, unwanted=OTHERS)
    projection = {name: value for name, value in weights.tensors.items() if name.startswith(PROJECTION)}
    rest = {name: value for name, value in weights.tensors.items() if name not in projection}
    started = start_from_blip2(former, Weights(weights.source, rest, weights.config))
    with quietly():
        language = LanguageModel(read_language(source, config.precision), AutoTokenizer.from_pretrained(source))
    model = Blip2(former, language, Blip2Config("{image}{instruction}", reads_instructions=instructs), tower)
    needed = {name for name, parameter in former.named_parameters() if parameter.requires_grad}
    if missing := sorted(needed & set(started.fresh)):
        raise StartError(f"{source}: no weights for {missing[:5]}")
    model.language_projection.load_state_dict(
        {name.removeprefix(PROJECTION): value.float() for name, value in projection.items()}
    )
    return ExportedBlip2(former.eval(), tower, words, {"size": tower.image_size}, None, model.eval())


def _former_tokenizer(source: str, tokenizer: str | None) -> CaptionTokenizer:
    """With [DEC] and [ENC], which instructions never hold, so that they need no row in the table."""
    with quietly():
        try:
            if tokenizer is not None:
                stock = PreTrainedTokenizerFast.from_pretrained(tokenizer)
            elif Path(source).is_dir():
                stock = PreTrainedTokenizerFast.from_pretrained(Path(source) / "qformer_tokenizer")
            else:
                stock = PreTrainedTokenizerFast.from_pretrained(source, subfolder="qformer_tokenizer")
        except (OSError, ValueError) as error:
            raise StartError(f"{source}: no tokenizer of its Q-Former; name one ({error})") from error
    stock.add_tokens([DECODE, ENCODE], special_tokens=True)
    return CaptionTokenizer(stock)


def _former_config(stock: Any, words: CaptionTokenizer | None, vocabulary: int) -> QFormerConfig:
    theirs = stock.qformer_config
    ids = {f"{name}_id": getattr(words, name) for name in ("cls", "sep", "pad", "dec", "enc")} if words else {}
    text = TextConfig(
        vocabulary=vocabulary,
        width=theirs.hidden_size,
        layers=theirs.num_hidden_layers,
        heads=theirs.num_attention_heads,
        ffn_width=theirs.intermediate_size,
        max_positions=theirs.max_position_embeddings,
        layer_norm_eps=theirs.layer_norm_eps,
        dropout=theirs.hidden_dropout_prob,
        attention_dropout=theirs.attention_probs_dropout_prob,
        **ids,
    )
    return QFormerConfig(
        text=text,
        queries=stock.num_query_tokens,
        cross_attention_every=theirs.cross_attention_frequency,
        projection=getattr(stock, "image_text_hidden_size", 256),
    )
