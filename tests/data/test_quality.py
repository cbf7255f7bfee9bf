import numpy as np
import pyarrow.parquet as pq
import pytest
from source_samples import scene, write_judged_data

from blip_pipelines.data import near_duplicates
from blip_pipelines.data.pairs import write_pairs
from blip_pipelines.data.quality import fingerprint, summarise


def _row(key, caption="a thing", split="train", **others):
    return {"key": key, "caption": caption, "split": split, "subset": None if split == "train" else "all", **others}


def test_a_resized_copy_is_a_near_duplicate_and_a_recoloured_one_is_not(tmp_path):
    images = {
        "a": scene(1),
        "smaller": scene(1).resize((96, 72)),
        "blue": scene(1, (80, 80, 255)),
        "b": scene(2),
    }
    rows = [_row(key, split="test" if key == "smaller" else "train") for key in images]
    found = summarise(*write_judged_data(tmp_path, rows, images))["near_duplicates"].to_pylist()
    assert [(row["key"], row["other_key"], row["splits"]) for row in found] == [("a", "smaller", 2)]


def test_declared_relatives_are_no_near_duplicates(tmp_path):
    images = {"a": scene(1), "b": scene(1).resize((96, 72)), "c": scene(1).resize((64, 48))}
    rows = [_row("a", related_key="hand"), _row("b", related_key="hand"), _row("c")]
    found = summarise(*write_judged_data(tmp_path, rows, images))["near_duplicates"].to_pylist()
    assert {(row["key"], row["other_key"]) for row in found} == {("a", "c"), ("b", "c")}


def test_the_buckets_miss_no_pair_that_comparing_all_with_all_finds():
    random = np.random.Generator(np.random.Philox(5))
    hashes = random.integers(0, 2**64, 300, dtype=np.uint64)
    for _ in range(300):  # as many again, each some flipped bits away from one of the first
        flips = random.choice(64, random.integers(0, 7), replace=False)
        hashes = np.append(
            hashes, hashes[random.integers(300)] ^ np.bitwise_or.reduce(np.uint64(1) << flips.astype(np.uint64))
        )
    bits = np.bitwise_count(hashes[:, None] ^ hashes[None, :])
    expected = {(i, j) for i, j in np.argwhere(bits <= near_duplicates.NEAR_BITS) if i < j}
    colours, brightness = np.zeros((len(hashes), 12), np.uint8), np.zeros(len(hashes))
    found = near_duplicates.candidates(hashes, colours, brightness)
    assert {(one, other) for one, other in found.tolist()} == expected
    assert len(expected) > 100


def test_thousands_of_equal_hashes_are_not_compared_all_with_all(monkeypatch):
    count, compared = 3_000, []
    compare = near_duplicates._bits
    monkeypatch.setattr(
        near_duplicates, "_bits", lambda h, one, other: compared.append(len(one)) or compare(h, one, other)
    )
    colours = np.random.Generator(np.random.Philox(1)).integers(0, 256, (count, 12), dtype=np.uint8)
    found = near_duplicates.candidates(np.zeros(count, np.uint64), colours, colours.mean(1))
    assert len(found) == 0
    # 15 pairs of bands, 32 neighbours each; a tenth of all pairs of all bands
    assert 0 < sum(compared) <= 15 * 32 * count < 15 * count**2 / 2 / 10


def test_colours_of_quadrants_never_rule_out_what_the_thumbnails_would_accept():
    random = np.random.Generator(np.random.Philox(2))
    one = random.integers(0, 256, (500, 192), dtype=np.uint8)
    other = np.clip(one + random.integers(-4, 5, one.shape), 0, 255).astype(np.uint8)
    both = np.concatenate([one, other])
    pairs = np.stack([np.arange(500), np.arange(500, 1000)], axis=1)
    whole = near_duplicates._colour_difference(both, pairs)
    coarse = near_duplicates._colour_difference(near_duplicates.quadrants_of(both), pairs)
    assert (coarse <= whole + near_duplicates._ROUNDING).all() and (coarse < whole).mean() > 0.9


def test_a_summary_over_shards_is_that_of_one_shard(tmp_path):
    rows = [_row(f"{n % 90}", f"text {n % 40}", "train" if n % 7 else "val") for n in range(300)]
    images = {f"{n}": scene(n % 80) for n in range(90)}
    one = summarise(*write_judged_data(tmp_path / "one", rows, images))
    pairs, folder = write_judged_data(tmp_path / "many", rows, images)
    table = pq.read_table(pairs / "00000.parquet")
    write_pairs(pairs, [table.slice(start, 50) for start in range(0, 300, 50)], "no images")
    assert summarise(pairs, folder) == one
    assert one["near_duplicates"].num_rows == 10


def test_repeats_and_images_in_two_splits_are_counted_worst_first(tmp_path):
    rows = [
        _row("a", "once"),
        _row("a", "Buy now"),
        _row("b", "buy now"),
        _row("c", "buy now", "val"),
        _row("c", "other", "test"),
        _row("d", "only", "test"),
        _row("d", "seen", "train"),
    ]
    tables = summarise(*write_judged_data(tmp_path, rows, {key: scene(n) for n, key in enumerate("abcd")}))
    assert tables["images_per_caption"].to_pylist()[0]["images"] == 3
    assert tables["captions_per_image"].to_pylist()[0]["captions"] == 2
    assert {row["key"] for row in tables["splits_per_image"].to_pylist() if row["splits"] > 1} == {"c", "d"}
    assert [row["key"] for row in tables["evaluation_in_training"].to_pylist()] == ["d"]
    counts = {"rows": 7, "missing_rows": 0, "train_rows": 4, "val_rows": 1, "test_rows": 2}
    assert tables["data_set"].to_pylist() == [counts]
    assert tables["shares"].to_pylist() == [{"foreign": 0, "file_name": 0, "one_word": 4 / 7, "narrow": 0}]


@pytest.mark.parametrize("size", [(64, 48), (500, 500), (640, 90)])
def test_a_smaller_decoding_gives_nearly_the_same_fingerprint(size):
    image = scene(3).resize(size)
    one, other = fingerprint(image), fingerprint(image.reduce(2) if min(size) > 128 else image)
    assert (one["dhash"] ^ other["dhash"]).bit_count() <= near_duplicates.NEAR_BITS
    assert len(one["thumbnail"]) == 192
