import pytest
import torch
from blip2_samples import tiny_image
from instruct_samples import ASKED, tiny_instructblip, tokens_of

from blip_pipelines.config import ConfigError
from blip_pipelines.inference.answering import AnswerConfig, Answerer
from blip_pipelines.inference.ranking import rank

KINDS = ["opt", "llama", "t5"]
GREEDY = AnswerConfig(beams=1, max_tokens=5, repetition_penalty=1.0)


def make(kind="llama", config=GREEDY, **model) -> Answerer:
    blip2 = tiny_instructblip(kind, **model)
    return Answerer(blip2, tokens_of(blip2), config)


@pytest.mark.parametrize("aware", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_with_candidates_are_ranked_and_the_others_written_each_as_if_alone(kind, aware):
    answerer = make(kind, prompt="chat", aware=aware)
    images, texts = tiny_image(4)[:, None], [*ASKED[:3], ASKED[4]]
    candidates = [["a red crab", "it", "the dog"], None, ["house", "it is"], None]
    found = answerer.answer(images, texts, candidates)
    for row in range(4):
        (alone,) = answerer.answer(images[row : row + 1], texts[row : row + 1], candidates[row : row + 1])
        assert alone.text == found[row].text
        if candidates[row]:
            assert found[row].text == candidates[row][found[row].scores.argmax()]
            assert alone.scores == pytest.approx(found[row].scores, abs=1e-4)
        else:
            assert found[row].scores is None


def test_frames_are_read_one_after_the_other_with_the_same_instruction():
    answerer = make()
    model, tokens = answerer.model, answerer.tokens
    frames = tiny_image(3)[None]
    read, question = tokens.for_language(["what is this ?"]), tokens.for_former(["what is this ?"])
    asked = [torch.from_numpy(part) for part in question[:2]]
    with torch.no_grad():
        soft = torch.cat([model.soft_prompts(model.see(frame[None]), *asked) for frame in frames[0]], 1)
        reading = model.read(soft, *(torch.from_numpy(part) for part in read[:2]))
    candidates = [["a red crab", "it", "the dog"]]
    (found,) = answerer.answer(frames, ["what is this ?"], candidates)
    expected = rank(model.language, reading, tokens, candidates)[0]
    assert soft.shape[1] == 3 * model.former.config.queries
    assert found.scores == pytest.approx(expected, abs=1e-5)
    (other,) = answerer.answer(frames.flip(1), ["what is this ?"], candidates)
    assert abs(other.scores - expected).max() > 1e-5


@pytest.mark.parametrize("per_token", [False, True])
def test_a_contrast_takes_off_what_candidates_score_without_the_picture(per_token):
    images, candidates = tiny_image(2)[:, None], [["a red crab", "it", "the dog"], None]
    plain, contrasted = (
        make(config=AnswerConfig(beams=1, max_tokens=5, per_token=per_token, contrast=contrast))
        for contrast in (0.0, 0.75)
    )
    seen, written = plain.answer(images, ASKED[:2], candidates)
    plain.model.encode_image = lambda pixels: torch.zeros_like(type(plain.model).encode_image(plain.model, pixels))
    blind = plain.answer(images, ASKED[:2], candidates)[0].scores
    found = contrasted.answer(images, ASKED[:2], candidates)
    assert found[0].scores == pytest.approx(seen.scores - 0.75 * blind, abs=1e-5)
    assert found[0].text == candidates[0][found[0].scores.argmax()]
    assert found[1].text == written.text
    assert abs(seen.scores - blind).max() > 1e-3  # without a picture they are others


def test_the_length_penalty_chooses_between_short_and_long():
    texts, free, images = list(ASKED), [None] * len(ASKED), tiny_image(len(ASKED))[:, None]
    lengths = []
    for penalty in (-3.0, 3.0):
        answers = make(config=AnswerConfig(beams=4, max_tokens=8, length_penalty=penalty)).answer(images, texts, free)
        lengths.append(sum(len(answer.text.split()) for answer in answers))
    assert lengths[0] < lengths[1]


def test_the_question_moves_scores_through_the_q_former_only_where_it_reads():
    """Of the same soft prompts and the same words to the language model, candidates have the same scores."""
    candidates = [["a red crab", "it", "the dog"]] * 2
    images = tiny_image(1).expand(2, -1, -1)[:, None]
    for aware in (True, False):
        answerer = make(aware=aware)
        answerer.tokens.for_language = lambda texts, real=answerer.tokens.for_language: real(["it"] * len(texts))
        one, other = answerer.answer(images, ["what is this ?", "a dog on the house"], candidates)
        assert (abs(one.scores - other.scores).max() > 1e-6) == aware


@pytest.mark.parametrize(
    "name, value", [("beams", 0), ("min_tokens", 0), ("max_tokens", 0), ("batch_answers", 0), ("contrast", -0.5)]
)
def test_settings_that_cannot_be_are_errors_that_name_them(name, value):
    with pytest.raises(ConfigError, match=f"{name}: {value}"):
        AnswerConfig(**{name: value})
