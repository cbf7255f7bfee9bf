import math

import pyarrow as pa
import pytest

from blip_pipelines.data.composition import RuleConfig
from blip_pipelines.data.pairs import write_pairs
from blip_pipelines.data.records import PAIR_SCHEMA
from blip_pipelines.data.shift import keep_rates, summarise_round


def table(captions, split="train", **columns):
    place = {"key": "k", "member": "m", "shard": 0, "offset": 0, "size": 1, "width": 1, "height": 1, "source": "web"}
    rows = [{**place, "origin": "web", "split": split, "caption": caption} for caption in captions]
    for name, values in columns.items():
        rows = [{**row, name: value} for row, value in zip(rows, values, strict=True)]
    return pa.Table.from_pylist(rows, PAIR_SCHEMA)


def of_round(folder, decided=(), rule=RuleConfig()):  # noqa: B008
    write_pairs(folder / "decided", [*decided, table([])], "images")
    return summarise_round(folder / "before", folder / "decided", folder / "after", rule).to_pylist()[0]


def shift(folder, before, after):
    for name, shards in (("before", before), ("after", after)):
        write_pairs(folder / name, [table(captions) for captions in shards], "images")
    return of_round(folder)


def test_the_same_captions_in_other_shards_have_not_moved(tmp_path):
    found = shift(tmp_path, [["a dog", "a cat"], []], [["a dog"], ["A  cat"]])
    assert (found["length_shift"], found["vocabulary_shift"]) == (0, 0)
    assert (found["captions_after"], found["vocabulary_after"], found["words_per_caption_after"]) == (2, 3, 2.0)


def test_captions_without_a_word_in_common_are_one_bit_apart(tmp_path):
    found = shift(tmp_path, [["a dog"]], [["un chien noir"]])
    assert found["vocabulary_shift"] == pytest.approx(1)
    assert found["length_shift"] == pytest.approx(0.5)


def test_the_divergence_is_that_of_jensen_and_shannon(tmp_path):
    """Words a a b against a: p = (2/3, 1/3), q = (1, 0), mean (5/6, 1/6)."""
    found = shift(tmp_path, [["a a b"]], [["a"]])
    expected = (2 / 3 * math.log2(4 / 5) + 1 / 3 * math.log2(2) + math.log2(6 / 5)) / 2
    assert found["vocabulary_shift"] == pytest.approx(expected)


def test_only_training_captions_count(tmp_path):
    write_pairs(tmp_path / "before", [table(["a dog"])], "images")
    write_pairs(tmp_path / "after", [pa.concat_tables([table(["a dog"]), table(["ein hund"], "val")])], "images")
    assert of_round(tmp_path)["vocabulary_shift"] == 0


def test_an_empty_corpus_is_as_far_away_as_can_be(tmp_path):
    found = shift(tmp_path, [["a dog"]], [[]])
    assert (found["length_shift"], found["vocabulary_shift"], found["captions_after"]) == (1, 1, 0)


def test_keep_rates_of_a_round_are_those_of_the_origins_that_the_rule_wants(tmp_path):
    for name in ("before", "after"):
        write_pairs(tmp_path / name, [table("ab")], "images")
    decided = [table("abc", origin=["web", "web", "web"], source="xyx", kept=[True, False, False])]
    found = of_round(tmp_path, decided)
    assert (found["web_keep_rate"], found["synthetic_keep_rate"]) == (pytest.approx(1 / 3), None)
    assert of_round(tmp_path, decided, RuleConfig(web=False))["web_keep_rate"] is None


def test_keep_rates_are_counted_by_origin_and_source(tmp_path):
    first = table(
        "abcd", origin=["web", "web", "synthetic", "web"], source=["x", "y", "x", "x"], kept=[True, False, False, False]
    )
    second = table("ab", origin=["web", "synthetic"], source=["x", "x"], kept=[True, True])
    write_pairs(tmp_path, [first, second], "images")
    assert keep_rates(tmp_path).to_pylist() == [
        {"origin": "synthetic", "source": "x", "judged": 2, "kept": 1, "keep_rate": 0.5},
        {"origin": "web", "source": "x", "judged": 3, "kept": 2, "keep_rate": pytest.approx(2 / 3)},
        {"origin": "web", "source": "y", "judged": 1, "kept": 0, "keep_rate": 0.0},
    ]
