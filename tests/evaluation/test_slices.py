from blip_pipelines.evaluation.scores import Sample
from blip_pipelines.evaluation.slices import sliced

ROWS = [
    {"key": "a", "caption": "a red crab", "source": "x"},
    {"key": "b", "caption": "a small red crab", "source": "y"},
    {"key": "a", "caption": "another one of the same picture", "source": "z"},
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
