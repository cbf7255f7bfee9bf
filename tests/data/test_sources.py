"""Every format that people have, small but laid out as the real tools do, from disk and from S3."""

import io
import json
import tarfile
from collections import Counter
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_samples import picture, tokenizer_json
from object_store_samples import BUCKET, Fault
from public_formats import FORMATS, add, jpeg, write_coco, write_img2dataset, write_vqa, write_webdataset

from blip_pipelines.config import ConfigError
from blip_pipelines.data import storage
from blip_pipelines.data.features import FeatureCache
from blip_pipelines.data.ingest import DataSet, ingest
from blip_pipelines.data.ingestion_plan import IngestionConfig
from blip_pipelines.data.loader import DecodedPixels, Loader
from blip_pipelines.data.object_requests import ObjectMissingError, ObjectStoreError
from blip_pipelines.data.order import Order
from blip_pipelines.data.pairs import Pairs
from blip_pipelines.data.places import open_place
from blip_pipelines.data.shards import verify
from blip_pipelines.data.sources import SourceConfig, SourceError, open_source
from blip_pipelines.data.splits import SplitConfig
from blip_pipelines.data.tokens import prune_vocabulary
from blip_pipelines.data.transforms import ImageConfig


def take_in(where, kind, options, out, s3=None, **values):
    """Ingest; returns the counts."""
    source = SourceConfig(kind, options, **({"s3": s3} if s3 else {}))
    config = IngestionConfig(source=source, workers=1, **values)
    return ingest(open_source(config, where), config, DataSet(*(out / name for name in PARTS)))


PARTS = ("images", "pairs", "quarantine.parquet", "noise.parquet")


def rows_of(out):
    tables = [pq.read_table(path) for path in sorted((out / "pairs").glob("*.parquet"))]
    return pa.concat_tables(tables).to_pylist()


def refused(out):
    return Counter(row["reason"] for row in pq.read_table(out / "quarantine.parquet").to_pylist())


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def one_epoch(out):
    """Pixels, tokens and ids of every training row, in order."""
    pairs = Pairs.open(out / "pairs", out / "images").select(split="train")
    tokenizer = prune_vocabulary(tokenizer_json(), pairs.column("caption"))[0]
    order = Order(pairs.shard_rows, seed=3, window_shards=2)
    reader = DecodedPixels(pairs, ImageConfig(size=16), seed=3, train=True)
    loader = Loader(pairs, order, reader, tokenizer, 12, 2, steps=len(pairs) // 2)
    return [(b.pixels.numpy(), b.token_ids.numpy(), b.image_ids.numpy(), b.text_ids.numpy()) for (b,) in loader]


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_gives_the_same_tables_and_batches_from_disk_and_from_s3(server, tmp_path, name):
    kind, options, write = FORMATS[name]
    expected = write(tmp_path / "source")
    counts = take_in(tmp_path / "source", kind, options, tmp_path / "disk", shard_images=3)
    assert {(row["member"], row["caption"]) for row in rows_of(tmp_path / "disk")} == expected
    assert counts["rows"] == len(expected)
    verify(tmp_path / "disk" / "images")
    url = server.put_folder(tmp_path / "source", f"sources/{name.replace(' ', '-')}")
    take_in(url, kind, options, tmp_path / "s3", server.config(tmp_path / "cache"), shard_images=3)
    assert contents(tmp_path / "s3" / "pairs") == contents(tmp_path / "disk" / "pairs")
    assert refused(tmp_path / "s3") == refused(tmp_path / "disk")
    disk, s3 = one_epoch(tmp_path / "disk"), one_epoch(tmp_path / "s3")
    assert len(disk) == len(s3) > 0
    for one, other in zip(disk, s3, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_tars_are_used_in_place_and_only_what_must_be_is_written_anew(tmp_path):
    write_webdataset(tmp_path / "source")
    take_in(tmp_path / "source", "tars", {"split": "train"}, tmp_path / "out")
    written = sorted(path.name for path in (tmp_path / "out" / "images").glob("*.tar"))
    assert written == ["00002.tar", "00003.tar"]  # the two pictures in CMYK, beside two tars in place
    for name in written:
        with tarfile.open(tmp_path / "out" / "images" / name) as tar:
            assert len(tar.getnames()) == 1
    pairs = Pairs.open(tmp_path / "out" / "pairs", tmp_path / "out" / "images")
    for row in range(len(pairs)):
        assert storage.sha256(pairs.image_bytes(row)) == pairs.keys[row]
    (tmp_path / "source" / "train-000001.tar").write_bytes(b"x" * 10_240)
    with pytest.raises(storage.StorageError, match=r"train-000001.tar: 10240 bytes where the manifest says"):
        Pairs.open(tmp_path / "out" / "pairs", tmp_path / "out" / "images")


def test_failed_downloads_and_what_lacks_a_part_are_counted_by_reason(tmp_path):
    write_img2dataset(tmp_path / "source")
    with tarfile.open(tmp_path / "source" / "00000.tar", "a") as tar:
        add(tar, "unlisted.jpg", jpeg(90))  # no row in the parquet
        add(tar, "000000009.txt", b"a text alone")
    table = pq.read_table(tmp_path / "source" / "00001.parquet").to_pylist()
    lost = {**table[0], "key": "000010099"}  # a row whose picture was lost
    pq.write_table(pa.Table.from_pylist([*table, lost]), tmp_path / "source" / "00001.parquet")
    counts = take_in(tmp_path / "source", "tars", {"split": "train"}, tmp_path / "out")
    assert counts["rows"] == 6
    assert refused(tmp_path / "out") == {"not_downloaded": 2, "no_caption": 1, "missing_image": 2}
    found = pq.read_table(tmp_path / "out" / "quarantine.parquet").to_pylist()
    assert {row["error"] for row in found if row["reason"] == "not_downloaded"} == {
        "img2dataset: failed_to_download: HTTP Error 404: Not Found"
    }


def test_a_tar_that_breaks_off_costs_the_rest_of_itself(tmp_path):
    write_img2dataset(tmp_path / "source")
    path = tmp_path / "source" / "00000.tar"
    with tarfile.open(path) as tar:
        third = tar.getmembers()[3].offset_data  # the second picture
    path.write_bytes(path.read_bytes()[: third + 100])
    counts = take_in(tmp_path / "source", "tars", {}, tmp_path / "out", splits=SplitConfig(0, 0))
    assert counts["rows"] == 1 + 3
    # The tar, its second picture, a row of the parquet without one, and the two downloads that failed.
    assert refused(tmp_path / "out") == {"truncated": 2, "missing_image": 1, "not_downloaded": 2}


def test_texts_of_tars_may_be_in_json_members_and_bad_ones_cost_themselves(tmp_path):
    (tmp_path / "source").mkdir()
    good = b'{"text": "a red crab", "lang": "en", "category": "animals"}'
    texts = [good, b'{"text": 7}', b"{", b'{"other": "x"}', b'{"text": "\\ud800"}']
    with tarfile.open(tmp_path / "source" / "a.tar", "w") as tar:
        for number, text in enumerate(texts):
            add(tar, f"deep/{number}.json", text)
            add(tar, f"deep/{number}.PNG", picture(number))
    options = {"captions": "json", "columns": {"caption": "text", "language": "lang"}, "split": "train"}
    take_in(tmp_path / "source", "tars", options, tmp_path / "out")
    (row,) = rows_of(tmp_path / "out")
    assert (row["member"], row["caption"], row["language"]) == ("a/deep/0.PNG", "a red crab", "en")
    assert (row["source"], row["category"]) == ("tars", "animals")
    assert refused(tmp_path / "out") == {"bad_row": 1, "bad_json": 1, "no_caption": 1, "invalid_utf8": 1}


def test_features_of_a_frozen_tower_are_those_of_the_same_pictures_stored_by_us(tmp_path):
    write_webdataset(tmp_path / "source")
    take_in(tmp_path / "source", "tars", {"split": "train"}, tmp_path / "out")
    encode = lambda pixels: pixels.mean(3).transpose(0, 2, 1).astype(np.float32)  # noqa: E731
    cache = FeatureCache.create(tmp_path / "cache", tmp_path / "out" / "images", ImageConfig(size=8), "t", encode)
    pairs = Pairs.open(tmp_path / "out" / "pairs", tmp_path / "out" / "images")
    assert len(cache) == len(pairs)
    pixels = DecodedPixels(pairs, ImageConfig(size=8))(np.arange(len(pairs)))
    assert np.array_equal(cache.read(list(pairs.keys)), encode(pixels).astype(np.float16))


def test_coco_rows_that_cannot_be_used_are_refused_by_name(tmp_path):
    expected = write_coco(tmp_path / "source")
    path = tmp_path / "source" / "annotations" / "captions_train2017.json"
    found = json.loads(path.read_text())
    found["images"] += [{"id": 70, "file_name": "gone.jpg"}, {"id": 71}, {"id": 72, "file_name": "000000000000.jpg"}]
    found["annotations"] += [
        {"image_id": 70, "caption": "its picture is gone"},
        {"image_id": 99, "caption": "of no picture"},
        {"image_id": 0},
        {"image_id": 0, "caption": None},
    ]
    path.write_text(json.dumps(found))
    counts = take_in(tmp_path / "source", "coco", FORMATS["coco"].options, tmp_path / "out")
    assert counts["rows"] == len(expected)
    assert refused(tmp_path / "out") == {"missing_image": 2, "bad_row": 3}
    path.write_text("{}")
    with pytest.raises(SourceError, match=r"captions_train2017.json: has no list of images"):
        take_in(tmp_path / "source", "coco", FORMATS["coco"].options, tmp_path / "out")
    with pytest.raises(SourceError, match=r"elsewhere.json: no such file; set ingestion.source.options.annotations"):
        take_in(tmp_path / "source", "coco", {"annotations": {"elsewhere.json": {}}}, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"annotations.a.json.pictures: unknown parameter; known keys: images, split"):
        take_in(tmp_path / "source", "coco", {"annotations": {"a.json": {"pictures": "x"}}}, tmp_path / "out")


def test_questions_without_an_answer_are_refused_and_all_answers_may_be_wanted(tmp_path):
    write_vqa(tmp_path / "source")
    path = tmp_path / "source" / "v2_mscoco_train2014_annotations.json"
    found = json.loads(path.read_text())
    found["annotations"] = found["annotations"][1:]
    found["annotations"][0]["answers"][0]["answer"] = "three"
    path.write_text(json.dumps(found))
    options = {**FORMATS["vqa"].options, "answers": "all", "template": "question: {question} answer: {answer}"}
    take_in(tmp_path / "source", "vqa", options, tmp_path / "out")
    assert refused(tmp_path / "out") == {"no_answer": 1}
    texts = {row["caption"] for row in rows_of(tmp_path / "out") if row["member"].endswith("00.jpg")}
    assert len(texts) == 2 and all(text.startswith("question: Is it") for text in texts)
    with pytest.raises(ConfigError, match="no template of question, answer"):
        take_in(tmp_path / "source", "vqa", {**options, "template": "{reply}"}, tmp_path / "out")


def test_parquet_rows_without_picture_or_text_are_refused_and_a_wrong_column_is_named(tmp_path):
    (tmp_path / "source").mkdir()
    image = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    schema = pa.schema({"picture": image, "text": pa.string(), "split": pa.string(), "label": pa.int64()})
    rows = [
        {"picture": {"bytes": jpeg(1), "path": None}, "text": "good", "split": "validation", "label": 3},
        {"picture": {"bytes": None, "path": "/elsewhere/1.jpg"}, "text": "only a path", "split": "train"},
        {"picture": {"bytes": b"no picture", "path": None}, "text": "bytes of something else", "split": "train"},
        {"picture": None, "text": "nothing", "split": "train"},
        {"picture": {"bytes": jpeg(2), "path": None}, "text": None, "split": "train"},
        {"picture": {"bytes": jpeg(3), "path": None}, "text": "odd split", "split": "other"},
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema), tmp_path / "source" / "part.parquet")
    columns = {"image": "picture", "caption": "text", "category": "label"}
    take_in(tmp_path / "source", "parquet", {"columns": columns}, tmp_path / "out")
    assert [(row["caption"], row["split"], row["category"]) for row in rows_of(tmp_path / "out")] == [
        ("good", "val", "3")
    ]
    assert refused(tmp_path / "out") == {"missing_image": 2, "not_an_image": 1, "no_caption": 1, "bad_split": 1}
    with pytest.raises(
        SourceError, match=r"no column 'image' among picture, text, split, label; name it in .*columns.image"
    ):
        take_in(tmp_path / "source", "parquet", {}, tmp_path / "other")


def test_under_a_limit_archives_give_their_first_images_of_each_split(tmp_path):
    FORMATS["hub parquet"].write(tmp_path / "source")
    options = FORMATS["hub parquet"].options
    take_in(tmp_path / "source", "parquet", options, tmp_path / "out", limit=6)
    assert Counter(row["split"] for row in rows_of(tmp_path / "out")) == {"train": 4, "val": 2, "test": 2}


def test_the_same_picture_in_two_archives_belongs_to_evaluation_and_is_stored_under_its_first_place(tmp_path):
    (tmp_path / "source").mkdir()
    image = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    schema = pa.schema({"image": image, "caption": pa.string()})
    for name, texts in (("test", ["of the test"]), ("train", ["of the training", "another"])):
        rows = [{"image": {"bytes": jpeg(place), "path": ""}, "caption": text} for place, text in enumerate(texts)]
        pq.write_table(pa.Table.from_pylist(rows, schema), tmp_path / "source" / f"{name}.parquet")
    take_in(tmp_path / "source", "parquet", {}, tmp_path / "out")
    assert {(row["caption"], row["split"]) for row in rows_of(tmp_path / "out")} == {
        ("of the test", "test"),
        ("another", "train"),
    }
    assert refused(tmp_path / "out") == {"in_evaluation": 1}


def test_an_object_that_vanishes_costs_its_own_rows_by_name(proxy, tmp_path):
    FORMATS["folder"].write(tmp_path / "source")
    url = proxy.server.put_folder(tmp_path / "source", "vanishing-folder")
    s3 = proxy.server.config(tmp_path / "cache", endpoint=proxy.endpoint, attempts=2)
    proxy.faults = [Fault("vanish", 1, "GET", "deep/3.jpg")]
    counts = take_in(url, "folder", {"captions": "sidecar"}, tmp_path / "out", s3)
    assert counts["rows"] == 7 and counts["quarantined"] == {"unreadable": 1} and not proxy.faults
    (lost,) = pq.read_table(tmp_path / "out" / "quarantine.parquet").to_pylist()
    assert lost["member"] == "deep/3.jpg" and f"s3://{BUCKET}/vanishing-folder/deep/3.jpg" in lost["error"]


def test_an_archive_that_vanishes_ends_in_its_name_and_a_run_after_its_return_has_every_row(proxy, tmp_path):
    FORMATS["img2dataset"].write(tmp_path / "source")
    url = proxy.server.put_folder(tmp_path / "source", "vanishing-tars")
    s3 = proxy.server.config(tmp_path / "cache", endpoint=proxy.endpoint, attempts=2)
    proxy.faults = [Fault("vanish", path="00001.tar")]
    with pytest.raises(ObjectMissingError, match=f"^s3://{BUCKET}/vanishing-tars/00001.tar: there is no such object"):
        take_in(url, "tars", {}, tmp_path / "out", s3)
    assert not (tmp_path / "out" / "pairs").exists()
    proxy.server.put_folder(tmp_path / "source", "vanishing-tars")
    counts = take_in(url, "tars", {}, tmp_path / "out", s3)
    assert (counts["rows"], counts["quarantined"]) == (6, {"not_downloaded": 2})
    assert proxy.count("GET", "00000.tar") == 1  # what was finished stayed


FAULTS = {
    "errors": (Fault("status"), "the store answers 500 InternalError, in the last of 2 attempts"),
    "slow-downs": (Fault("status", status=503, code="SlowDown"), "the store answers 503 SlowDown, in the last of 2"),
    "broken connections": (Fault("reset"), "no answer"),
    "truncated bodies": (Fault("truncated"), r"the answer broke off after \d+ of \d+ bytes"),
    "wrong bytes": (Fault("wrong_bytes"), "what c[oa]me.* is not what its checksum says"),
    "a trickle": (Fault("trickle"), r"only \d+ of \d+ bytes came in 1 s"),
    "expired credentials": (Fault("status", status=400, code="ExpiredToken"), "the credentials have expired; renew"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(
    ("name", "kept", "lost"), [("folder", 8, {}), ("img2dataset", 6, {"not_downloaded": 2})], ids=["files", "archives"]
)
def test_faults_of_the_store_lose_no_row_and_lasting_ones_no_shard_that_was_finished(
    proxy, tmp_path, name, kept, lost, fault
):
    kind, options, write = FORMATS[name]
    write(tmp_path / "source")
    url = proxy.server.put_folder(tmp_path / "source", f"faults/{name}")
    s3 = proxy.server.config(tmp_path / "cache", endpoint=proxy.endpoint, attempts=2, timeout_seconds=1.0)

    def take(out, cache):
        found = take_in(url, kind, options, tmp_path / out, replace(s3, cache=str(tmp_path / cache)), shard_images=3)
        assert (found["rows"], found["quarantined"]) == (kept, lost)
        assert len(rows_of(tmp_path / out)) == kept and refused(tmp_path / out) == lost

    what, message = FAULTS[fault]
    proxy.faults = [replace(what, path=".jpg" if kind == "folder" else ".tar")]
    take("passing", "cache of passing")
    assert not proxy.faults  # it happened

    last = max(rows_of(tmp_path / "passing"), key=lambda row: row["shard"])["member"]
    last = last if kind == "folder" else f"{last.partition('/')[0]}.tar"
    proxy.faults, proxy.requests = [replace(what, path=last, times=None)], []
    with pytest.raises(ObjectStoreError, match=f"^s3://{BUCKET}/faults/{name}/{last}: {message}"):
        take("lasting", "cache of lasting")
    assert not (tmp_path / "lasting" / "pairs").exists()  # no table that would lack rows
    done = contents(tmp_path / "lasting" / "images")
    whole = contents(tmp_path / "passing" / "images")
    finished = {file for file in done if file.startswith("0") and done[file] == whole.get(file)}
    assert len(finished) == {"folder": 4, "img2dataset": 1}[name]  # of files the tars too, of archives an index

    proxy.faults, proxy.requests = [], []
    take("lasting", "cache of lasting")
    assert contents(tmp_path / "lasting" / "images").keys() == whole.keys()
    assert contents(tmp_path / "lasting" / "pairs") == contents(tmp_path / "passing" / "pairs")
    assert proxy.count("GET", ".jpg" if kind == "folder" else ".tar") == (2 if kind == "folder" else 1)


@pytest.mark.parametrize("fault", ["errors", "slow-downs", "broken connections", "truncated bodies", "wrong bytes"])
def test_faults_of_a_listing_lose_no_row(proxy, tmp_path, fault):
    FORMATS["folder"].write(tmp_path / "source")
    url = proxy.server.put_folder(tmp_path / "source", "faults/listing")
    s3 = proxy.server.config(tmp_path / "cache", endpoint=proxy.endpoint, attempts=2)
    proxy.faults = [replace(FAULTS[fault][0], path="list-type=2")]
    counts = take_in(url, "folder", {"captions": "sidecar"}, tmp_path / "out", s3)
    assert (counts["rows"], counts["quarantined"], proxy.faults) == (8, {}, [])
    proxy.faults = [replace(FAULTS[fault][0], path="list-type=2", times=None)]
    with pytest.raises(ObjectStoreError, match=f"^s3://{BUCKET}/faults/listing/: .*, in the last of 2 attempts"):
        take_in(url, "folder", {"captions": "sidecar"}, tmp_path / "again", s3)
    assert not (tmp_path / "again" / "pairs").exists()


def test_a_place_that_holds_nothing_says_so(server, tmp_path):
    for where, s3 in ((tmp_path / "empty", None), (f"s3://{BUCKET}/empty", server.config(tmp_path))):
        for kind in ("folder", "tars", "parquet", "flickr"):
            with pytest.raises(SourceError, match="empty: no such folder, or nothing in it"):
                take_in(where, kind, {}, tmp_path / "out", s3)
    server.put("texts-only/readme.txt", b"x")
    with pytest.raises(SourceError, match=r"no \.tar in it"):
        take_in(f"s3://{BUCKET}/texts-only", "tars", {}, tmp_path / "out", server.config(tmp_path))


def test_names_never_lead_out_of_a_place_on_s3(server, tmp_path):
    server.put("inside/a.png", picture(1))
    server.put("secret.png", picture(2))
    rows = "image,caption\na.png,x\n../secret.png,x\n/secret.png,x\ngone.png,x\n"
    server.put("inside/captions.csv", rows.encode())
    take_in(f"s3://{BUCKET}/inside", "folder", {}, tmp_path / "out", server.config(tmp_path / "cache"))
    assert refused(tmp_path / "out") == {"outside_folder": 2, "missing_image": 1}
    place = open_place(f"s3://{BUCKET}/inside/", server.config(tmp_path))
    assert list(place.names()) == ["a.png", "captions.csv"] and place.url("a.png") == f"s3://{BUCKET}/inside/a.png"
    assert io.BytesIO(place.read("a.png")).getvalue() == picture(1)
