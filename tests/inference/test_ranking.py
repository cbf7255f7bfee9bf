import pytest
import torch
from blip2_samples import tiny_image
from instruct_samples import ASKED, tiny_instructblip, tokens_of

from blip_pipelines.inference.ranking import rank
from blip_pipelines.models.language import LanguageModel

KINDS = ["opt", "llama", "t5"]
CANDIDATES = [["a red crab", "it", "the big dog on it"], ["what", "house"], [], ["a"], ["it", "dog", "house", "is it"]]


def read(model, rows):
    tokens = tokens_of(model)
    texts = [ASKED[row] for row in rows]
    instruction, question = tokens.for_language(texts), tokens.for_former(texts)
    ids, mask, question_ids, question_mask = map(torch.from_numpy, (*instruction[:2], *question[:2]))
    with torch.no_grad():
        soft = model.soft_prompts(model.see(tiny_image(len(rows))), question_ids, question_mask)
    return soft, ids, mask, tokens


def plain_scores(model, row, candidates, soft, ids, mask, tokens, per_token):
    """One candidate at a time, by the stock forward over everything that is read."""
    language, stock, scores = model.language, model.language.model, []
    before = language.embed(torch.tensor(model.before_ids, dtype=torch.long))
    prefix = torch.cat([before, soft[row], language.embed(ids[row][mask[row]])])[None]
    for text in candidates:
        words = torch.from_numpy(tokens.for_answers([text]).ids)
        labels = words[:, 1:]
        if language.decoder_only:
            inputs = torch.cat([prefix, language.embed(labels[:, :-1])], 1)
            logits = stock(inputs_embeds=inputs).logits[:, prefix.shape[1] - 1 :]
        else:
            logits = stock(inputs_embeds=prefix, decoder_input_ids=words[:, :-1]).logits
        gained = logits.log_softmax(-1).gather(2, labels[..., None])
        scores.append((gained.mean() if per_token else gained.sum()).item())
    return scores


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("prompt", ["plain", "chat"])
@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_a_plain_loop_over_candidates(kind, prompt, per_token):
    model = tiny_instructblip(kind, prompt)
    soft, ids, mask, tokens = read(model, range(5))
    assert not mask.all()
    for batch_answers in (3, 64):
        reading = model.read(soft, ids, mask)
        found = rank(model.language, reading, tokens, CANDIDATES, per_token=per_token, batch_answers=batch_answers)
        for row, candidates in enumerate(CANDIDATES):
            expected = plain_scores(model, row, candidates, soft, ids, mask, tokens, per_token)
            assert found[row].tolist() == pytest.approx(expected, abs=1e-4), (row, batch_answers)


@pytest.mark.parametrize("kind", KINDS)
def test_picture_and_instruction_are_read_once(kind, monkeypatch):
    model = tiny_instructblip(kind, "chat")
    soft, ids, mask, tokens = read(model, range(5))
    lengths, part = [], model.language.model.get_encoder() if kind == "t5" else model.language.model.base_model
    real = part.forward

    def watched(*arguments, inputs_embeds=None, **rest):
        lengths.append(inputs_embeds.shape[:2].numel())
        return real(*arguments, inputs_embeds=inputs_embeds, **rest)

    model.language.model.eval()
    monkeypatch.setattr(part, "forward", watched)
    rank(model.language, model.read(soft, ids, mask), tokens, CANDIDATES, batch_answers=3)
    before = len(model.before_ids)
    if kind == "t5":
        assert lengths == [5 * (before + soft.shape[1] + ids.shape[1])]
    else:  # the prompt's first part, then the rest but for the last token, then nothing of it but that token
        assert lengths[:2] == [before, 5 * (soft.shape[1] + ids.shape[1] - 1)]
        words = sum(len(tokens.for_answers([text]).ids[0]) - 2 for each in CANDIDATES for text in each)
        assert sum(lengths[2:]) <= 2 * (words + sum(map(len, CANDIDATES)))


def test_the_mean_over_tokens_favours_long_candidates():
    model = tiny_instructblip("llama")
    soft, ids, mask, tokens = read(model, [0])
    reading, both = model.read(soft, ids, mask), [["it", "it is the big dog on the house and it is small"]]
    total, mean = (rank(model.language, reading, tokens, both, per_token=each)[0] for each in (False, True))
    assert total[0] > total[1]
    assert mean[0] - mean[1] < total[0] - total[1]


@pytest.mark.parametrize("kind", ["opt", "llama"])
def test_a_prefix_of_one_token_is_read_too(kind):
    language: LanguageModel = tiny_instructblip(kind).language
    prefix = torch.randn(2, 1, language.width, generator=torch.Generator().manual_seed(0))
    ids = torch.from_numpy(language.tokenizer(["a red crab", "it"], 9)[0])
    reading = language.read(prefix)
    torch.testing.assert_close(
        language.ask(reading, ids)[:, :2], language.hidden(prefix, ids)[:, :2], atol=1e-5, rtol=0
    )
