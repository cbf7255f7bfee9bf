import time

import numpy as np
import pytest
from instruction_samples import letters, open_letters

from blip_pipelines.config import ConfigError
from blip_pipelines.data.mixture import InstructionOrder

SIZES = {"large": 9000, "small": 100, "odd": 400}


def order(multipliers=None, seed=0, sizes=SIZES):
    starts = np.cumsum([0, *sizes.values()])
    rows = {name: np.arange(*starts[number : number + 2]) for number, name in enumerate(sizes)}
    return InstructionOrder((int(starts[-1]),), rows, multipliers or {}, seed)


def data_sets_of(rows):
    return np.searchsorted(np.cumsum(list(SIZES.values())), rows, side="right")


def test_data_sets_are_drawn_in_proportion_to_the_root_of_their_rows_times_the_multiplier():
    mixed = order({"small": 2.0})
    weights = np.array([9000**0.5, 2 * 100**0.5, 400**0.5])
    expected = weights / weights.sum()
    assert list(mixed.probabilities.values()) == pytest.approx(expected)
    counts = np.bincount(data_sets_of(mixed.rows(0, 20_000)), minlength=3)
    deviation = np.sqrt(20_000 * expected * (1 - expected))
    assert (np.abs(counts - 20_000 * expected) < 4 * deviation).all()
    assert list(mixed.shares(20_000).values()) == pytest.approx(counts / 20_000)


def test_rows_are_a_function_of_seed_and_position_alone():
    whole = order(seed=3).rows(0, 3000)
    resumed = order(seed=3)
    for start, count in [(2900, 100), (0, 1), (1234, 700), (3, 2000), (5, 0)]:
        assert np.array_equal(resumed.rows(start, count), whole[start : start + count])
    assert not np.array_equal(order(seed=4).rows(0, 3000), whole)


def test_ranks_and_micro_batches_split_one_stream():
    whole = order().rows(0, 960)
    ranks = [[order().rows(start + 48 * rank, 48) for start in range(0, 960, 96)] for rank in (0, 1)]
    assert np.array_equal(np.concatenate([np.concatenate(pair) for pair in zip(*ranks, strict=True)]), whole)


def test_within_a_data_set_every_row_comes_once_before_any_comes_twice():
    rows = order().rows(0, 20_000)
    small = rows[data_sets_of(rows) == 1]
    assert len(small) > 300
    for epoch in range(3):
        assert sorted(small[100 * epoch : 100 * (epoch + 1)]) == list(range(9000, 9100))
    assert not np.array_equal(small[:100], small[100:200])


def test_a_multiplier_of_zero_leaves_a_data_set_out():
    mixed = order({"large": 0.0, "odd": 0.0})
    assert set(data_sets_of(mixed.rows(0, 1000))) == {1}
    assert mixed.probabilities == {"large": 0.0, "small": 1.0, "odd": 0.0}


def test_a_late_position_of_a_large_mixture_is_found_in_time():
    mixed = order(sizes={"web": 2_000_000, "small": 4000})
    start = time.perf_counter()
    mixed.rows(10_000_000, 192)
    assert time.perf_counter() - start < 5


def test_a_wrong_mixture_is_refused_by_name():
    with pytest.raises(ConfigError, match="no data set 'medium' to train on; there are: large, small, odd"):
        order({"medium": 1.0})
    with pytest.raises(ConfigError, match="multiplier 0"):
        order(dict.fromkeys(SIZES, 0.0))


def test_the_order_of_a_view_has_its_rows_and_its_multipliers(tmp_path):
    names = {"letters": letters(multiplier=3.0), "again": letters(), "unseen": letters(role="held_out")}
    view = open_letters(tmp_path, [8, 12], **names).select(split="train")
    mixed = InstructionOrder.of(view, seed=1)
    assert mixed.shard_rows == view.shard_rows and len(mixed) == len(view) == 30
    assert mixed.probabilities == pytest.approx({"again": 0.25, "letters": 0.75})
    drawn = view.column("data_set")[mixed.rows(0, 400)]
    assert 60 < (drawn == "again").sum() < 140
    assert set(mixed.rows(0, 400)) == set(range(30))
