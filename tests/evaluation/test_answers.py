import numpy as np
import pyarrow.parquet as pq
import pytest
from instruction_samples import letters, open_letters

from blip_pipelines.evaluation.answers import PREDICTIONS, compare_answers, measure_answers, write_answers
from blip_pipelines.evaluation.scores import scores_of


@pytest.fixture
def asked(tmp_path):
    choice = letters(role="held_out", answer=None, candidates=None, ask={"kind": "choice", "about": "letter"})
    other = letters(role="held_out")
    caption = letters(metric="cider", candidates=None)
    table = open_letters(tmp_path, [40, 40], letters=letters(), other=other, choice=choice, caption=caption)
    return table.select(split="val")


def right_of(asked):
    return asked.targets(np.arange(len(asked)))


def measure(asked, texts):
    return measure_answers(asked, texts, [None] * len(texts), draws=200)


def test_right_answers_are_right_in_every_data_set_and_pooled(asked):
    values, rows = measure(asked, right_of(asked))
    assert [values[f"exact_match/{name}"] for name in ("letters", "other", "choice")] == [1.0] * 3
    assert values["accuracy/held_in"] == values["accuracy/held_out"] == 1.0
    assert values["rows/letters"] == values["rows/choice"] == 20
    assert "majority/caption" not in values and values["cider/caption"] >= 0
    assert rows.num_rows == len(asked) == 80
    assert {row["score"] for row in rows.to_pylist() if row["data_set"] != "caption"} == {1.0}


def test_the_one_answer_is_of_training_rows_or_the_best_on_the_rows_themselves(asked):
    values, rows = measure(asked, ["?"] * len(asked))
    answers = list(asked.select(data_set="letters").column("answer"))
    assert values["majority/letters"] == answers.count(asked.data_sets["letters"].majority) / 20
    assert values["majority/other"] == max(map(answers.count, "abcd")) / 20
    choice = asked.select(data_set="choice")
    every = np.arange(20)
    places = [own.index(answer) for own, answer in zip(choice.candidates(every), choice.targets(every), strict=True)]
    assert values["majority/choice"] == max(map(places.count, range(3))) / 20
    pooled = [row["majority_score"] for row in rows.to_pylist() if row["subset"] == "held_out"]
    assert values["majority/held_out"] == pytest.approx(np.mean(pooled))
    assert values["accuracy/held_in"] == 0.0
    assert (
        values["accuracy_gain/held_out"] == -values["majority/held_out"] and values["accuracy_gain_high/held_out"] < 0
    )


def test_two_models_are_compared_row_by_row(asked, tmp_path):
    good = right_of(asked)
    worse = [text if row % 3 else "?" for row, text in enumerate(good)]
    for name, texts in (("good", good), ("worse", worse)):
        (tmp_path / name).mkdir()
        write_answers(tmp_path / name, measure(asked, texts).rows)
    found = compare_answers(tmp_path / "good", tmp_path / "worse", draws=500)
    assert set(found) == {"letters", "other", "choice", "caption", "held_in", "held_out"}
    table = pq.read_table(tmp_path / "worse" / PREDICTIONS).to_pylist()
    wrong = [1 - row["score"] for row in table if row["subset"] == "held_out"]
    assert found["held_out"].mean == pytest.approx(np.mean(wrong)) and found["held_out"].is_better
    scores = scores_of(tmp_path / "worse")
    assert {name: len(samples) for name, samples in scores.items()} == {
        ("accuracy", "held_in"): 20,  # captions are judged by another measure
        ("accuracy", "held_out"): 40,
    }
    same = compare_answers(tmp_path / "good", tmp_path / "good", draws=100)
    assert same["held_in"].mean == same["held_in"].low == 0 and not same["held_in"].is_better


def test_models_that_were_asked_other_things_are_not_compared(asked, tmp_path):
    for name, rows in (("all", asked), ("some", asked.select(data_set="letters"))):
        (tmp_path / name).mkdir()
        write_answers(tmp_path / name, measure(rows, right_of(rows)).rows)
    with pytest.raises(ValueError, match="other questions"):
        compare_answers(tmp_path / "all", tmp_path / "some")


def test_a_metric_that_needs_scores_says_for_which_data_set(tmp_path):
    table = open_letters(tmp_path, [8], ranked=letters(metric="mrr")).select(split="val")
    with pytest.raises(ValueError, match=r"ranked, mrr: .* not scored"):
        measure(table, ["a", "b"])
    scores = [np.array([0.0, 1.0, 2.0, 3.0])] * 2
    values, rows = measure_answers(table, ["d", "d"], scores, draws=10)
    answers = table.column("answer")
    assert values["mrr/ranked"] == pytest.approx(np.mean([1 / (4 - "abcd".index(answer)) for answer in answers]))
    assert rows["majority_score"].to_pylist() == [None, None]
