import numpy as np
import pytest
from data_samples import tokenizer_json
from transformers import AutoTokenizer

from blip_pipelines.data.tokens import CaptionTokenizer, clean_caption, prune_vocabulary

TEXTS = ["A red crab!", "walking a dog's flag", "the greenish house-horse", "une étoile"]


@pytest.fixture(scope="module")
def whole() -> CaptionTokenizer:
    return prune_vocabulary(tokenizer_json())[0]


@pytest.fixture(scope="module")
def pruned() -> CaptionTokenizer:
    return prune_vocabulary(tokenizer_json(), TEXTS)[0]


def pieces(tokenizer: CaptionTokenizer, ids: np.ndarray) -> list[list[str]]:
    return [tokenizer.stock.convert_ids_to_tokens(row) for row in ids.tolist()]


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("A Man, riding (fast).", "a man, riding fast"),
        ('say: "hi" #1*2; ~now!', "say hi 1 2 now"),
        ("  two\t\nlines \u3000 ", "two lines"),
        ("don't e-mail?", "don't e-mail?"),
        ("🦀 سلام", "🦀 سلام"),
        ("", ""),
    ],
)
def test_captions_are_cleaned_as_in_blip(raw, clean):
    assert clean_caption(raw) == clean


def test_cleaning_cuts_by_words():
    assert clean_caption("one. two three four", max_words=2) == "one two"


def test_ids_are_framed_and_padded_to_the_longest(pruned):
    ids, mask = pruned(["a dog", "a", ""], 30)
    assert pieces(pruned, ids) == [
        ["[CLS]", "a", "dog", "[SEP]"],
        ["[CLS]", "a", "[SEP]", "[PAD]"],
        ["[CLS]", "[SEP]", "[PAD]", "[PAD]"],
    ]
    assert (ids.dtype, mask.dtype) == (np.int64, bool)
    assert mask.sum(1).tolist() == [4, 3, 2]


def test_long_captions_are_cut_but_end(pruned):
    ids, _ = pruned(["a red crab with a dog", "x" * 100_000, "a " * 50_000], 5)
    assert ids.shape == (3, 5)
    assert pieces(pruned, ids)[0] == ["[CLS]", "a", "red", "crab", "[SEP]"]
    assert pieces(pruned, ids)[2] == ["[CLS]", "a", "a", "a", "[SEP]"]


def test_no_captions_give_an_empty_batch(pruned):
    ids, mask = pruned([], 5)
    assert ids.shape == mask.shape == (0, 2)


def test_a_prompt_comes_first_and_its_tokens_are_counted(pruned):
    ids, _ = pruned(["A Dog."], 30, prompt="a house with ")
    assert pieces(pruned, ids)[0] == ["[CLS]", "a", "house", "w", "##i", "##t", "##h", "a", "dog", "[SEP]"]
    assert pruned.prompt_tokens("a house with ") == 6
    assert pruned.prompt_tokens("") == 0


def test_words_of_a_caption_never_become_special_tokens(pruned):
    ids, _ = pruned(["[SEP] [DEC] [PAD]"], 30)
    specials = {pruned.sep, pruned.dec, pruned.enc, pruned.pad, pruned.cls}
    assert not specials & set(ids[0, 1:-1].tolist())


def test_pruning_changes_no_covered_text(whole, pruned):
    source = prune_vocabulary(tokenizer_json(), TEXTS)[1]
    assert len(pruned) < len(whole)
    ids, mask = pruned(TEXTS, 30)
    expected, _ = whole(TEXTS, 30)
    assert np.array_equal(np.where(mask, source[ids], whole.pad), expected)
    assert pieces(whole, expected)[1][:5] == ["[CLS]", "walk", "##ing", "a", "dog"]


def test_pruning_keeps_specials_and_letters_and_appends_dec_and_enc(pruned):
    source = prune_vocabulary(tokenizer_json(), TEXTS)[1]
    kept = pruned.stock.convert_ids_to_tokens(list(range(len(pruned))))
    assert kept[-2:] == ["[DEC]", "[ENC]"] and source[-2:].tolist() == [-1, -1]
    assert np.array_equal(source[:-2], np.sort(source[:-2])) and len(source) == len(pruned)
    assert {"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "z", "##z", "##ing"} <= set(kept)
    assert not {"[unused0]", "small", "##er", "蟹"} & set(kept)
    ids, _ = pruned(["small"], 30)  # not covered: letters, never [UNK]
    assert pieces(pruned, ids)[0] == ["[CLS]", "s", "##m", "##a", "##l", "##l", "[SEP]"]


def test_the_whole_vocabulary_keeps_its_ids(whole):
    source = prune_vocabulary(tokenizer_json())[1]
    assert source[:-2].tolist() == list(range(len(whole) - 2))
    assert (whole.dec, whole.enc) == (len(whole) - 2, len(whole) - 1)


def test_decoding_gives_the_cleaned_text_back(pruned):
    texts = ["a red crab", "a house-horse", "a dog's flag, the dog", "- a - dog"]
    ids, _ = pruned(texts, 30)
    ids[:, 0] = pruned.dec
    assert pruned.decode(ids) == ["a red crab", "a house-horse", "a dog's flag, the dog", "- a-dog"]


def test_decoding_stops_at_the_first_end(pruned):
    ids, _ = pruned(["a dog"], 30)
    assert pruned.decode([[*ids[0], *ids[0, 1:]]]) == ["a dog"]
    assert pruned.decode([]) == []


def test_a_saved_tokenizer_loads_as_ours_and_as_stock(pruned, tmp_path):
    pruned.save(tmp_path)
    loaded, stock = CaptionTokenizer.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    ids, mask = pruned(TEXTS, 30)
    assert np.array_equal(loaded(TEXTS, 30)[0], ids)
    batch = stock([clean_caption(text) for text in TEXTS], padding=True, return_tensors="np")
    assert np.array_equal(batch["input_ids"], ids) and np.array_equal(batch["attention_mask"], mask)
    assert set(batch) == {"input_ids", "attention_mask"}
    assert (stock.bos_token_id, stock.eos_token_id, stock.pad_token_id) == (pruned.dec, pruned.sep, pruned.pad)
    assert stock.convert_tokens_to_ids("[ENC]") == loaded.enc == pruned.enc


def test_a_tokenizer_without_our_tokens_is_refused(pruned, tmp_path):
    stock = AutoTokenizer.from_pretrained(_saved_without_enc(tmp_path))
    with pytest.raises(ValueError, match=r"\[DEC\].*prune_vocabulary"):
        CaptionTokenizer(stock)


def _saved_without_enc(folder):
    (folder / "tokenizer.json").write_bytes(tokenizer_json())
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return folder
