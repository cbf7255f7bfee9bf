import time

import numpy as np
import pytest

from blip_pipelines.data.order import Order, draw

SHARDS = (5, 0, 7, 1, 30, 4)


@pytest.mark.parametrize("window_shards", [1, 2, 4, 100])
@pytest.mark.parametrize("epoch", [0, 3])
def test_an_epoch_holds_every_row_once(window_shards, epoch):
    order = Order(SHARDS, seed=1, window_shards=window_shards)
    assert len(order) == 47
    assert sorted(order.rows(47 * epoch, 47)) == list(range(47))


def test_rows_are_a_function_of_position_alone():
    whole = Order(SHARDS, 1, 2).rows(0, 200)
    order = Order(SHARDS, 1, 2)
    for start, count in [(190, 10), (0, 1), (40, 20), (3, 150), (46, 1), (47, 1), (5, 0)]:
        assert np.array_equal(order.rows(start, count), whole[start : start + count])


def test_epochs_and_seeds_differ():
    order = Order(SHARDS, 1, 2)
    assert not np.array_equal(order.rows(0, 47), order.rows(47, 47))
    assert not np.array_equal(order.rows(0, 47), Order(SHARDS, 2, 2).rows(0, 47))
    assert np.array_equal(order.rows(0, 47), Order(SHARDS, 1, 2).rows(0, 47))


def test_rows_mix_within_a_window_and_never_beyond():
    order = Order((10,) * 12, seed=4, window_shards=3)
    rows = order.rows(0, 120)
    for window in range(4):
        shards = rows[30 * window : 30 * (window + 1)] // 10
        assert len(set(shards)) == 3
        assert np.abs(np.diff(shards)).max() > 0 and len(set(shards[:10])) > 1
    assert len({tuple(sorted(set(rows[30 * w : 30 * w + 30] // 10))) for w in range(4)}) == 4


def test_cost_follows_the_window_not_the_set():
    order = Order((10_000,) * 20_000, seed=0, window_shards=4)  # 200 million rows
    start = time.perf_counter()
    rows = order.rows(123_456_789, 600)
    assert time.perf_counter() - start < 1.0  # a permutation of all rows takes tens of seconds
    assert len(set(rows)) == 600
    for position in range(0, 10_000_000, 1_000_000):
        order.rows(position, 600)
    assert len(order._windows) <= 4


def test_nothing_to_order_is_said():
    with pytest.raises(ValueError, match="no rows"):
        Order((0, 0), 0, 1)
    with pytest.raises(ValueError, match="at least 1"):
        Order((3,), 0, 0)


@pytest.mark.parametrize("count", [1, 4, 5, 29])
def test_a_draw_depends_on_its_row_not_on_who_asks(count):
    whole = draw(7, 3, "view", 0, 64, count)
    assert whole.shape == (64, count)
    assert np.array_equal(draw(7, 3, "view", 20, 10, count), whole[20:30])
    for other in (draw(8, 3, "view", 0, 64, count), draw(7, 4, "view", 0, 64, count), draw(7, 3, "crop", 0, 64, count)):
        assert not np.isin(other, whole).any()


def test_draws_are_uniform():
    draws = draw(0, 0, "test", 0, 4_000, 5)
    assert draws.min() >= 0 and draws.max() < 1
    # Standard deviation of a column's mean is 1 / sqrt(12 * 4000) = 0.0046; five of them bound all five columns.
    assert np.abs(draws.mean(0) - 0.5).max() < 5 * 0.0046


def test_the_stream_is_pinned():
    """Resuming after an update of NumPy must go on in the same order."""
    assert Order((6, 6), 0, 2).rows(0, 12).tolist() == PINNED_ROWS
    assert draw(0, 0, "view", 0, 1)[0, 0] == PINNED_DRAW


PINNED_ROWS = [0, 2, 5, 11, 4, 9, 3, 10, 6, 7, 8, 1]
PINNED_DRAW = 0.7008911026932894
