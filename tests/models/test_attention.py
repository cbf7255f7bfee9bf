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
    visible = torch.tensor([True, True, False, True, False])
    before = attend(query, key, value, visible)
    with torch.no_grad():
        key[:, :, ~visible] += 100
        value[:, :, ~visible] -= 100
    torch.testing.assert_close(attend(query, key, value, visible), before, atol=0, rtol=0)


def test_a_query_that_sees_nothing_stays_finite():
    mixed = attend(*states(), torch.zeros(1, 1, 7, 5, dtype=torch.bool))
    mixed.sum().backward()
    assert mixed.isfinite().all()


def test_softmax_is_float32_in_bfloat16():
    """Scores of 256 equal keys: bfloat16 sums would stop growing at 256 and the weights would not add up to one."""
    query, key = torch.zeros(1, 1, 1, 8, dtype=torch.bfloat16), torch.zeros(1, 1, 1000, 8, dtype=torch.bfloat16)
    mixed = attend(query, key, torch.ones_like(key))
    assert mixed.dtype == torch.bfloat16
    torch.testing.assert_close(mixed, torch.ones_like(mixed), atol=2**-7, rtol=0)


def test_the_table_depends_on_device_and_shape_only():
    assert not is_fused("cpu", 14, 17)
    assert is_fused("cpu", 577, 577)
    assert is_fused("cuda", 1, 1)
