import numpy as np
import pytest
import torch
from data_samples import WORDS, tokenizer_json
from model_samples import tiny_config, tiny_pixels

from blip_pipelines.config import ConfigError
from blip_pipelines.data.question_loader import QuestionTokens
from blip_pipelines.data.tokens import prune_vocabulary
from blip_pipelines.inference.generation import GenerationConfig
from blip_pipelines.inference.question_answering import MedAnswerConfig, MedAnswerer
from blip_pipelines.models.exports import STOCK, export_med
from blip_pipelines.models.med import Med
from blip_pipelines.models.question_answering import KIND, QuestionAnswering
from blip_pipelines.models.text import with_first

QUESTIONS = ["a red crab", "the small house of a dog", "flag"]
ANSWERS = ["crab", "red crab", "the house", "green", "blue flag of the dog", "dog"]


@pytest.fixture(scope="module")
def answerer():
    tokenizer = prune_vocabulary(tokenizer_json(), WORDS)[0]
    config = tiny_config(image_width=16, text_width=16)
    med = Med(type(config)(config.vision, config.text.fit(tokenizer), 8), seed=4)
    model = QuestionAnswering(med).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    return MedAnswerer(model, QuestionTokens(tokenizer, 12, 8), MedAnswerConfig())


def configured(answerer, **values):
    return MedAnswerer(answerer.model, answerer.tokens, MedAnswerConfig(**values))


def plain_score(answerer, pixels, question, answer):
    """The log-probability of one answer to one question, token by token."""
    model, tokenizer = answerer.model, answerer.tokens.tokenizer
    with torch.no_grad():
        asked = model.read_question(model.encode_image(pixels), *map(torch.from_numpy, tokenizer([question], 12)))
        ids = torch.from_numpy(tokenizer([answer], 8)[0])
        total = 0.0
        for end in range(1, ids.shape[1]):
            logits = model.decode_logits(ids[:, :end], None, asked)[0, -1]
            total += logits.log_softmax(-1)[ids[0, end]].item()
    return total


@pytest.mark.parametrize("batch_answers", [1, 4, 256])
def test_ranking_equals_a_plain_loop_over_candidates(answerer, batch_answers):
    pixels = tiny_pixels(3)
    candidates = [ANSWERS, ANSWERS[:2], ANSWERS[::-1]]
    ranking = configured(answerer, batch_answers=batch_answers)
    answered = ranking.answer(pixels[:, None], QUESTIONS, candidates)
    for row, (found, each) in enumerate(zip(answered, candidates, strict=True)):
        expected = [plain_score(answerer, pixels[row : row + 1], QUESTIONS[row], text) for text in each]
        np.testing.assert_allclose(found.scores, expected, atol=1e-4)
        assert found.text == each[int(np.argmax(expected))]


def test_many_candidates_are_chosen_by_their_first_token_and_scored_in_full_among_the_best(answerer):
    pixels = tiny_pixels(1)[:, None]
    full = answerer.answer(pixels, QUESTIONS[:1], [ANSWERS])[0].scores
    few = configured(answerer, rank_in_full=3).answer(pixels, QUESTIONS[:1], [ANSWERS])[0].scores
    kept = np.isclose(few, full, atol=1e-5)
    assert kept.sum() == 3 and few[~kept].max() < few[kept].min()
    first = np.array([plain_first(answerer, pixels[:, 0], QUESTIONS[0], text) for text in ANSWERS])
    assert set(np.argsort(-first, kind="stable")[:3]) == set(np.flatnonzero(kept))


def plain_first(answerer, pixels, question, answer):
    model, tokenizer = answerer.model, answerer.tokens.tokenizer
    with torch.no_grad():
        asked = model.read_question(model.encode_image(pixels), *map(torch.from_numpy, tokenizer([question], 12)))
        ids = torch.from_numpy(tokenizer([answer], 8)[0])
        return model.decode_logits(ids[:, :1], None, asked)[0, 0].log_softmax(-1)[ids[0, 1]].item()


def test_free_answers_are_those_of_stock_generation(answerer, tmp_path):
    tokenizer = answerer.tokens.tokenizer
    export_med(answerer.model, tmp_path, tokenizer, {"size": 8}, kinds=(KIND,))
    stock = STOCK[KIND].from_pretrained(tmp_path / KIND)
    writing = GenerationConfig("beam", beams=3, min_tokens=1, max_tokens=8)
    pixels = tiny_pixels(3)
    answered = configured(answerer, writing=writing).answer(pixels[:, None], QUESTIONS, [None] * 3)
    for row, question in enumerate(QUESTIONS):  # one at a time: stock attends to the padding of questions
        ids = with_first(torch.from_numpy(tokenizer([question], 12)[0]), tokenizer.enc)
        written = stock.generate(ids, pixels[row : row + 1], num_beams=3, max_length=8, min_length=1, do_sample=False)
        assert answered[row].text == tokenizer.decode(written[:, 1:].tolist())[0] and answered[row].scores is None


def test_open_and_closed_questions_may_be_mixed_and_do_not_depend_on_the_batch(answerer):
    pixels = tiny_pixels(3)[:, None]
    mixed = answerer.answer(pixels, QUESTIONS, [None, ANSWERS, None])
    assert mixed[1].scores is not None and mixed[0].scores is mixed[2].scores is None
    for row in range(3):
        one = slice(row, row + 1)
        (alone,) = answerer.answer(pixels[one], QUESTIONS[one], [[None, ANSWERS, None][row]])
        assert alone.text == mixed[row].text


def test_frames_of_a_video_are_read_in_a_row(answerer):
    pixels = tiny_pixels(2)
    once = answerer.answer(pixels[None, :1], QUESTIONS[:1], [ANSWERS])[0].scores
    same = answerer.answer(pixels[None, [0, 0]], QUESTIONS[:1], [ANSWERS])[0].scores
    other = answerer.answer(pixels[None], QUESTIONS[:1], [ANSWERS])[0].scores
    np.testing.assert_allclose(same, once, atol=1e-4)  # attention over every key twice is attention over it once
    assert np.abs(other - once).max() > 1e-3


@pytest.mark.parametrize("name", ["rank_in_full", "batch_answers"])
def test_counts_below_one_are_refused(name):
    with pytest.raises(ConfigError, match=f"{name}: 0 is below 1"):
        MedAnswerConfig(**{name: 0})
