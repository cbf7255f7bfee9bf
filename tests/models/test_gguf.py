import numpy as np
import pytest
import torch
from gguf_samples import VALUES, as_gguf, gguf_bytes, llama
from transformers import AutoModelForCausalLM, AutoTokenizer

from blip_pipelines.models.gguf import FORMATS, GGUFError, pair_halves, read_gguf, unpack, write_llama


def test_a_llama_in_gguf_becomes_the_same_stock_llama(tmp_path):
    source = llama()
    write_llama(gguf_bytes(VALUES, as_gguf(source)), tmp_path)
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    ids = torch.arange(2, 12)[None]
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits, source(ids).logits)
    assert (model.config.bos_token_id, model.config.eos_token_id) == (1, 0)


def test_its_tokenizer_comes_along(tmp_path):
    write_llama(gguf_bytes(VALUES, as_gguf(llama())), tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    words = tokenizer.tokenize("<start>crab crab 12<end>")
    assert words == ["<start>", "crab", "Ġcrab", "Ġ", "1", "2", "<end>"]
    assert tokenizer.decode(tokenizer("crab 12").input_ids) == "crab 12"
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<start>", "<end>", "<end>")
    said = tokenizer.apply_chat_template([{"role": "user", "content": "crab"}], tokenize=False)
    assert said == "<start>crab<end>"


def test_blocks_unpack_to_what_their_layout_says():
    scale, least = np.float16(0.25), np.float16(-1.5)
    quants = np.arange(32) % 16
    nibbles = (quants[:16] | quants[16:][::-1] << 4).astype(np.uint8)
    stored = np.concatenate([quants[:16], quants[16:][::-1]])
    halves = {"scale": scale, "nibbles": nibbles}
    q4_1 = np.zeros(1, FORMATS[3])
    for name, value in (halves | {"least": least}).items():
        q4_1[name] = value
    np.testing.assert_array_equal(unpack(q4_1)[0], stored * 0.25 - 1.5)
    q4_0 = np.zeros(1, FORMATS[2])
    for name, value in halves.items():
        q4_0[name] = value
    np.testing.assert_array_equal(unpack(q4_0)[0], (stored - 8) * 0.25)
    q8_0 = np.zeros(1, FORMATS[8])
    q8_0["scale"], q8_0["bytes"] = scale, np.arange(-16, 16)
    np.testing.assert_array_equal(unpack(q8_0)[0], np.arange(-16, 16) * 0.25)
    assert [FORMATS[kind].itemsize for kind in (2, 3, 8)] == [18, 20, 34]


def test_tensors_are_read_by_shape_and_offset():
    first, second = np.arange(6, dtype="<f4").reshape(2, 3), np.arange(5, dtype="<f2")
    content = gguf_bytes({"a": 1}, {"x": (0, (2, 3), first.tobytes()), "y": (1, (5,), second.tobytes())})
    found = read_gguf(content).tensors
    np.testing.assert_array_equal(found["x"], first)
    np.testing.assert_array_equal(found["y"], second)


def test_rows_of_a_rotation_move_to_halves_of_their_head():
    rows = np.arange(8)[:, None].astype(np.float32)
    assert pair_halves(rows, 4)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not at all", "not a GGUF file"),
        (b"GGUF\x03\0\0", "ends within its header"),
        (gguf_bytes({}, {"x": (14, (32,), bytes(32))}), "x: weights in GGUF format 14"),
        (gguf_bytes({}, {"x": (0, (64,), bytes(32))}), "x: the file ends"),
    ],
)
def test_what_it_does_not_know_is_refused_by_name(content, message):
    with pytest.raises(GGUFError, match=message):
        read_gguf(content)


def test_other_architectures_and_strange_tensors_are_refused(tmp_path):
    with pytest.raises(GGUFError, match="'phi3'"):
        write_llama(gguf_bytes(VALUES | {"general.architecture": "phi3"}, {}), tmp_path)
    strange = as_gguf(llama()) | {"blk.0.adapter.weight": (0, (1,), bytes(4))}
    with pytest.raises(GGUFError, match=r"layers\.0\.adapter"):
        write_llama(gguf_bytes(VALUES, strange), tmp_path)
