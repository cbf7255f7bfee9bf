import numpy as np
import pytest
from blip2_samples import SPOKEN, spoken_tokenizer
from instruct_samples import caption_tokenizer

from blip_pipelines.config import ConfigError
from blip_pipelines.data.instruction_tokens import InstructionPlace, InstructionTokens, TokenLimits
from blip_pipelines.data.language_tokens import LanguageTokenizer

TEXTS = ["what is this ?", "is it a big dog on the house ?", ""]


def ids(*words):
    return [SPOKEN.index(word) for word in words]


@pytest.fixture(scope="module")
def former():
    return caption_tokenizer()


def make(former, limits=None, place=None):
    spoken = LanguageTokenizer(spoken_tokenizer())
    return InstructionTokens(spoken, place or InstructionPlace(), former, limits or TokenLimits())


def rows(found):
    assert found.ids.shape == found.mask.shape and found.ids.dtype == np.int64
    assert not (found.mask[:, 1:] & ~found.mask[:, :-1]).any()  # right padded
    return [row[kept].tolist() for row, kept in zip(found.ids, found.mask, strict=True)]


def test_a_long_instruction_loses_its_beginning_but_never_what_the_prompt_puts_around_it(former):
    place = InstructionPlace(tuple(ids("picture", ":")), tuple(ids("<turn>")))
    found = make(former, TokenLimits(instruction=4), place).for_language(TEXTS)
    assert rows(found) == [
        ids("picture", ":", "what", "is", "this", "?", "<turn>"),
        ids("picture", ":", "on", "the", "house", "?", "<turn>"),
        ids("picture", ":", "<turn>"),
    ]
    assert found.cut.tolist() == [0, 5, 0]


def test_the_q_former_keeps_its_marks_and_the_end_of_the_text(former):
    found = make(former, TokenLimits(question=5)).for_former(TEXTS)
    words = former.pieces(["is this ?", "the house ?", ""])
    assert rows(found) == [[former.cls, *row, former.sep] for row in words]
    assert found.cut.tolist() == [1, 6, 0]


def test_a_long_answer_loses_its_end_but_not_the_token_that_ends_it(former):
    found = make(former, TokenLimits(answer=4)).for_answers(["a red crab", "it", ""])
    assert rows(found) == [ids("<s>", "a", "red", "</s>"), ids("<s>", "it", "</s>"), ids("<s>", "</s>")]
    assert found.cut.tolist() == [1, 0, 0]


def test_answers_keep_their_case_and_marks(former):
    tokens = make(former)
    assert rows(tokens.for_answers(["A"]))[0] == ids("<s>", "<unk>", "</s>")
    assert rows(tokens.for_answers(["this ?"]))[0] == ids("<s>", "this", "?", "</s>")


def test_blanks_before_an_instruction_are_part_of_its_first_word(former):
    seen = []
    tokens = make(former, place=InstructionPlace(lead=" "))
    tokens.language.pieces = lambda texts: seen.extend(texts) or [[] for _ in texts]
    tokens.for_language(["what"])
    assert seen == [" what"]


def test_limits_without_room_for_a_word_are_errors_that_name_them():
    for name, value in ("instruction", 0), ("question", 2), ("answer", 2):
        with pytest.raises(ConfigError, match=f"limits.{name}: {value}"):
            TokenLimits(**{name: value})
