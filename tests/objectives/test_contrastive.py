import math

import pytest
import torch

from blip_pipelines.objectives import contrastive


def unit(generator, *shape):
    return torch.nn.functional.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def plain_loss(own, momentum, candidates, is_positive, is_candidate, temperature, alpha):
    """ITC of each row, one number at a time."""
    losses = []
    for i in range(len(own)):
        slots = [j for j in range(len(candidates)) if is_candidate[j]]
        online = {j: sum(own[i][k] * candidates[j][k] for k in range(len(own[i]))) / temperature for j in slots}
        believed = {j: sum(momentum[i][k] * candidates[j][k] for k in range(len(own[i]))) / temperature for j in slots}
        believed = {j: float(value.detach()) for j, value in believed.items()}
        normaliser = sum(math.exp(value) for value in believed.values())
        positives = [j for j in slots if is_positive[i][j]]
        loss = 0.0
        for j in slots:
            target = alpha * math.exp(believed[j]) / normaliser + (1 - alpha) * (j in positives) / len(positives)
            loss = loss - target * (online[j] - torch.logsumexp(torch.stack(list(online.values())), 0))
        losses.append(loss)
    return torch.stack(losses)


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_itc_equals_a_plain_float64_version_with_queue_soft_targets_and_several_positives(alpha):
    generator = torch.Generator().manual_seed(0)
    own, momentum, batch, queue = (unit(generator, rows, 5) for rows in (4, 4, 4, 6))
    queue[4:] = 0  # two slots were never written
    image_ids = torch.tensor([0, 1, 2, 0, 2, 9, 8, 7, -1, -1])  # rows 0 and 3: one image; row 2 again in the queue
    text_ids = torch.tensor([0, 1, 2, 3, 4, 1, 6, 5, -1, -1])  # row 1's text again in the queue, with another image
    is_candidate = image_ids >= 0
    is_positive = contrastive.positives(image_ids[:4], text_ids[:4], image_ids, text_ids)
    assert is_positive.nonzero().tolist() == [[0, 0], [0, 3], [1, 1], [1, 5], [2, 2], [2, 4], [3, 0], [3, 3]]

    results = []
    for loss_of in (contrastive.contrast, plain_loss):
        leaf, tau = own.clone().requires_grad_(), torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
        candidates = [batch, queue] if loss_of is contrastive.contrast else torch.cat([batch, queue])
        loss = loss_of(leaf, momentum, candidates, is_positive, is_candidate, tau, alpha)
        loss = loss[0] if isinstance(loss, tuple) else loss
        assert loss.dtype == torch.float64
        results.append((loss.detach(), *torch.autograd.grad(loss.sum(), [leaf, tau])))
    # Sums of 8 exponentials in float64: a few hundred ulp are a wide bound.
    for fast, plain in zip(*results, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-12, atol=1e-12)


def test_gradient_reaches_candidates_that_carry_one():
    generator = torch.Generator().manual_seed(0)
    own, others = unit(generator, 3, 4), unit(generator, 3, 4).requires_grad_()
    eye = torch.eye(3, dtype=torch.bool)
    loss, _ = contrastive.contrast(own, own, [others], eye, torch.ones(3, dtype=torch.bool), torch.tensor(0.1), 0.0)
    loss.sum().backward()
    expected = ((own @ others.detach().T / 0.1).softmax(1) - eye.double()).T @ own / 0.1
    torch.testing.assert_close(others.grad, expected, rtol=1e-6, atol=1e-6)  # 0.1 is float32


def test_similarities_stay_float32_under_autocast():
    generator = torch.Generator().manual_seed(0)
    own, others = unit(generator, 4, 64).float(), unit(generator, 4, 64).float()
    expected = own.double() @ others.double().T / 0.07
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = contrastive.similarities(own, [others], torch.tensor(0.07))
        assert (own @ others.T).dtype == torch.bfloat16  # what would have happened
    assert found.dtype == torch.float32
    # bfloat16 keeps 8 bits: its error would be near 2**-9 of 1 / 0.07.
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2**-18 / 0.07)


def test_a_lone_pair_has_loss_zero():
    row = torch.ones(1, 4).div(2).requires_grad_()
    yes = torch.ones(1, 1, dtype=torch.bool)
    loss, _ = contrastive.contrast(row, row, [row], yes, yes[0], torch.tensor(0.07), 0.4)
    loss.sum().backward()
    assert loss.item() == 0 and not row.grad.any()


def test_alpha_rises_linearly_and_stays():
    assert [contrastive.soft_share(step, 0.4, 10) for step in (0, 5, 10, 99)] == [0, 0.2, 0.4, 0.4]
    assert contrastive.soft_share(0, 0.4, 0) == 0.4
