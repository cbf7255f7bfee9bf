import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from blip_pipelines.models.attention import attend, attend_explicitly, is_fused


def states(dtype=torch.float32, queries=7, keys=5):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(2, 3, length, 8, generator=generator).to(dtype).requires_grad_() for length in (queries, keys, keys)
    ]


@pytest.mark.parametrize("masked", [False, True])
def test_explicit_and_fused_give_the_same_values_and_gradients(masked):
    visible = torch.rand(2, 1, 7, 5, generator=torch.Generator().manual_seed(1)) < 0.6 if masked else None
    if visible is not None:
        visible[..., 0] = True
    results = []
    for way in (
        lambda *qkv: attend_explicitly(*qkv, visible, 0.0),
        lambda *qkv: scaled_dot_product_attention(*qkv, visible),
    ):
        query, key, value = states()
        mixed = way(query, key, value)
        mixed.square().sum().backward()
        results.append((mixed, query.grad, key.grad, value.grad))
    for explicit, fused in zip(*results, strict=True):
        torch.testing.assert_close(explicit, fused, atol=1e-5, rtol=1e-5)


def test_hidden_keys_do_not_move_the_result():
    query, key, value = states()
    visible = torch.tensor([[True, True, False, True, False]])
    before = attend(query, key, value, visible)
    with torch.no_grad():
        key[:, :, ~visible[0]] += 100
        value[:, :, ~visible[0]] -= 100
    torch.testing.assert_close(attend(query, key, value, visible), before, atol=0, rtol=0)


def test_half_precision_sums_its_weights_in_float32():
    """A thousand equal keys: a bfloat16 sum would stop growing at 256 and the weights would add up to four."""
    query = torch.zeros(1, 1, 1, 8, dtype=torch.bfloat16, requires_grad=True)
    key = torch.zeros(1, 1, 1000, 8, dtype=torch.bfloat16)
    mixed = attend(query, key, torch.ones_like(key))
    assert mixed.dtype == torch.bfloat16
    torch.testing.assert_close(mixed, torch.ones_like(mixed), atol=2**-7, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_query_that_sees_nothing_stays_finite(dtype):
    mixed = attend(*states(dtype), torch.zeros(1, 1, 7, 5, dtype=torch.bool))
    mixed.sum().backward()
    assert mixed.isfinite().all()


def test_half_precision_training_on_a_cpu_is_the_one_explicit_case():
    explicit = [
        (device, dtype, needs_gradient)
        for device in ("cpu", "cuda")
        for dtype in (torch.float64, torch.float32, torch.bfloat16)
        for needs_gradient in (False, True)
        if not is_fused(device, dtype, needs_gradient)
    ]
    assert explicit == [("cpu", torch.bfloat16, True)]
