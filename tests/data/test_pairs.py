import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_samples import caption, open_data_set, picture, write_data_set

from blip_pipelines.data import row_hashes, storage
from blip_pipelines.data.pairs import Pairs, write_pairs
from blip_pipelines.data.records import PAIR_SCHEMA
from blip_pipelines.data.storage import StorageError


def table_of(captions: list[str], keys: list[str] | None = None) -> pa.Table:
    row = {"member": "m", "shard": 0, "offset": 0, "size": 1, "width": 1, "height": 1, "origin": "web", "source": "s"}
    keys = keys or [str(number) for number in range(len(captions))]
    rows = [{**row, "key": k, "caption": c, "split": "train"} for k, c in zip(keys, captions, strict=True)]
    return pa.Table.from_pylist(rows, PAIR_SCHEMA)


def test_rows_give_their_caption_and_their_image(tmp_path):
    pairs = open_data_set(tmp_path, [4, 3], captions_per_image=2)
    assert len(pairs) == 14
    assert pairs.shard_rows == (8, 6)
    assert pairs.captions(np.array([13, 0])) == [caption(13), caption(0)]
    assert pairs.image_bytes(5) == picture(2)
    assert pairs.image_ids.tolist() == [n // 2 for n in range(14)]
    assert pairs.unique_images().tolist() == list(range(0, 14, 2))


def test_views_keep_ids_and_count_rows_per_shard(tmp_path):
    pairs = open_data_set(tmp_path, [8, 4], captions_per_image=2)
    val = pairs.select(split="val")
    assert val.shard_rows == (4, 2)
    assert set(val.image_ids) == {6, 7, 11}
    assert val.image_bytes(4) == picture(11)
    human = val.select(origins=["human"], subset="combo")
    assert human.captions(np.arange(3)) == [caption(12), caption(14), caption(22)]
    assert np.array_equal(human.image_ids, [6, 7, 11])
    assert np.array_equal(human.text_ids, pairs.text_ids[[12, 14, 22]])
    assert human.hash == pairs.hash == storage.content_hash(tmp_path / "pairs")
    assert len(pairs.select(subset="concept")) == 0 and pairs.select(subset="concept").shard_rows == (0, 0)


def test_a_shard_is_a_table_of_its_own(tmp_path):
    pairs = open_data_set(tmp_path, [8, 4], captions_per_image=2)
    whole, second = pairs.table(), pairs.shard(1)
    assert whole.schema == PAIR_SCHEMA
    assert (len(second), second.shard_rows, second.hash) == (8, (8,), pairs.hash)
    assert second.table().to_pylist() == whole.slice(16).to_pylist()
    val = second.select(split="val")
    assert val.table().to_pylist() == pairs.select(split="val").table().slice(4).to_pylist()
    assert val.image_bytes(0) == picture(11)
    assert val.unique_images().tolist() == [0]


def test_rows_can_be_chosen_by_mask_or_by_number(tmp_path):
    pairs = open_data_set(tmp_path, [4, 4])
    mask = np.arange(8) % 3 == 0
    assert pairs.select(rows=mask).image_ids.tolist() == [0, 3, 6]
    repeated = pairs.select(rows=np.array([7, 0, 7]))
    assert repeated.image_ids.tolist() == [0, 7, 7]
    assert repeated.shard_rows == (1, 2)
    assert repeated.unique_images().tolist() == [0, 1]
    assert repeated.select(rows=np.array([1])).image_ids.tolist() == [7]


def test_captions_equal_but_for_case_and_space_share_an_id(tmp_path):
    texts = ["A  red crab", "a red crab ", "a red\u3000crab", "a red crabs", "", " ", "ÉTÉ", "été"]
    write_pairs(tmp_path, [table_of(texts[:3]), table_of(texts[3:])], "none")
    assert Pairs.open(tmp_path).text_ids.tolist() == [0, 0, 0, 1, 2, 2, 3, 3]


def test_columns_keep_types_and_nulls(tmp_path):
    pairs = open_data_set(tmp_path, [4, 4])
    assert pairs.column("subset").tolist() == [None, None, None, "combo"] * 2
    assert pairs.column("shard").dtype == np.int32
    assert pairs.keys[2] == storage.sha256(picture(2))
    assert np.isnan(pairs.column("match_probability")).all()


def test_equal_tables_give_equal_bytes(tmp_path):
    tables = [table_of(["a", "b"]), table_of(["c"])]
    assert write_pairs(tmp_path / "a", tables, "x", {"web": 3}) == write_pairs(tmp_path / "b", tables, "x", {"web": 3})
    assert (tmp_path / "a/00001.parquet").read_bytes() == (tmp_path / "b/00001.parquet").read_bytes()
    assert Pairs.open(tmp_path / "a").manifest["web"] == 3


@pytest.mark.parametrize("damage", ["missing", "changed", "swapped"])
def test_a_bad_shard_is_named_with_the_remedy(tmp_path, damage):
    pairs, images = write_data_set(tmp_path, [2, 2, 2])
    path = pairs / "00001.parquet"
    if damage == "missing":
        path.unlink()
    elif damage == "changed":
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    else:
        path.write_bytes((pairs / "00002.parquet").read_bytes())
    with pytest.raises(StorageError, match=r"00001\.parquet.*run the stage"):
        Pairs.open(pairs, images)


def test_images_of_another_set_or_with_a_missing_shard_are_refused(tmp_path):
    pairs, images = write_data_set(tmp_path / "a", [2, 2])
    _, others = write_data_set(tmp_path / "b", [3, 2])
    with pytest.raises(StorageError, match="other images"):
        Pairs.open(pairs, others)
    (images / "00001.tar").unlink()
    with pytest.raises(StorageError, match=r"00001\.tar.*missing"):
        Pairs.open(pairs, images)
    with pytest.raises(StorageError, match="without its images"):
        Pairs.open(pairs).image_bytes(0)


def test_no_table_and_another_schema_are_refused(tmp_path):
    with pytest.raises(StorageError, match="run the stage"):
        Pairs.open(tmp_path / "nothing")
    with pytest.raises(StorageError, match="schema"):
        write_pairs(tmp_path, [table_of(["a"]).drop_columns(["reason"])], "x")
    table = table_of(["a", "b"])
    holes = table.set_column(7, PAIR_SCHEMA.field("caption"), pa.array(["a", None]))
    with pytest.raises(StorageError, match="'caption' holds nulls"):
        write_pairs(tmp_path, [holes], "x")


def test_an_empty_table_opens(tmp_path):
    write_pairs(tmp_path, [], "x")
    pairs = Pairs.open(tmp_path)
    assert len(pairs) == 0 and pairs.shard_rows == () and pairs.image_ids.shape == pairs.text_ids.shape == (0,)


def test_pairs_travel_to_another_process(tmp_path):
    pairs = open_data_set(tmp_path, [2, 2]).select(split="train")
    pairs.image_bytes(0)
    copy = pickle.loads(pickle.dumps(pairs))  # noqa: S301  our own bytes, as a spawned worker gets them
    assert copy.image_bytes(1) == pairs.image_bytes(1)
    assert copy.captions(np.arange(2)) == pairs.captions(np.arange(2))


def test_texts_that_differ_in_case_and_white_space_have_one_id_however_they_are_hashed():
    same = ["a red crab", "A Red  crab", " a red crab ", "a\tred crab", "a red\u00a0crab"]
    plain, odd = ["a red crab", "", "a dog", "A RED CRAB", "a", "", "b"], ["ein Fuß", "EIN FUẞ", *same]
    hashes = [row_hashes.hash_texts(pa.chunked_array([pa.array(texts, pa.large_string())])) for texts in (plain, odd)]
    assert len({*hashes[1][2:], hashes[0][0], hashes[0][3]}) == 1
    assert hashes[0][1] == hashes[0][5] and len(set(hashes[0].tolist())) == 5
    for text in same[1:]:
        assert row_hashes._is_plain(pa.array([text], pa.large_string())) == (text == "A Red crab")
    for first in range(3):  # parts of an array begin within its buffers
        part = pa.array(plain, pa.large_string()).slice(first, 4)
        assert row_hashes._is_plain(part) and not row_hashes._is_plain(
            pa.array(odd, pa.large_string()).slice(first + 2, 2)
        )
        assert np.array_equal(row_hashes.hash_texts(pa.chunked_array([part])), hashes[0][first : first + 4])


def test_ids_are_those_of_the_whole_texts_and_keys(tmp_path):
    pairs = open_data_set(tmp_path, [5, 4], captions_per_image=3)
    for ids, values in ((pairs.image_ids, pairs.keys), (pairs.text_ids, pairs.column("caption"))):
        numbers = {}
        assert ids.tolist() == [numbers.setdefault(value, len(numbers)) for value in values] and ids.dtype == np.int64
    for some, view in ((np.array([7, 0, 3, 8, 1]), pairs), (np.arange(len(pairs)), pairs.select(split="train"))):
        some = some[some < len(view)]
        for ids, whole in zip(view.ids(some), (view.image_ids[some], view.text_ids[some]), strict=True):
            assert np.array_equal(ids[:, None] == ids, whole[:, None] == whole) and (ids >= 0).all()
    first_train = int(np.flatnonzero(pairs.column("split") == "train")[0])
    assert pairs.select(split="train").ids(np.array([0])) == pairs.ids(np.array([first_train]))
    assert [len(ids) for ids in pairs.ids(np.arange(0))] == [0, 0] and pairs.values("member", np.arange(0)) == []


def test_a_batch_reads_the_table_shards_of_its_window_alone(tmp_path):
    pairs = open_data_set(tmp_path, [4, 4, 4])
    (tmp_path / "pairs" / "00000.parquet").unlink()
    changed = tmp_path / "pairs" / "00002.parquet"
    changed.write_bytes(changed.read_bytes())
    rows = np.array([7, 4])
    assert pairs.captions(rows) == [caption(7), caption(4)] and pairs.image_bytes(5) == picture(5)
    assert len(set(pairs.ids(rows)[0].tolist())) == 2
    with pytest.raises(StorageError, match=r"00000\.parquet: table shard is missing"):
        pairs.places(np.array([5, 2]))
    with pytest.raises(StorageError, match=r"00002\.parquet: changed since it was opened"):
        pairs.captions(np.array([8]))


def test_texts_are_gathered_from_shards_of_every_size(tmp_path):
    texts = ["a crab", "🦀 سلطعون", "x" * 5000, "b"]
    shards = [table_of(texts[:2]), PAIR_SCHEMA.empty_table(), table_of(texts[2:]), table_of([])]
    write_pairs(tmp_path, shards, "no images")
    assert Pairs.open(tmp_path).column("caption").tolist() == texts
    assert Pairs.open(tmp_path).captions(np.array([3, 1])) == ["b", "🦀 سلطعون"]


def test_a_table_that_is_older_than_a_nullable_column_opens_with_nulls_in_it(tmp_path):
    open_data_set(tmp_path, [3, 2])
    manifest = storage.read_json(tmp_path / "pairs" / "manifest.json")
    for entry in manifest["shards"]:
        path = tmp_path / "pairs" / entry["name"]
        pq.write_table(pq.read_table(path).drop_columns(["category"]), path)
        entry["sha256"] = storage.sha256_file(path)
    storage.write_json(tmp_path / "pairs" / "manifest.json", manifest)
    pairs = Pairs.open(tmp_path / "pairs")
    assert pairs.table().schema == PAIR_SCHEMA and pairs.table()["category"].null_count == 5
    assert pairs.column("category").tolist() == [None] * 5
    assert pairs.values("category", np.array([4, 0])) == [None, None]
    assert len(pairs.where(category="animals")) == 0

    path = tmp_path / "pairs" / manifest["shards"][0]["name"]
    pq.write_table(pq.read_table(path).drop_columns(["source"]), path)  # which may not be null
    manifest["shards"][0]["sha256"] = storage.sha256_file(path)
    storage.write_json(tmp_path / "pairs" / "manifest.json", manifest)
    with pytest.raises(StorageError, match="of schema"):
        Pairs.open(tmp_path / "pairs")
