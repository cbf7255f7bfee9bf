import numpy as np
import pytest
import torch
from data_samples import tokenizer_json
from instruction_samples import letters, open_letters
from question_samples import ANSWERS, batch, make_task, part

from blip_pipelines.config import ConfigError
from blip_pipelines.data.loader import DecodedPixels
from blip_pipelines.data.mixture import InstructionOrder
from blip_pipelines.data.question_loader import QuestionLoader, QuestionTokens, assemble
from blip_pipelines.data.tokens import prune_vocabulary
from blip_pipelines.data.transforms import ImageConfig
from blip_pipelines.objectives.question_answering import AnswerLossConfig


def test_the_loss_is_the_weighted_likelihood_of_all_answers_of_a_question():
    task, whole = make_task(label_smoothing=0.0), batch()
    found = task(whole, 0)
    expected = 0.0
    for answer, of in enumerate(whole.question_of.tolist()):
        row = slice(of, of + 1)
        words = int(whole.token_mask[answer].sum())
        question_words = int(whole.question_mask[of].sum())
        ids = whole.token_ids[answer : answer + 1, :words]
        with torch.no_grad():
            question = task.model.read_question(
                task.model.encode_image(whole.pixels[row]),
                whole.question_ids[row, :question_words],
                whole.question_mask[row, :question_words],
            )
            logits = task.model.decode_logits(ids[:, :-1], None, question)[0]
        likelihood = logits.log_softmax(-1).gather(1, ids[0, 1:, None]).sum()
        expected -= float(whole.weights[answer]) * float(likelihood) / len(ANSWERS)
    assert found["loss"].item() == pytest.approx(expected, rel=1e-9)
    assert found["lm"].item() == found["loss"].item() and not found["lm"].requires_grad


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_and_micro_steps_add_up_to_the_whole_with_its_gradient(ranks):
    def losses_and_gradient(batches):
        task = make_task()
        total = sum(task(each, 0)["loss"] for each in batches)
        total.backward()
        return total.item(), torch.cat([p.grad.flatten() for p in task.parameters() if p.grad is not None])

    one, gradient = losses_and_gradient([batch()])
    split, gradient_split = losses_and_gradient([part(batch(), rank, ranks) for rank in range(ranks)])
    assert split == pytest.approx(one, rel=1e-10)
    torch.testing.assert_close(gradient_split, gradient, rtol=1e-7, atol=1e-10)
    halves, _ = losses_and_gradient([batch(micro_steps=2), batch(micro_steps=2)])
    assert halves == pytest.approx(one, rel=1e-10)


def test_only_answers_are_asked_for():
    task, whole = make_task(), batch()
    loss = task(whole, 0)["loss"].item()
    ids, mask = whole.token_ids.clone(), whole.token_mask
    ids[~mask] = 7  # padding of answers
    ids[:, 0] = 9  # what stands at the place of [DEC]
    questions = whole.question_ids.clone()
    questions[~whole.question_mask] = 7
    changed = type(whole)(**{**vars(whole), "token_ids": ids, "question_ids": questions})
    assert task(changed, 0)["loss"].item() == pytest.approx(loss, rel=1e-12)


def test_per_token_an_answer_counts_whatever_its_length():
    whole = batch()
    tokens = whole.token_mask[:, 1:].sum(1)
    by_hand = type(whole)(**{**vars(whole), "weights": whole.weights / tokens})
    expected = make_task()(by_hand, 0)["loss"].item()
    assert make_task(per_token=True)(whole, 0)["loss"].item() == pytest.approx(expected)


def test_a_heavier_answer_pulls_harder():
    task, whole = make_task(label_smoothing=0.0), batch()
    double = type(whole)(**{**vars(whole), "weights": whole.weights * 2})
    assert task(double, 0)["loss"].item() == pytest.approx(2 * task(whole, 0)["loss"].item())


def test_smoothing_outside_its_range_is_refused():
    with pytest.raises(ConfigError, match=r"objective\.label_smoothing: 1\.5"):
        AnswerLossConfig(1.5)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    other = letters(answer="{letter} house", weight=0.5)
    return open_letters(tmp_path_factory.mktemp("rows"), [12, 8], letters=letters(), other=other).select(split="train")


def loader(rows, ranks=1, rank=0, accumulation=1, start=0, workers=0):
    words = ["which letter name the house of a dog b c d"]
    tokens = QuestionTokens(prune_vocabulary(tokenizer_json(), words)[0], 20, 6)
    order, images = InstructionOrder.of(rows, seed=2), DecodedPixels(rows, ImageConfig(size=16))
    return QuestionLoader(rows, order, images, tokens, 8, accumulation, rank, ranks, 3, start, workers), tokens


def test_ranks_share_the_questions_of_one_stream(rows):
    whole, tokens = list(loader(rows)[0]), loader(rows)[1]
    halves = [list(loader(rows, ranks=2, rank=rank)[0]) for rank in (0, 1)]
    for step, (entire,) in enumerate(whole):
        assert entire.samples == 8 and entire.question_ids.shape[0] == 8
        parts = [half[step][0] for half in halves]
        assert torch.equal(torch.cat([each.pixels for each in parts]), entire.pixels)
        assert torch.equal(torch.cat([each.weights for each in parts]), entire.weights)
        texts = [tokens.tokenizer.decode(each.token_ids[:, 1:].tolist()) for each in parts]
        assert [*texts[0], *texts[1]] == tokens.tokenizer.decode(entire.token_ids[:, 1:].tolist())
    again = list(loader(rows, start=2)[0])
    assert torch.equal(again[0][0].question_ids, whole[2][0].question_ids)
    (first, second), *_ = loader(rows, accumulation=2)[0]
    assert first.samples == second.samples == 8 and len(first.rows) == 4


def test_weights_are_shares_of_the_annotators_times_that_of_the_row(rows):
    tokens = loader(rows)[1]
    asked = np.array([0, 1])
    answered = assemble(rows, tokens, asked, np.zeros((2, 1)), samples=2)
    assert sorted(answered.weights.tolist()) == [0.5, 1.0]
    assert answered.question_of.tolist() == [0, 1]
