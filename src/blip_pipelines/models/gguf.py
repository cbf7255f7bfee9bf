"""Language models in GGUF, the format in which Python packages carry them, as plain stock folders.

Only what such a package needs: the LLaMA architecture, byte-level BPE, and the plain and 32-weight block formats. The
stock loader needs two more packages, keeps the weights packed and takes most of a minute; here a model of 135 M
parameters is a dense `LlamaForCausalLM` folder after seconds, written once.

Format: a header of keys and values, one record a tensor, then the tensors' bytes, aligned
(ggml-org/ggml, docs/gguf.md; block layouts: ggml-common.h).
"""

import math
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BLOCK = 32
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
FORMATS: dict[int, np.dtype[Any]] = {  # by GGUF's number, what a weight or a block of them is made of
    0: np.dtype("<f4"),
    1: np.dtype("<f2"),
    2: np.dtype([("scale", "<f2"), ("nibbles", "u1", BLOCK // 2)]),  # Q4_0
    3: np.dtype([("scale", "<f2"), ("least", "<f2"), ("nibbles", "u1", BLOCK // 2)]),  # Q4_1
    8: np.dtype([("scale", "<f2"), ("bytes", "i1", BLOCK)]),  # Q8_0
}
CONTROL_TOKEN = 3
TOKENS = (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
NAMES = (
    (r"^token_embd\.", "model.embed_tokens."),
    (r"^output_norm\.", "model.norm."),
    (r"^output\.", "lm_head."),
    (r"^blk\.", "model.layers."),
    (r"\.attn_norm\.", ".input_layernorm."),
    (r"\.ffn_norm\.", ".post_attention_layernorm."),
    (r"\.attn_output\.", ".self_attn.o_proj."),
    (r"\.attn_([qkv])\.", r".self_attn.\1_proj."),
    (r"\.ffn_(gate|up|down)\.", r".mlp.\1_proj."),
)


class GGUFError(ValueError):
    """A file that is no GGUF, or holds what this reader does not know; the message says what."""


@dataclass(frozen=True)
class GGUF:
    """What a file says: its keys and values, its tensors in float32 in the order of PyTorch."""

    values: dict[str, Any]
    tensors: dict[str, np.ndarray]


def read_gguf(content: bytes) -> GGUF:
    """Parse a whole file.

    Raises:
        GGUFError: not GGUF, truncated, or with a tensor in a format that is not in `FORMATS`.
    """
    if content[:4] != b"GGUF":
        raise GGUFError(f"begins with {content[:4]!r}: not a GGUF file")
    try:
        reader = _Reader(content, 4)
        version, tensors, keys = reader.take("I"), reader.take("Q"), reader.take("Q")
        if version not in (2, 3):
            raise GGUFError(f"GGUF version {version}; versions 2 and 3 are known")
        values = {reader.string(): reader.value(reader.take("I")) for _ in range(keys)}
        records = [reader.record() for _ in range(tensors)]
    except struct.error as error:
        raise GGUFError(f"ends within its header ({error})") from error
    alignment = values.get("general.alignment", 32)
    start = math.ceil(reader.at / alignment) * alignment
    return GGUF(values, {name: _tensor(content, name, shape, kind, start + at) for name, shape, kind, at in records})


class _Reader:
    def __init__(self, content: bytes, at: int):
        self.content, self.at = content, at

    def take(self, code: str, count: int | None = None) -> Any:
        pattern = f"<{'' if count is None else count}{code}"
        found = struct.unpack_from(pattern, self.content, self.at)
        self.at += struct.calcsize(pattern)
        return found[0] if count is None else list(found)

    def string(self) -> str:
        return self.take("s", self.take("Q"))[0].decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            kind, count = self.take("I"), self.take("Q")
            return self.take(SCALARS[kind], count) if kind in SCALARS else [self.value(kind) for _ in range(count)]
        if kind not in SCALARS:
            raise GGUFError(f"a value of unknown kind {kind}")
        return self.take(SCALARS[kind])

    def record(self) -> tuple[str, tuple[int, ...], int, int]:
        name, dimensions = self.string(), self.take("I")
        shape = tuple(reversed(self.take("Q", dimensions)))
        return name, shape, self.take("I"), self.take("Q")


def _tensor(content: bytes, name: str, shape: tuple[int, ...], kind: int, at: int) -> np.ndarray:
    if kind not in FORMATS:
        raise GGUFError(f"{name}: weights in GGUF format {kind}; known are {', '.join(map(str, FORMATS))}")
    form = FORMATS[kind]
    count = math.prod(shape) // (BLOCK if form.names else 1)
    if at + count * form.itemsize > len(content):
        raise GGUFError(f"{name}: the file ends before its weights do")
    return unpack(np.frombuffer(content, form, count, at)).reshape(shape)


def unpack(blocks: np.ndarray) -> np.ndarray:
    """Float32 weights of blocks; of 4-bit ones the low halves of all bytes come first."""
    if blocks.dtype.names is None:
        return blocks.astype(np.float32)
    scale = blocks["scale"].astype(np.float32)[:, None]
    if "bytes" in blocks.dtype.names:
        return scale * blocks["bytes"]
    whole = np.concatenate([blocks["nibbles"] & 15, blocks["nibbles"] >> 4], 1).astype(np.float32)
    if "least" in blocks.dtype.names:
        return scale * whole + blocks["least"].astype(np.float32)[:, None]
    return scale * (whole - 8)


def write_llama(content: bytes, folder: Path) -> None:
    """Write a LLaMA-type GGUF as a stock folder: float32 safetensors, config, tokenizer with its chat template.

    Raises:
        GGUFError: another architecture or tokenizer, or a tensor that a LLaMA has no place for.
    """
    found = read_gguf(content)
    values = found.values
    if values.get("general.architecture") != "llama" or values.get("tokenizer.ggml.model") != "gpt2":
        raise GGUFError(
            f"architecture {values.get('general.architecture')!r} with tokenizer {values.get('tokenizer.ggml.model')!r}"
            "; this reader knows 'llama' with 'gpt2' (byte-level BPE)"
        )
    config = llama_config(values, tied="output.weight" not in found.tensors)
    state = {}
    for name, weight in found.tensors.items():
        for pattern, ours in NAMES:
            name = re.sub(pattern, ours, name)
        if re.search(r"self_attn\.[qk]_proj\.weight", name):
            weight = pair_halves(weight, config.hidden_size // config.num_attention_heads)
        state[name] = torch.from_numpy(weight)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    difference = set(state) ^ set(model.state_dict())
    if difference:
        raise GGUFError(f"tensors that a LLaMA lacks, or that the file does: {sorted(difference)[:5]}")
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    model.save_pretrained(folder)
    bpe_tokenizer(values).save_pretrained(folder)


def llama_config(values: dict[str, Any], tied: bool) -> LlamaConfig:
    of = {name.removeprefix("llama."): value for name, value in values.items() if name.startswith("llama.")}
    heads = of["attention.head_count"]
    ids: dict[str, Any] = {f"{name}_token_id": values.get(f"tokenizer.ggml.{key}_token_id") for name, key in TOKENS}
    return LlamaConfig(
        vocab_size=len(values["tokenizer.ggml.tokens"]),
        hidden_size=of["embedding_length"],
        intermediate_size=of["feed_forward_length"],
        num_hidden_layers=of["block_count"],
        num_attention_heads=heads,
        num_key_value_heads=of.get("attention.head_count_kv", heads),
        max_position_embeddings=of["context_length"],
        rms_norm_eps=of["attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": of.get("rope.freq_base", 10000.0)},
        tie_word_embeddings=tied,
        **ids,
    )


def bpe_tokenizer(values: dict[str, Any]) -> PreTrainedTokenizerFast:
    """The byte-level BPE tokenizer of the file, digits one by one as SmolLM has them."""
    tokens, kinds = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in values["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = [pre_tokenizers.Digits(individual_digits=True)] if values.get("tokenizer.ggml.pre") == "smollm" else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*digits, bytes_only])
    tokenizer.decoder = decoders.ByteLevel()
    specials = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    ids = {f"{name}_token": values.get(f"tokenizer.ggml.{key}_token_id") for name, key in (*TOKENS, ("unk", "unknown"))}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=values.get("tokenizer.chat_template"),
        model_max_length=values["llama.context_length"],
        **{name: tokens[number] for name, number in ids.items() if number is not None},
    )


def pair_halves(weight: np.ndarray, head: int) -> np.ndarray:
    """Rows of a query or key projection as stock classes rotate them, halves of a head against one another; GGUF has
    the two rows of a rotation side by side.
    """
    return weight.reshape(-1, head // 2, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
