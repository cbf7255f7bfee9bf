import math

import pytest
import torch

from blip_pipelines.objectives import language_modelling


def test_every_word_and_the_end_is_asked_for_but_no_prompt_and_no_padding():
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], dtype=torch.bool)
    assert language_modelling.target_positions(mask, 0).tolist() == [[True] * 4, [True, True, False, False]]
    assert language_modelling.target_positions(mask, 2).tolist() == [[False, False, True, True], [False] * 4]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_lm_equals_a_plain_float64_version_with_prompt_padding_and_smoothing(smoothing):
    generator = torch.Generator().manual_seed(0)
    vocabulary, prompt_tokens = 7, 1
    token_ids = torch.tensor([[5, 1, 2, 3, 6], [5, 1, 4, 6, 0], [5, 1, 6, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0], [1, 1, 1, 0, 0]], dtype=torch.bool)
    hidden = torch.randn(3, 4, 3, generator=generator, dtype=torch.float64)
    table = torch.randn(vocabulary, 3, generator=generator, dtype=torch.float64)

    total = 0.0
    for row in range(3):
        for t in range(4):
            if not mask[row, t + 1] or t + 1 <= prompt_tokens:
                continue
            logits = [sum(a * b for a, b in zip(hidden[row, t].tolist(), w, strict=True)) for w in table.tolist()]
            normaliser = math.log(sum(math.exp(x) for x in logits))
            for v in range(vocabulary):
                target = smoothing / vocabulary + (1 - smoothing) * (v == token_ids[row, t + 1].item())
                total -= target * (logits[v] - normaliser)

    seen = []

    def lm_head(hidden_RD):
        seen.append(len(hidden_RD))
        return hidden_RD @ table.T

    target = language_modelling.target_positions(mask, prompt_tokens)
    share = language_modelling.lm_share(hidden, token_ids, target, lm_head, 20, smoothing)
    assert share.item() == pytest.approx(total / 20, rel=1e-12)
    assert seen == [3 + 2 + 1]  # the widest product never sees padding


def test_a_part_without_targets_has_share_zero_and_a_gradient():
    hidden = torch.zeros(2, 0, 3, requires_grad=True)
    ids, mask = torch.tensor([[5], [5]]), torch.ones(2, 1, dtype=torch.bool)
    share = language_modelling.lm_share(
        hidden, ids, language_modelling.target_positions(mask, 0), torch.nn.Linear(3, 4), 0, 0.1
    )
    share.backward()
    assert share.item() == 0 and hidden.grad is not None


def test_logits_are_scored_in_float32_under_autocast():
    head = torch.nn.Linear(3, 4)
    ids, mask = torch.tensor([[3, 1, 2]]), torch.ones(1, 3, dtype=torch.bool)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        share = language_modelling.lm_share(
            torch.ones(1, 2, 3), ids, language_modelling.target_positions(mask, 0), head, 2, 0.1
        )
    assert share.dtype == torch.float32
