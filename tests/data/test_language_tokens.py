import numpy as np
import pytest
from blip2_samples import SPOKEN, spoken_tokenizer

from blip_pipelines.data.language_tokens import LanguageTokenizer


def ids(*words):
    return [SPOKEN.index(word) for word in words]


def test_texts_become_start_words_end_and_padding():
    tokenizer = LanguageTokenizer(spoken_tokenizer())
    found, mask = tokenizer(["A red CRAB!", "the house on the house"], 6)
    assert found.tolist() == [
        ids("<s>", "a", "red", "crab", "</s>", "<pad>"),
        ids("<s>", "the", "house", "on", "the", "</s>"),
    ]
    assert mask.sum(1).tolist() == [5, 6]
    assert found.dtype == np.int64 and mask.dtype == bool


def test_a_prompt_stands_before_the_words_and_is_counted():
    tokenizer = LanguageTokenizer(spoken_tokenizer())
    found, _ = tokenizer(["crab"], 10, "a picture of ")
    assert found[0].tolist() == ids("<s>", "a", "picture", "of", "crab", "</s>")
    assert tokenizer.prompt_tokens("a picture of ") == 3
    assert tokenizer.prompt_tokens("") == 0


def test_end_and_start_can_be_others_than_the_models():
    tokenizer = LanguageTokenizer(spoken_tokenizer(), end=":", start=0)
    assert tokenizer(["crab"], 10)[0][0].tolist() == ids("<pad>", "crab", ":")
    assert tokenizer.decode([ids("crab", ":", "dog", "</s>")]) == ["crab"]


def test_answers_can_be_left_uncleaned():
    raw = LanguageTokenizer(spoken_tokenizer(), clean=None)
    assert raw(["a :"], 10)[0][0].tolist() == ids("<s>", "a", ":", "</s>")


def test_decoding_stops_at_the_end_and_leaves_specials_out():
    tokenizer = LanguageTokenizer(spoken_tokenizer())
    assert tokenizer.decode([ids("<s>", "a", "dog", "</s>", "house"), ids("crab")]) == ["a dog", "crab"]


def test_a_prompt_is_split_at_the_picture_with_and_without_chat():
    tokenizer = LanguageTokenizer(spoken_tokenizer())
    assert tokenizer.around_image("picture : {image} a") == ("picture : ", " a")
    before, after = tokenizer.around_image("what is {image} ?", chat=True)
    assert tokenizer.prompt_ids(before) == ids("<user>", "what", "is")
    assert tokenizer.prompt_ids(after) == ids("?", "<turn>")


@pytest.mark.parametrize("prompt", ["a picture", "{image} and {image}"])
def test_a_prompt_that_does_not_mark_the_picture_once_is_refused(prompt):
    with pytest.raises(ValueError, match="once"):
        LanguageTokenizer(spoken_tokenizer()).around_image(prompt)


def test_chat_without_a_template_is_refused():
    stock = spoken_tokenizer()
    stock.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        LanguageTokenizer(stock).around_image("{image}", chat=True)


def test_saved_and_loaded_it_says_the_same(tmp_path):
    LanguageTokenizer(spoken_tokenizer()).save(tmp_path)
    loaded = LanguageTokenizer.load(tmp_path, end=":")
    assert loaded(["a dog"], 10)[0][0].tolist() == ids("<s>", "a", "dog", ":")
