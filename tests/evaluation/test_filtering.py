import numpy as np
import pyarrow as pa
import pytest

from blip_pipelines.data.composition import REPEATS
from blip_pipelines.evaluation.filtering import (
    filter_metrics,
    measure_capfilt,
    roc_auc,
    synthetic_metrics,
    token_f1,
)

PROBABILITY = np.array([0.9, 0.8, 0.4, 0.6, 0.2, 0.1], np.float32)
KEPT = PROBABILITY > 0.5
KINDS = ["clean", "clean", "clean", "swap", "swap", "file_name"]


def test_roc_auc_is_the_share_of_pairs_in_the_right_order_with_ties_half():
    assert roc_auc(np.array([3.0, 1.0]), np.array([0.0, 1.0, 2.0])) == pytest.approx((3 + 1 + 0.5) / 6)
    assert np.isnan(roc_auc(np.array([]), np.array([1.0])))


def test_roc_auc_equals_counting_every_pair():
    draw = np.random.default_rng(0)
    right, wrong = draw.integers(0, 9, 40).astype(float), draw.integers(0, 7, 30).astype(float)
    counted = np.mean([(r > w) + 0.5 * (r == w) for r in right for w in wrong])
    assert roc_auc(right, wrong) == pytest.approx(counted, abs=1e-12)


def test_filter_metrics_by_hand():
    """Dropped are the clean .4, the swap .2 and the file name .1; kept the clean .9 and .8 and the swap .6."""
    assert filter_metrics(PROBABILITY, KEPT, KINDS) == {
        "filter_roc_auc": pytest.approx(8 / 9),
        "filter_roc_auc_swap": pytest.approx(5 / 6),
        "filter_roc_auc_file_name": 1.0,
        "filter_precision": pytest.approx(2 / 3),
        "filter_recall": pytest.approx(2 / 3),
        "filter_recall_swap": 0.5,
        "filter_recall_file_name": 1.0,
        "web_purity_before": 0.5,
        "web_purity_after": pytest.approx(2 / 3),
    }


def test_what_cannot_be_measured_is_left_out():
    found = filter_metrics(PROBABILITY[:2], KEPT[:2], KINDS[:2])
    assert found == {"web_purity_before": 1.0, "web_purity_after": 1.0}


def test_token_f1_counts_repeated_words_once_for_each_time():
    assert token_f1(["a", "red", "dog"], ["a", "dog", "dog"]) == pytest.approx(2 / 3)
    assert token_f1(["a"], ["a", "red", "dog"]) == pytest.approx(0.5)
    assert (token_f1([], ["a"]), token_f1([], [])) == (0, 1)


def test_synthetic_captions_are_held_against_the_nearest_truth():
    captions, truths = ["A red dog.", "a blue cat", "a tree"], [["a red dog"], ["a dog", "a cat"], ["the moon"]]
    found = synthetic_metrics(captions, truths, np.array([True, True, False]))
    assert found == {
        "synthetic_exact": pytest.approx(1 / 3),
        "synthetic_token_f1": pytest.approx((1 + 4 / 5 + 0) / 3),
        "synthetic_exact_passed": 0.5,
        "synthetic_token_f1_passed": pytest.approx(0.9),
    }


def table(*rows):
    names = ("key", "caption", "origin", "match_probability", "kept", "reason")
    return pa.Table.from_pylist([dict(zip(names, (*row, *[""] * (6 - len(row))), strict=True)) for row in rows])


NOISE = pa.Table.from_pylist(
    [
        {"key": "k0", "member": "0.png", "caption": "a dog", "kind": "clean", "truth": "a dog"},
        {"key": "k1", "member": "1.png", "caption": "a house", "kind": "swap", "truth": "a cat"},
    ]
)


def test_decided_rows_are_joined_with_the_noise_by_image_and_caption():
    decided = table(
        ("k0", "a dog", "web", 0.9, True),
        ("k1", "a house", "web", 0.2, False),
        ("k2", "a house", "web", 0.1, False),  # nobody knows about it
        ("k1", "a cat", "synthetic", 0.8, True),
        ("k0", "a house", "synthetic", 0.3, False),
    )
    found = measure_capfilt(decided, NOISE)
    assert (found["filter_roc_auc"], found["filter_precision"], found["filter_recall"]) == (1, 1, 1)
    assert (found["web_purity_before"], found["web_purity_after"]) == (0.5, 1)
    assert (found["synthetic_exact"], found["synthetic_exact_passed"]) == (0.5, 1)


def test_a_caption_that_only_repeats_a_kept_one_has_passed_the_filter():
    decided = table(("k0", "a dog", "synthetic", 0.9, False, REPEATS), ("k1", "a fish", "synthetic", 0.1, False))
    found = measure_capfilt(decided, NOISE)
    assert (found["synthetic_exact"], found["synthetic_exact_passed"]) == (0.5, 1)


def test_a_corpus_of_unknown_noise_has_no_measures():
    decided = table(("k0", "a dog", "web", 0.9, True), ("k0", "a cat", "synthetic", 0.8, True))
    assert measure_capfilt(decided, NOISE.slice(0, 0)) == {}
