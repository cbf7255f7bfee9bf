import csv
import io
import struct
import zlib
from collections import Counter
from dataclasses import replace
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_samples import encode, picture
from PIL import Image
from source_samples import EMOJI, write_wheels

from blip_pipelines.data import shard_jobs, storage
from blip_pipelines.data.gathered import IngestionError
from blip_pipelines.data.images import ImageLimits, decode
from blip_pipelines.data.ingest import DataSet, ingest
from blip_pipelines.data.ingestion_plan import IngestionConfig
from blip_pipelines.data.pairs import Pairs
from blip_pipelines.data.records import Caption, Record
from blip_pipelines.data.shards import verify
from blip_pipelines.data.sources import Entry, SourceConfig, open_source
from blip_pipelines.data.sources.emoji import STYLES
from blip_pipelines.data.splits import SplitConfig

FOLDER = SourceConfig("folder")


def _out(folder):
    return DataSet(folder / "images", folder / "pairs", folder / "quarantine.parquet", folder / "noise.parquet")


def _write_folder(folder, rows, header=("image", "caption", "origin", "split"), files=None):
    """`rows` of the captions file; images that `files` does not give are pictures numbered in order."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(dict.fromkeys(row[0] for row in rows)):
        (folder / name).write_bytes((files or {}).get(name) or picture(number))
    with (folder / "captions.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return folder


def _ingest(source, out, **options):
    config = IngestionConfig(source=FOLDER, workers=1, **options)
    return ingest(open_source(config, source), config, _out(out))


def _rows(out):
    table = pa.concat_tables(pq.read_table(path) for path in sorted((out / "pairs").glob("*.parquet")))
    return table.to_pylist()


def _refused(out):
    return {(row["member"], row["reason"]) for row in pq.read_table(out / "quarantine.parquet").to_pylist()}


def _account(out, counts):
    """Captions kept, and refused by reason, as the counts, the tables and the quarantine say alike."""
    refused = Counter(row["reason"] for row in pq.read_table(out / "quarantine.parquet").to_pylist())
    assert counts["rows"] == len(_rows(out)) and counts["quarantined"] == refused
    return counts["rows"], dict(refused)


def _bytes(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def _plain(count, split="train"):
    return [(f"{number}.png", f"thing {number}", "web", split) for number in range(count)]


def _png_header(width, height):
    """A PNG that says it is so large, with hardly any data."""
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"\0")),
        (b"IEND", b""),
    )
    body = b"".join(
        struct.pack(">I", len(d)) + kind + d + struct.pack(">I", zlib.crc32(kind + d)) for kind, d in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


def test_a_data_set_opens_and_gives_each_caption_its_image(tmp_path):
    source = _write_folder(tmp_path / "in", [*_plain(5), ("0.png", "another text", "human", "train"), *_plain(6)[5:]])
    counts = _ingest(source, tmp_path / "out", shard_images=3)
    assert counts["rows"] == 7 and counts["distinct_images"] == 6 and counts["origins"] == {"human": 1, "web": 6}
    manifest = storage.read_json(tmp_path / "out" / "pairs" / "manifest.json")
    assert counts == {name: value for name, value in manifest.items() if name not in ("images", "shards")}
    verify(tmp_path / "out" / "images")
    pairs = Pairs.open(tmp_path / "out" / "pairs", tmp_path / "out" / "images")
    found = {(str(member), text) for member, text in zip(pairs.column("member"), pairs.column("caption"), strict=True)}
    assert found == {(f"{n}.png", f"thing {n}") for n in range(6)} | {("0.png", "another text")}
    for row in range(len(pairs)):
        name = pairs.column("member")[row]
        assert pairs.image_bytes(row) == (source / name).read_bytes()  # plain RGB is stored as it is
        assert storage.sha256(pairs.image_bytes(row)) == pairs.keys[row]


HOSTILE = {
    "truncated.jpg": (lambda: encode(Image.new("RGB", (200, 200)), "JPEG")[:-400], "truncated"),
    "empty.png": (lambda: b"", "empty_file"),
    "text.jpg": (lambda: b"this is a text, whatever its name", "not_an_image"),
    "animated.gif": (
        lambda: encode(
            Image.new("RGB", (32, 32)), "GIF", save_all=True, append_images=[Image.new("RGB", (32, 32), "red")]
        ),
        "animated",
    ),
    "bomb.png": (lambda: _png_header(60_000, 60_000), "decompression_bomb"),
    "pixel.png": (lambda: encode(Image.new("RGB", (1, 1))), "too_small"),
    "line.png": (lambda: encode(Image.new("RGB", (20_000, 20))), "too_large"),
}


def test_what_is_no_picture_is_quarantined_by_name_and_reason_and_every_caption_counts(tmp_path):
    files = {name: make() for name, (make, _) in HOSTILE.items()}
    rows = [(name, text, "web", "train") for name in files for text in ("one", "two")] + _plain(1)
    source = _write_folder(tmp_path / "in", rows, files=files)
    (source / "empty.png").write_bytes(b"")
    counts = _ingest(source, tmp_path / "out")
    assert _refused(tmp_path / "out") == {(name, reason) for name, (_, reason) in HOSTILE.items()}
    assert _account(tmp_path / "out", counts) == (1, {reason: 2 for _, reason in HOSTILE.values()})  # of 15 captions


def test_what_is_wrong_with_the_captions_file_costs_its_own_rows_alone(tmp_path):
    source = _write_folder(tmp_path / "in", [*_plain(3), ("alone.png", "", "web", "train")])
    (tmp_path / "secret.png").write_bytes(picture(9))
    (source / "link.png").symlink_to(tmp_path / "secret.png")
    lines = (source / "captions.csv").read_bytes().splitlines()[:4]
    wrong = [
        b"gone.png,no such file,web,train",
        b"../secret.png,up and out,web,train",
        b"/etc/hostname,elsewhere,web,train",
        b"link.png,a link out,web,train",
        b"0.png,caf\xe9,web,train",
        b"1.png,a field too few,web",
        b"2.png,by a robot,robot,train",
        b"2.png,for development,web,dev",
    ]
    (source / "captions.csv").write_bytes(b"\n".join([*lines, *wrong]))
    expected = {
        "missing_image": 1,
        "outside_folder": 3,
        "invalid_utf8": 1,
        "bad_row": 1,
        "bad_origin": 1,
        "bad_split": 1,
        "no_caption": 1,  # the picture that no row names
    }
    assert sum(expected.values()) == len(wrong) + 1
    assert _account(tmp_path / "out", _ingest(source, tmp_path / "out")) == (3, expected)


def test_unusual_modes_and_rotations_are_converted_not_refused(tmp_path):
    ramp = np.linspace(0, 255, 32 * 24).astype(np.uint8).reshape(24, 32)
    upright = Image.Exif()
    upright[0x0112] = 6  # the camera was turned: the picture is 24 wide and 32 high
    files = {
        "cmyk.jpg": encode(Image.fromarray(ramp).convert("CMYK"), "JPEG"),
        "sixteen.png": encode(Image.fromarray(ramp.astype(np.uint16) * 257)),
        "palette.png": encode(Image.fromarray(ramp).convert("P")),
        "alpha.png": encode(Image.new("RGBA", (32, 24), (255, 0, 0, 0))),
        "turned.jpg": encode(Image.fromarray(ramp).convert("RGB"), "JPEG", exif=upright),
    }
    source = _write_folder(tmp_path / "in", [(name, name, "web", "train") for name in files], files=files)
    assert _account(tmp_path / "out", _ingest(source, tmp_path / "out")) == (len(files), {})
    pairs = Pairs.open(tmp_path / "out" / "pairs", tmp_path / "out" / "images")
    stored = {name: Image.open(io.BytesIO(pairs.image_bytes(row))) for row, name in enumerate(pairs.column("member"))}
    sizes = {row["member"]: (row["width"], row["height"]) for row in _rows(tmp_path / "out")}
    assert all(image.mode == "RGB" and image.size == sizes[name] for name, image in stored.items())
    assert sizes["turned.jpg"] == (24, 32) and not stored["turned.jpg"].getexif()
    assert stored["alpha.png"].getpixel((0, 0)) == (255, 255, 255)
    assert np.abs(np.asarray(stored["sixteen.png"])[..., 0].astype(int) - ramp).max() <= 1


def test_captions_that_no_model_should_see_are_quarantined_and_others_kept_as_written(tmp_path):
    texts = {"0.png": "  ", "1.png": "x" * 100_000, "2.png": "bell \x07", "3.png": "🦀 سلطعون", "4.png": "two\n lines "}
    source = _write_folder(tmp_path / "in", [(name, text, "web", "train") for name, text in texts.items()])
    counts = _ingest(source, tmp_path / "out")
    expected = {"empty_caption": 1, "long_caption": 1, "control_character": 1}
    assert _account(tmp_path / "out", counts) == (2, expected)
    assert _refused(tmp_path / "out") == {
        ("0.png", "empty_caption"),
        ("1.png", "long_caption"),
        ("2.png", "control_character"),
    }
    assert {row["caption"] for row in _rows(tmp_path / "out")} == {"🦀 سلطعون", "two lines"}


def test_an_exact_copy_is_stored_once_with_the_captions_of_both(tmp_path):
    rows = [("a.png", "a crab", "web", ""), ("b.png", "a red crab", "web", ""), ("b.png", "A  crab", "web", "")]
    source = _write_folder(tmp_path / "in", rows, files={"a.png": picture(1), "b.png": picture(1)})
    assert _ingest(source, tmp_path / "out")["distinct_images"] == 1
    kept = _rows(tmp_path / "out")
    assert len({(row["key"], row["shard"], row["offset"]) for row in kept}) == 1
    assert len(kept) == 2 and {reason for _, reason in _refused(tmp_path / "out")} == {"duplicate_caption"}


def test_pictures_that_become_equal_when_converted_are_one_image_over_shards(tmp_path):
    ramp = Image.fromarray(np.arange(32 * 32, dtype=np.uint32).astype(np.uint8).reshape(32, 32)).convert("RGB")
    files = {"bitmap.bmp": encode(ramp, "BMP"), "tagged.tiff": encode(ramp, "TIFF")}
    rows = [("bitmap.bmp", "one", "web", "train"), ("tagged.tiff", "two", "web", "train")]
    _ingest(_write_folder(tmp_path / "in", rows, files=files), tmp_path / "out", shard_images=1)
    kept = _rows(tmp_path / "out")
    assert len(kept) == 2 and len({(row["key"], row["shard"], row["offset"]) for row in kept}) == 1
    Pairs.open(tmp_path / "out" / "pairs", tmp_path / "out" / "images")


def test_an_image_claimed_by_two_splits_belongs_to_evaluation(tmp_path):
    files = {"a.png": picture(1), "b.png": picture(1), "c.png": picture(2), "d.png": picture(2)}
    rows = [
        ("a.png", "seen in training", "web", "train"),
        ("b.png", "held out", "human", "test"),
        ("c.png", "for choosing", "human", "val"),
        ("d.png", "for judging", "human", "test"),
        ("d.png", "without a split", "human", ""),
    ]
    _ingest(_write_folder(tmp_path / "in", rows, files=files), tmp_path / "out")
    kept = {(row["caption"], row["split"], row["subset"]) for row in _rows(tmp_path / "out")}
    assert kept == {("held out", "test", "all"), ("for judging", "test", "all"), ("without a split", "test", "all")}
    assert _refused(tmp_path / "out") == {("a.png", "in_evaluation"), ("c.png", "in_evaluation")}


def test_images_without_a_split_get_one_that_no_other_image_changes(tmp_path):
    config = SplitConfig(validation=0.3, test=0.3)
    _ingest(_write_folder(tmp_path / "few", _plain(20, "")), tmp_path / "out_few", splits=config)
    _ingest(_write_folder(tmp_path / "many", _plain(40, "")), tmp_path / "out_many", splits=config)
    few, many = ({row["member"]: row["split"] for row in _rows(tmp_path / out)} for out in ("out_few", "out_many"))
    assert few == {member: many[member] for member in few}
    assert set(many.values()) == {"train", "val", "test"}


def test_workers_and_repetition_change_no_byte(tmp_path):
    source = _write_folder(tmp_path / "in", _plain(12, ""))
    _ingest(source, tmp_path / "one", shard_images=4)
    _ingest(source, tmp_path / "one", shard_images=4)
    config = IngestionConfig(source=FOLDER, workers=2, shard_images=4)
    ingest(open_source(config, source), config, _out(tmp_path / "two"))
    assert _bytes(tmp_path / "one") == _bytes(tmp_path / "two")


class _Interrupted:
    """A source whose reading stops after some images, as by a kill."""

    name, credits, readers = "interrupted", (), 1

    def __init__(self, after):
        self.after, self.reads, self.place = after, Counter(), self

    def records(self):
        for number in range(12):
            read = partial(self._read, number)
            yield Record(f"{number}.png", read, (Caption(f"thing {number}"),), self.name, "train")

    def listing(self):
        return [Entry(f"{number}.png", 1, str(number)) for number in range(12)]

    def truth(self):
        return None

    def _read(self, number):
        if sum(self.reads.values()) == self.after:
            raise KeyboardInterrupt
        self.reads[number] += 1
        return picture(number)


def test_after_a_kill_finished_shards_are_not_done_again(tmp_path):
    config = IngestionConfig(workers=1, shard_images=4)
    with pytest.raises(KeyboardInterrupt):
        ingest(_Interrupted(after=6), config, _out(tmp_path / "killed"))
    (tmp_path / "killed" / "images" / ".00001.tar.half").write_bytes(b"what kill -9 leaves of an unfinished shard")
    resumed = _Interrupted(after=100)
    ingest(resumed, config, _out(tmp_path / "killed"))
    assert sum(resumed.reads.values()) == 8  # the second shard was not finished, the third not begun
    ingest(_Interrupted(after=100), config, _out(tmp_path / "whole"))
    assert _bytes(tmp_path / "killed") == _bytes(tmp_path / "whole")


def test_a_damaged_shard_or_other_limits_are_noticed_and_the_shard_is_written_anew(tmp_path):
    config = IngestionConfig(workers=1, shard_images=4)
    ingest(_Interrupted(after=100), config, _out(tmp_path))
    before = _bytes(tmp_path)
    (tmp_path / "images" / "00001.tar").write_bytes(b"damaged")
    again = _Interrupted(after=100)
    ingest(again, config, _out(tmp_path))
    assert sum(again.reads.values()) == 4 and _bytes(tmp_path) == before
    other = _Interrupted(after=100)
    ingest(other, replace(config, limits=ImageLimits(min_side=17)), _out(tmp_path))
    assert sum(other.reads.values()) == 12


def test_a_smaller_data_set_leaves_no_shard_of_a_larger_one(tmp_path):
    config = IngestionConfig(workers=1, shard_images=4)
    ingest(_Interrupted(after=100), config, _out(tmp_path))
    ingest(_Interrupted(after=100), replace(config, limit=4), _out(tmp_path))
    assert [path.name for path in sorted((tmp_path / "images").glob("*.tar"))] == ["00000.tar"]
    assert [path.name for path in sorted((tmp_path / "pairs").glob("*.parquet"))] == ["00000.parquet"]


def test_a_source_of_which_nothing_can_be_used_says_why(tmp_path):
    source = _write_folder(tmp_path / "in", [("a.png", "x", "web", "train")], files={"a.png": b"no image"})
    with pytest.raises(IngestionError, match="not_an_image 1"):
        _ingest(source, tmp_path / "out")


def test_a_killed_worker_says_what_to_do(tmp_path, monkeypatch):
    class Pool:
        def __init__(self, *_, **__): ...
        def __enter__(self):
            return self

        def __exit__(self, *_): ...
        def map(self, *_):
            raise shard_jobs.BrokenProcessPool

    monkeypatch.setattr(shard_jobs, "ProcessPoolExecutor", Pool)
    with pytest.raises(shard_jobs.WorkerDiedError, match=r"run again, with fewer `workers`"):
        ingest(_Interrupted(after=100), IngestionConfig(workers=2, shard_images=4), _out(tmp_path))


def test_the_embedded_default_ingests_with_its_truth_beside_it(tmp_path, monkeypatch):
    packages = write_wheels(tmp_path / "packages", monkeypatch)
    config = IngestionConfig(workers=1, shard_images=50)
    counts = ingest(open_source(config, packages), config, _out(tmp_path / "out"))
    rows = _rows(tmp_path / "out")
    truth = pq.read_table(tmp_path / "out" / "noise.parquet").to_pylist()
    web = {(row["key"], row["member"], row["caption"]) for row in rows if row["origin"] == "web"}
    assert {(row["key"], row["member"], row["caption"]) for row in truth} == web
    assert counts["quarantined"]["undrawn_tone"] == 5
    assert {(row["source"], row["member"].split("/")[0]) for row in rows} == {(name, name) for name in STYLES}
    assert {row["category"] for row in rows} == {category for _, category, _ in EMOJI.values()} - {"Component"}
    splits = {}
    for row in rows:
        splits.setdefault(row["key"], set()).add(row["split"])
    assert all(len(found) == 1 for found in splits.values())
    pairs = Pairs.open(tmp_path / "out" / "pairs", tmp_path / "out" / "images")
    sizes = {decode(pairs.image_bytes(row), limits=None).size for row in pairs.unique_images()}
    assert sizes == {(72, 72), (128, 128)}
