from typing import get_args

import numpy as np
import pytest

from blip_pipelines.data.questions import Metric
from blip_pipelines.evaluation.question_answering import (
    ACCURACIES,
    METRICS,
    Answered,
    area_under_roc,
    exact_match,
    ivqa_accuracy,
    reciprocal_rank,
    vqa_accuracy,
)
from blip_pipelines.evaluation.vqa_normalisation import normalise, normalise_punctuation

TEN = ["red"] * 3 + ["dark red"] * 2 + ["blue"] * 5


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("The Red ball", "red ball"),
        ("a An the", ""),
        ("two dogs and Ten cats", "2 dogs and 10 cats"),
        ("none", "0"),
        ("eleven", "eleven"),  # no more than ten words are numbers
        ("dont know", "don't know"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("it's", "it's"),
        ("its", "its"),  # a word of its own
        ("hes here", "he's here"),
        ("somebody'd", "somebodyd"),  # upstream has it the wrong way round
        ("yes.", "yes"),
        ("2.5", "2.5"),  # a digit follows
        ("5.", "5"),
        ("u.s.a.", "usa"),
        ("well-known", "well known"),  # a mark between letters is a space
        ("well- known", "well known"),  # beside a space it vanishes
        ("yes, please", "yes please"),
        ("1,000", "1000"),
        ("1,000-2", "10002"),  # a comma in a number: every mark vanishes
        ("black/white", "black white"),
        ("new\nline\tand tab ", "new line and tab"),
        ("what's up?", "what's up"),
        ("100%", "100%"),
        ("'hello'", "'hello'"),
    ],
)
def test_answers_are_normalised_as_the_official_evaluation_does(answer, normal):
    assert normalise(answer) == normal


def test_only_the_first_32_periods_go():
    assert normalise_punctuation("a." * 40) == "a" * 32 + "a." * 8


@pytest.mark.parametrize(
    ("said", "accuracy"),
    [
        ("red", (3 * 2 / 3 + 7 * 1) / 10),  # 3 gave it: left out themselves they see 2 others, the rest see 3
        ("Red.", 0.9),
        ("dark red", (2 * 1 / 3 + 8 * 2 / 3) / 10),
        ("the blue", 1.0),  # 5 gave it: whoever is left out, at least 4 others did
        ("green", 0.0),
    ],
)
def test_vqa_accuracy_leaves_each_annotator_out_in_turn(said, accuracy):
    assert vqa_accuracy(said, TEN) == pytest.approx(accuracy)


def test_vqa_accuracy_of_one_two_and_four_of_ten():
    others = [f"other {n}" for n in range(10)]
    assert vqa_accuracy("x", ["x", *others[:9]]) == pytest.approx(9 / 30)  # 9 see one, the one sees none
    assert vqa_accuracy("x", ["x"] * 2 + others[:8]) == pytest.approx((2 * 1 / 3 + 8 * 2 / 3) / 10)
    assert vqa_accuracy("x", ["x"] * 4 + others[:6]) == 1.0


def test_references_are_cleaned_of_punctuation_only_where_they_differ():
    assert vqa_accuracy("yes", ["yes."] * 10) == 0.0  # all the same, so they stay as they are
    assert vqa_accuracy("yes", ["yes."] * 9 + ["no"]) == 1.0
    assert vqa_accuracy("yes", ["yes!"] * 9 + ["no"]) == 0.0  # the mark becomes a space, which nobody strips
    assert vqa_accuracy("two", ["two"] * 9 + ["no"]) == 0.0  # words of references never become digits
    assert vqa_accuracy("two", ["2"] * 9 + ["no"]) == 1.0


def test_one_annotator_is_matched_and_of_a_few_any_is_right():
    assert vqa_accuracy("A crab", ["crab"]) == 1.0 and vqa_accuracy("crab", ["house"]) == 0.0
    assert vqa_accuracy("house", ["crab", "house"]) == 1.0


def test_ivqa_wants_two_of_five():
    five = ["wood", "the wood", "log", "tree", "plank"]
    assert [ivqa_accuracy(text, five) for text in ("wood", "log", "stone")] == [1.0, 0.5, 0.0]


def test_exact_match_is_of_any_reference():
    assert exact_match("The flag.", ["house", "flag"]) == 1.0 and exact_match("flags", ["flag"]) == 0.0
    assert exact_match("?", ["a"]) == 0.0 and exact_match("A", ["a"]) == 1.0  # an article may be an answer


def ranked(scores, right="c", candidates=("a", "b", "c", "d")):
    return Answered(candidates[int(np.argmax(scores))], [right], candidates, np.array(scores))


def test_reciprocal_rank_counts_what_scores_no_less():
    assert reciprocal_rank(ranked([0.1, 0.2, 0.9, 0.3])) == 1.0
    assert reciprocal_rank(ranked([0.1, 0.2, 0.3, 0.9])) == 0.5
    assert reciprocal_rank(ranked([0.9, 0.8, 0.1, 0.7])) == 0.25
    assert reciprocal_rank(ranked([0.5, 0.5, 0.5, 0.5])) == 0.25  # a model that cannot tell gains nothing
    measured = METRICS["mrr"]([ranked([0.1, 0.2, 0.9, 0.3]), ranked([0.9, 0.8, 0.1, 0.7])])
    assert measured.value == 0.625 and measured.samples is not None and measured.samples.tolist() == [1.0, 0.25]
    with pytest.raises(ValueError, match="none of 4 candidates is the reference 'x'"):
        reciprocal_rank(ranked([1, 2, 3, 4], right="x"))


def test_auc_is_the_chance_that_a_yes_outscores_a_no():
    def row(margin, answer):
        return Answered("", [answer], ("yes", "no"), np.array([margin, 0.0]))

    rows = [row(0.9, "yes"), row(0.2, "yes"), row(0.5, "no"), row(-0.3, "no")]
    assert area_under_roc(rows) == 0.75  # of four pairs of a yes and a no one is the wrong way round
    assert METRICS["auc"](rows).samples is None
    with pytest.raises(ValueError, match="one answer"):
        area_under_roc(rows[:2])
    with pytest.raises(ValueError, match="not scored"):
        area_under_roc([Answered("yes", ["yes"], ("yes", "no"), None)])


def test_every_metric_that_a_data_set_may_name_is_here():
    assert set(METRICS) == set(get_args(Metric))
    assert set(ACCURACIES) < set(METRICS)
