"""Tiny GGUF files, written by the specification."""

import struct

import torch
from transformers import LlamaConfig, LlamaForCausalLM

HEADS, KEY_HEADS, HEAD = 4, 2, 6
PIECES = ["<end>", "<start>", *(chr(code) for code in range(33, 127)), "Ġ", "Ċ", "cr", "ab", "crab", "Ġcrab"]
VALUES = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "llama.context_length": 64,
    "llama.embedding_length": HEADS * HEAD,
    "llama.feed_forward_length": 32,
    "llama.attention.head_count": HEADS,
    "llama.attention.head_count_kv": KEY_HEADS,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 1e5,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": PIECES,
    "tokenizer.ggml.token_type": [3, 3] + [1] * (len(PIECES) - 2),
    "tokenizer.ggml.merges": ["c r", "a b", "cr ab", "Ġ crab"],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 0,
    "tokenizer.ggml.padding_token_id": 0,
    "tokenizer.chat_template": "{% for message in messages %}<start>{{ message['content'] }}<end>{% endfor %}",
}


def gguf_bytes(values, tensors):
    """A file by the specification: header, values, records, aligned bytes; tensors are (GGUF number, shape, bytes)."""

    def text(value):
        return struct.pack("<Q", len(value.encode())) + value.encode()

    def typed(value):
        if isinstance(value, str):
            return 8, text(value)
        if isinstance(value, list):
            kind = typed(value[0])[0]
            return 9, struct.pack("<IQ", kind, len(value)) + b"".join(typed(item)[1] for item in value)
        return (6, struct.pack("<f", value)) if isinstance(value, float) else (4, struct.pack("<I", value))

    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(values))
    for name, value in values.items():
        kind, content = typed(value)
        header += text(name) + struct.pack("<I", kind) + content
    body = b""
    for name, (kind, shape, content) in tensors.items():
        header += text(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *reversed(shape))
        header += struct.pack("<IQ", kind, len(body))
        body += content + b"\0" * (-len(content) % 32)
    return header + b"\0" * (-len(header) % 32) + body


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(PIECES),
        hidden_size=HEADS * HEAD,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        tie_word_embeddings=True,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


def as_gguf(model) -> dict[str, tuple[int, tuple[int, ...], bytes]]:
    """Its weights under GGUF's names, query and key rows in GGUF's order, float32."""
    names = {
        "embed_tokens": "token_embd",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        **{f"self_attn.{part}_proj": f"attn_{part}" for part in "qkv"},
        "self_attn.o_proj": "attn_output",
        **{f"mlp.{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")},
    }
    tensors = {}
    for name, value in model.model.state_dict().items():
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        name = "output_norm.weight" if name == "norm.weight" else name.replace("layers.", "blk.")
        if "attn_q" in name or "attn_k" in name:  # row r of the first half next to row r of the second
            value = value.view(-1, 2, HEAD // 2, value.shape[1]).transpose(1, 2).reshape(value.shape)
        tensors[name] = (0, tuple(value.shape), value.contiguous().numpy().tobytes())
    return tensors


def model_in_gguf() -> tuple[bytes, LlamaForCausalLM]:
    source = llama()
    return gguf_bytes(VALUES, as_gguf(source)), source
