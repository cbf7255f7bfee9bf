import pyarrow.parquet as pq
from evaluation_samples import write_scene

from blip_pipelines.data.pairs import Pairs
from blip_pipelines.evaluation.scores import Sample
from blip_pipelines.evaluation.slices import rows_of, slice_order, sliced

ROWS = [
    {"key": "a", "caption": "a red crab", "source": "x", "category": "animals"},
    {"key": "b", "caption": "a small red crab", "source": "y", "category": None},
    {"key": "a", "caption": "another one of the same picture", "source": "z", "category": "pictures"},
]
SCORES = {
    ("cider", "combo"): {Sample("a"): 1.0, Sample("c"): 5.0},
    ("cider", "image"): {Sample("b"): 2.0},
    ("t2i_r1", "image"): {Sample("b", " ".join(["word"] * 11)): 0.0},
}


def test_samples_go_by_source_over_all_subsets_and_unknown_ones_are_left_out():
    assert sliced(SCORES, "source", ROWS) == {
        ("cider", "x"): {Sample("a"): 1.0},
        ("cider", "y"): {Sample("b"): 2.0},
        ("t2i_r1", "y"): {Sample("b", " ".join(["word"] * 11)): 0.0},
    }


def test_length_is_of_the_text_that_was_asked_with_or_else_of_the_pictures_caption():
    assert set(sliced(SCORES, "length", ROWS)) == {
        ("cider", "up to 3 words"),
        ("cider", "4 to 6 words"),
        ("t2i_r1", "over 10 words"),
    }


def test_a_question_is_as_long_as_the_caption_of_its_picture():
    asked = {("accuracy", "held_in"): {Sample("b", "emoji_kind: What kind of thing is this? Answer in a word."): 1.0}}
    assert set(sliced(asked, "length", ROWS)) == {("accuracy", "4 to 6 words")}


def test_pictures_without_a_category_are_a_slice_of_their_own_and_come_last():
    found = sliced(SCORES, "category", ROWS)
    assert found["cider", "animals"] == {Sample("a"): 1.0}
    assert found["cider", "no category"] == {Sample("b"): 2.0}
    assert sorted(["no category", "zebras", "animals"], key=slice_order) == ["animals", "zebras", "no category"]
    assert sorted(["over 10 words", "4 to 6 words", "up to 3 words"], key=slice_order)[-1] == "over 10 words"


def test_rows_are_those_of_the_scored_pictures_also_of_a_table_that_knows_no_category(tmp_path):
    pairs = write_scene(tmp_path)["pairs"]
    key = Pairs.open(pairs).keys[0]
    path = pairs / "00000.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["category"]), path)
    rows = list(rows_of({("cider", "image"): {Sample(key): 1.0, Sample("elsewhere"): 0.0}}, pairs))
    assert rows and {(row["key"], row["source"], row["category"]) for row in rows} == {(key, "sample", None)}
