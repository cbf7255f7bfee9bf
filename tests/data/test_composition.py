from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from blip_pipelines.config import ConfigError
from blip_pipelines.data.composition import RuleConfig, compose, compose_shard, decide, decide_shard
from blip_pipelines.data.pairs import Pairs, write_pairs
from blip_pipelines.data.records import PAIR_SCHEMA
from blip_pipelines.data.storage import StorageError, read_json, sha256_file, write_json


def rows(*items, split="train"):
    """(key, caption, origin, probability) to a table."""
    place = {"shard": 0, "size": 10, "width": 8, "height": 8, "source": "made", "split": split}
    filled = [
        {
            **place,
            "key": key,
            "member": f"{key}.png",
            "offset": 512 * int(key[1:]),
            "caption": caption,
            "origin": origin,
            "match_probability": probability,
        }
        for key, caption, origin, probability in items
    ]
    return pa.Table.from_pylist(filled, schema=PAIR_SCHEMA)


JUDGED = rows(
    ("k0", "a dog", "web", 0.9),
    ("k1", "img 4711", "web", 0.1),
    ("k2", "a house", "web", 0.7),
    ("k0", "a brown dog", "synthetic", 0.8),
    ("k1", "a red cat", "synthetic", 0.5),
    ("k2", "A  house", "synthetic", 0.6),
)
TABLE = pa.concat_tables(
    [
        rows(("k9", "a test", "web", None), split="test"),
        rows(("k0", "a dog", "web", None), ("k3", "a tree", "human", None), ("k1", "img 4711", "web", None)),
        rows(("k2", "a house", "web", None)),
    ]
)


def composed_by(rule, table=TABLE, judged=JUDGED):
    decided = decide_shard(table, judged, rule, round_number=1)
    return compose_shard(table, decided), decided


def captions(table, **where):
    return [row["caption"] for row in table.to_pylist() if all(row[name] == value for name, value in where.items())]


def test_the_default_rule_is_the_argmax_of_the_itm_head_and_judges_independently():
    kept, reasons = decide(JUDGED, RuleConfig())
    assert kept.tolist() == [True, False, True, True, False, True]  # 0.5 itself is not above 0.5
    assert reasons[:3] == ["above 0.5", "not above 0.5", "above 0.5"]


def test_web_and_synthetic_captions_may_have_thresholds_of_their_own():
    kept, reasons = decide(JUDGED, RuleConfig(web_threshold=0.05, synthetic_threshold=0.75))
    assert kept.tolist() == [True, True, True, True, False, False]
    assert (reasons[1], reasons[5]) == ("above 0.05", "not above 0.75")


def test_the_top_k_rule_ranks_web_and_synthetic_together():
    kept, reasons = decide(JUDGED, RuleConfig(kind="top_k", top_k=1))
    assert kept.tolist() == [True, False, True, False, True, False]
    assert reasons[3] == "rank 2, past the best 1"


def test_captions_that_are_left_out_take_no_place_among_the_best():
    kept, _ = decide(JUDGED, RuleConfig(kind="top_k", top_k=1, web=False))
    assert kept.tolist() == [False, False, False, True, True, True]


def test_a_caption_without_words_is_dropped_whatever_the_rule():
    judged = rows(("k0", " ", "synthetic", 0.99))
    for rule in (RuleConfig(), RuleConfig(kind="top_k"), RuleConfig(filter_synthetic=False)):
        kept, reasons = decide(judged, rule)
        assert (kept.tolist(), reasons) == ([False], ["no words"])


def test_the_corpus_keeps_the_order_of_the_table_and_puts_synthetic_captions_behind_their_image():
    composed, _ = composed_by(RuleConfig())
    assert captions(composed) == ["a test", "a dog", "a brown dog", "a tree", "a house"]


def test_human_and_evaluation_rows_pass_as_they_are():
    composed, _ = composed_by(RuleConfig())
    passed = [row for row in composed.to_pylist() if row["origin"] == "human" or row["split"] == "test"]
    assert passed == [row for row in TABLE.to_pylist() if row["origin"] == "human" or row["split"] == "test"]


def test_every_judged_row_says_what_became_of_it():
    composed, decided = composed_by(RuleConfig())
    assert len(decided) == len(JUDGED)
    assert {row["round"] for row in decided.to_pylist()} == {1}
    assert sorted(captions(decided, kept=True)) == sorted(captions(composed, kept=True))
    assert all(row["reason"] for row in decided.to_pylist())


def test_a_synthetic_caption_that_repeats_a_kept_one_is_dropped_with_that_reason():
    _, decided = composed_by(RuleConfig())
    repeats = [row for row in decided.to_pylist() if row["caption"] == "A  house"]
    assert [(row["kept"], row["reason"]) for row in repeats] == [(False, "repeats a kept caption of its image")]
    composed, _ = composed_by(RuleConfig(drop_repeats=False))
    assert "A  house" in captions(composed)


def test_a_synthetic_caption_may_say_what_a_dropped_one_said():
    judged = JUDGED.slice(0, 5)
    again = rows(("k1", "IMG 4711", "synthetic", 0.9))
    composed, _ = composed_by(RuleConfig(), judged=pa.concat_tables([judged, again]))
    assert captions(composed, key="k1") == ["IMG 4711"]


@pytest.mark.parametrize(
    ("rule", "web", "synthetic"),
    [
        (RuleConfig(synthetic=False), 2, 0),  # filter only
        (RuleConfig(filter_web=False, filter_synthetic=False), 3, 2),  # captioner only
        (RuleConfig(web=False, synthetic=False), 0, 0),  # human only
        (RuleConfig(synthetic=False, filter_web=False), 3, 0),  # neither
    ],
)
def test_the_arms_of_the_ablation_are_rules(rule, web, synthetic):
    composed, _ = composed_by(rule)
    assert len(captions(composed, origin="web", split="train")) == web
    assert len(captions(composed, origin="synthetic")) == synthetic


def test_without_filter_and_captioner_the_corpus_is_the_table_in_its_order():
    composed, _ = composed_by(RuleConfig(synthetic=False, filter_web=False))
    before = [name for name in PAIR_SCHEMA.names if PAIR_SCHEMA.field(name).type not in (pa.float32(), pa.bool_())]
    before = [name for name in before if name not in ("round", "reason")]
    assert composed.select(before).to_pylist() == TABLE.select(before).to_pylist()


def test_judged_captions_of_another_table_are_refused():
    with pytest.raises(StorageError, match="run writing and judging again"):
        decide_shard(TABLE, JUDGED.slice(1), RuleConfig(), 1)


def test_synthetic_captions_of_an_unknown_image_are_refused():
    stray = pa.concat_tables([JUDGED, rows(("k7", "a ghost", "synthetic", 0.9))])
    with pytest.raises(StorageError, match="image k7 is not in the caption table"):
        composed_by(RuleConfig(), judged=stray)


def test_an_unjudged_row_is_refused():
    judged = JUDGED.set_column(
        PAIR_SCHEMA.get_field_index("match_probability"),
        PAIR_SCHEMA.field("match_probability"),
        pa.array([None] + [0.5] * 5, pa.float32()),
    )
    with pytest.raises(StorageError, match=r"row 0 \(k0.png\) has no match probability"):
        decide(judged, RuleConfig())


def test_a_threshold_that_is_no_probability_is_refused():
    with pytest.raises(ConfigError, match="web_threshold"):
        RuleConfig(web_threshold=1.5)


def test_ranks_of_many_images_equal_a_plain_sort():
    generator = np.random.default_rng(0)
    keys = [f"k{number}" for number in generator.integers(0, 20, 200)]
    probability = generator.random(200).round(1)  # with ties
    table = rows(
        *[(key, f"c{i}", "synthetic", float(p)) for i, (key, p) in enumerate(zip(keys, probability, strict=True))]
    )
    kept, _ = decide(table, RuleConfig(kind="top_k", top_k=3))
    for key in set(keys):
        mine = [i for i in range(200) if keys[i] == key]
        best = sorted(mine, key=lambda i: (-np.float32(probability[i]), i))[:3]
        assert sorted(i for i in mine if kept[i]) == sorted(best)


def compose_in(folder, rule=RuleConfig(), name="out"):  # noqa: B008
    out = folder / name
    return compose(folder / "pairs", folder / "judged", rule, 1, out / "pairs", out / "decided")


@pytest.fixture
def judged_set(tmp_path):
    """Two shards, the second with images of its own and nothing from the web."""
    second = rows(("k3", "a moon", "human", None), ("k5", "a val", "human", None), split="val")
    write_pairs(tmp_path / "pairs", [TABLE, second], "of some images")
    write_pairs(tmp_path / "judged", [JUDGED, PAIR_SCHEMA.empty_table()], "of some images")
    return tmp_path


def test_rows_in_are_rows_kept_and_rows_dropped(judged_set):
    counts = compose_in(judged_set)
    expected = {"unchanged": 4, "web_kept": 2, "web_dropped": 1, "synthetic_kept": 1, "synthetic_dropped": 2}
    assert counts == expected
    assert sum(counts.values()) == len(TABLE) + 2 + 3  # all rows of the table and three synthetic ones
    corpus, decided = Pairs.open(judged_set / "out" / "pairs"), Pairs.open(judged_set / "out" / "decided")
    assert len(corpus) == counts["unchanged"] + counts["web_kept"] + counts["synthetic_kept"]
    assert len(decided) == len(JUDGED)
    assert corpus.shard_rows == (5, 2)
    assert corpus.manifest["images"] == "of some images"
    kinds = Counter(zip(decided.column("origin"), decided.column("kept"), strict=True))
    assert kinds == {("web", 1): 2, ("web", 0): 1, ("synthetic", 1): 1, ("synthetic", 0): 2}


def test_a_table_without_the_category_column_composes_with_judged_ones_that_have_it(judged_set):
    names = ["00000.parquet", "00001.parquet"]
    manifest = read_json(judged_set / "pairs" / "manifest.json")
    for name, entry in zip(names, manifest["shards"], strict=True):
        path = judged_set / "pairs" / name
        pq.write_table(pq.read_table(path).drop_columns(["category"]), path)
        entry["sha256"] = sha256_file(path)
    write_json(judged_set / "pairs" / "manifest.json", manifest)
    compose_in(judged_set)
    assert Pairs.open(judged_set / "out" / "pairs").table().schema == PAIR_SCHEMA


def test_another_threshold_composes_from_the_same_judged_captions(judged_set):
    before = (judged_set / "judged" / "00000.parquet").read_bytes()
    sizes = []
    for number, threshold in enumerate((0.05, 0.5, 0.95)):
        out = judged_set / f"out{number}"
        compose_in(judged_set, RuleConfig(web_threshold=threshold), out.name)
        sizes.append(len(Pairs.open(out / "pairs").select(origins=["web"], split="train")))
    assert sizes == [3, 2, 0]
    assert (judged_set / "judged" / "00000.parquet").read_bytes() == before


def test_composing_twice_gives_the_same_bytes(judged_set):
    for name in ("one", "two"):
        compose_in(judged_set, name=name)
    assert Pairs.open(judged_set / "one" / "pairs").hash == Pairs.open(judged_set / "two" / "pairs").hash


def test_a_damaged_judged_shard_is_refused_by_name(judged_set):
    path = judged_set / "judged" / "00000.parquet"
    pq.write_table(JUDGED.slice(0, 5), path)
    with pytest.raises(StorageError, match=r"judged/00000\.parquet: content is"):
        compose_in(judged_set)
