import numpy as np
import pytest

from blip_pipelines.evaluation import bootstrap
from blip_pipelines.evaluation.bootstrap import bootstrap_difference


def test_the_interval_is_that_of_the_mean():
    """For many samples the bootstrap of a mean is normal: mean +- 1.96 standard errors."""
    difference = np.random.default_rng(0).normal(0.3, 1.0, 400)
    old = np.random.default_rng(1).normal(size=400)
    found = bootstrap_difference(old + difference, old)
    error = difference.std() / np.sqrt(400)
    assert found.mean == pytest.approx(difference.mean())
    # A quantile of 10,000 draws is off by about 0.03 of a standard error; the skew of 400 samples by as much.
    assert found.low == pytest.approx(difference.mean() - 1.96 * error, abs=0.15 * error)
    assert found.high == pytest.approx(difference.mean() + 1.96 * error, abs=0.15 * error)


def test_what_both_find_hard_cancels():
    hard = np.random.default_rng(0).normal(0, 100, 50)
    found = bootstrap_difference(hard + 1, hard)
    assert found.low == pytest.approx(1)
    assert found.high == pytest.approx(1)
    assert found.is_better


def test_no_difference_is_not_better():
    scores = np.arange(10.0)
    assert not bootstrap_difference(scores, scores).is_better
    assert not bootstrap_difference(scores, scores[::-1]).is_better


def test_the_seed_decides_and_chunks_do_not(monkeypatch):
    new, old = np.random.default_rng(0).normal(size=(2, 30))
    first = bootstrap_difference(new, old, draws=200)
    assert bootstrap_difference(new, old, draws=200) == first
    assert bootstrap_difference(new, old, draws=200, seed=1) != first
    monkeypatch.setattr(bootstrap, "DRAW_ELEMENTS", 90)
    assert bootstrap_difference(new, old, draws=200) == first


def test_scores_that_do_not_pair_are_refused():
    with pytest.raises(ValueError, match="shapes"):
        bootstrap_difference(np.ones(3), np.ones(4))
    with pytest.raises(ValueError, match="shapes"):
        bootstrap_difference(np.ones(0), np.ones(0))
    with pytest.raises(ValueError, match="sample 1 "):
        bootstrap_difference(np.array([1.0, np.nan]), np.ones(2))
