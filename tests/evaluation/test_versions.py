from blip_pipelines.evaluation.scores import Sample
from blip_pipelines.evaluation.versions import as_page, as_text, compared

KEYS = [Sample(str(number)) for number in range(40)]
OLD = {
    ("cider", "combo"): {key: number % 3 / 3 for number, key in enumerate(KEYS)},
    ("i2t_r1", "combo"): dict.fromkeys(KEYS, 1.0),
    ("t2i_r1", "combo"): dict.fromkeys(KEYS, 0.0),
    ("i2t_r1", "image"): {KEYS[0]: 1.0},
}
NEW = {
    ("cider", "combo"): {key: value + 0.5 for key, value in OLD["cider", "combo"].items()},
    ("i2t_r1", "combo"): dict.fromkeys(KEYS, 0.0),
    ("t2i_r1", "combo"): dict.fromkeys(KEYS, 0.0),
    ("i2t_r1", "image"): {KEYS[1]: 1.0},
}


def test_better_and_worse_are_intervals_that_leave_out_zero_and_other_samples_are_not_compared():
    rows = {(row.metric, row.part): row for row in compared(NEW, OLD)}
    assert {name: row.verdict for name, row in rows.items()} == {
        ("cider", "combo"): "better",
        ("i2t_r1", "combo"): "worse",
        ("t2i_r1", "combo"): "",
        ("i2t_r1", "image"): "measured on other samples: not compared",
    }
    assert rows["cider", "combo"].interval == "+0.500 to +0.500" and rows["cider", "combo"].samples == (40, 40)
    assert rows["i2t_r1", "image"].change is None


def test_the_terminal_and_the_page_say_the_same_and_what_is_not_markup_stays_text():
    rows, origins = compared(NEW, OLD), ["med.steps: 3 (new), 2 (old)", "<b>: 1 (new), 2 (old)"]
    said = list(as_text(rows, "subset", origins))
    assert any(line.startswith("cider        combo") and line.endswith("better") for line in said)
    assert said[-2:] == origins and "measured on 1 and 1 other samples: not compared" in "\n".join(said)
    page = as_page(rows, "subset", origins, "blip-captioner version 2", "blip-captioner version 1")
    assert "Better in 1 and worse in 1 of 4 measures." in page and "+0.500 to +0.500" in page
    assert "med.steps: 3 (new), 2 (old)" in page and "&lt;b&gt;" in page and "<b>:" not in page
    assert "are the same" in as_page(rows, "subset", [], "a", "b")
