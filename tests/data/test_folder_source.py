import json

import pytest
from data_samples import picture

from blip_pipelines.config import ConfigError
from blip_pipelines.data.places import Folder
from blip_pipelines.data.records import Record
from blip_pipelines.data.sources import Quarantined, SourceError
from blip_pipelines.data.sources.folder import FolderConfig, FolderSource


def _images(folder, *names):
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number))


def _read(folder, **options):
    """(member, split) -> captions, and member -> reason."""
    items = list(FolderSource(Folder(folder), FolderConfig(**options)).records())
    kept = {(item.member, item.split): item.captions for item in items if isinstance(item, Record)}
    refused = [(item.member, item.reason) for item in items if isinstance(item, Quarantined)]
    return kept, refused


def test_csv_rows_become_records_by_image_and_split(tmp_path):
    _images(tmp_path, "a.png", "deep/b.png")
    (tmp_path / "captions.csv").write_text(
        "image,caption,origin,split,language,category\n"
        'a.png,"a crab, red",human,train,en, sea  animals \n'
        "./a.png,crab,,train,,\n"
        "deep/b.png,a house,,test,,7\n",
        "utf-8",
    )
    kept, refused = _read(tmp_path)
    assert not refused
    assert [(c.text, c.origin, c.language, c.category) for c in kept["a.png", "train"]] == [
        ("a crab, red", "human", "en", "sea animals"),
        ("crab", "web", None, None),
    ]
    assert kept["deep/b.png", "test"][0].category == "7"
    assert kept["deep/b.png", "test"][0].text == "a house"


def test_columns_and_default_origin_are_the_users(tmp_path):
    _images(tmp_path, "a.png")
    (tmp_path / "texts.csv").write_text("file,alt\na.png,a crab\n")
    kept, _ = _read(tmp_path, captions="texts.csv", columns={"image": "file", "caption": "alt"}, origin="human")
    assert kept["a.png", None][0].origin == "human"


def test_emoji_and_right_to_left_text_are_kept_as_they_are(tmp_path):
    _images(tmp_path, "a.png")
    text = "🦀 سلطعون أحمر"
    (tmp_path / "captions.csv").write_bytes(b"\xef\xbb\xbf" + f"image,caption\na.png,{text}\n".encode())
    assert _read(tmp_path)[0]["a.png", None][0].text == text


def test_each_bad_csv_row_is_lost_alone_and_by_name(tmp_path):
    _images(tmp_path, "a.png", "b.png", "c.png", "d.png", "unnamed.png")
    (tmp_path / "captions.csv").write_bytes(
        b"image,caption,origin,split\n"
        b"a.png,caf\xe9,web,train\n"  # Latin-1
        b"b.png,one field too few,web\n"
        b"b.png,a robot wrote it,robot,train\n"
        b"c.png,for development,web,dev\n"
        b"gone.png,there is no such file,web,train\n"
        b"../secret.png,up and out,web,train\n"
        b"/etc/hostname,elsewhere,web,train\n"
        b",no image,web,train\n"
        b"\n"
        b"d.png,good,web,train\n"
    )
    kept, refused = _read(tmp_path)
    assert list(kept) == [("d.png", "train")]
    assert sorted(refused) == [
        ("../secret.png", "outside_folder"),
        ("/etc/hostname", "outside_folder"),
        ("a.png", "invalid_utf8"),
        ("b.png", "bad_origin"),
        ("c.png", "bad_split"),
        ("captions.csv, line 3", "bad_row"),
        ("captions.csv, line 9", "bad_row"),
        ("gone.png", "missing_image"),
        ("unnamed.png", "no_caption"),
    ]


def test_a_link_out_of_the_folder_is_not_followed(tmp_path):
    folder = tmp_path / "folder"
    _images(folder, "a.png")
    _images(tmp_path, "secret.png")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "inside.png").symlink_to(folder / "a.png")
    (folder / "circle.png").symlink_to(folder / "circle.png")
    (folder / "captions.csv").write_text("image,caption\nlink.png,x\ninside.png,x\ncircle.png,x\na.png,x\n")
    kept, refused = _read(folder)
    assert list(kept) == [("inside.png", None), ("a.png", None)]
    assert sorted(refused) == [("circle.png", "missing_image"), ("link.png", "outside_folder")]


def test_a_huge_field_does_not_end_the_file(tmp_path):
    _images(tmp_path, "a.png", "b.png")
    (tmp_path / "captions.csv").write_text(f"image,caption\na.png,{'x' * 200_000}\nb.png,good\n")
    kept, refused = _read(tmp_path)
    assert len(kept["a.png", None][0].text) == 200_000  # ingestion judges its length
    assert ("b.png", None) in kept and not refused


def test_each_bad_json_line_is_lost_alone(tmp_path):
    _images(tmp_path, "a.png", "b.png")
    lines = [
        json.dumps({"image": "a.png", "caption": "a crab", "origin": "human"}).encode(),
        b'{"image": "a.png", "caption": ',
        b'{"image": "a.png", "caption": "caf\xe9"}',
        b'["a.png", "a crab"]',
        b'{"image": "a.png", "caption": 7}',
        b'{"image": "a.png"}',
        b'{"image": "a.png", "caption": "half a \\ud800 character"}',
        b"[" * 100_000,
        b"",
        json.dumps({"image": "b.png", "caption": "ein Haus", "language": "de", "split": "val"}).encode(),
    ]
    (tmp_path / "captions.jsonl").write_bytes(b"\n".join(lines))
    kept, refused = _read(tmp_path, captions="captions.jsonl")
    assert [caption.text for caption in kept["a.png", None]] == ["a crab"]
    assert kept["b.png", "val"][0].language == "de"
    reasons = [reason for _, reason in refused]
    assert sorted(reasons) == ["bad_json"] * 2 + ["bad_row"] * 3 + ["invalid_utf8"] * 2


def test_a_category_may_be_a_number_and_one_that_is_no_word_costs_no_row(tmp_path):
    _images(tmp_path, "a.png", "b.png", "c.png", "d.png")
    values = [7, ["animals"], "\ud800", None]
    lines = [
        {"image": f"{name}.png", "caption": "x", "kind": value} for name, value in zip("abcd", values, strict=True)
    ]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    kept, refused = _read(tmp_path, captions="captions.jsonl", columns={"category": "kind"})
    assert not refused
    assert [kept[f"{name}.png", None][0].category for name in "abcd"] == ["7", None, None, None]


def test_sidecars_give_a_caption_a_line(tmp_path):
    _images(tmp_path, "a.png", "deep/b.png", "alone.png", "empty.png")
    (tmp_path / "a.txt").write_bytes("a crab\n\nخط\n".encode() + b"caf\xe9\n")
    (tmp_path / "deep" / "b.txt").write_text("a house")
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "stray.txt").write_text("no image of this name")
    kept, refused = _read(tmp_path, captions="sidecar", origin="human")
    assert [(c.text, c.origin) for c in kept["a.png", None]] == [("a crab", "human"), ("خط", "human")]
    assert kept["deep/b.png", None][0].text == "a house"
    assert sorted(refused) == [
        ("a.png", "invalid_utf8"),
        ("alone.png", "no_caption"),
        ("empty.png", "no_caption"),
        ("stray.txt", "missing_image"),
    ]


def test_the_listing_changes_with_the_bytes_of_an_image(tmp_path):
    _images(tmp_path, "a.png", "b.png")
    (tmp_path / "captions.csv").write_text("image,caption\na.png,x\nb.png,y\n")
    before = {entry.member: entry for entry in FolderSource(Folder(tmp_path), FolderConfig()).listing()}
    (tmp_path / "a.png").write_bytes(picture(9))
    after = {entry.member: entry for entry in FolderSource(Folder(tmp_path), FolderConfig()).listing()}
    assert before["a.png"] != after["a.png"] and before["b.png"] == after["b.png"]


def test_a_folder_that_cannot_be_read_at_all_says_what_to_do(tmp_path):
    with pytest.raises(SourceError, match="no such folder"):
        FolderSource(Folder(tmp_path / "nowhere"), FolderConfig())
    _images(tmp_path, "a.png")
    with pytest.raises(SourceError, match=r"no captions file.*'sidecar'"):
        FolderSource(Folder(tmp_path), FolderConfig())
    (tmp_path / "captions.csv").write_text("picture,text\na.png,x\n")
    with pytest.raises(SourceError, match=r"no column 'image' among picture, text.*columns\.image"):
        list(FolderSource(Folder(tmp_path), FolderConfig()).records())
    with pytest.raises(ConfigError, match="'robot' is not one of"):
        FolderConfig(origin="robot")
    with pytest.raises(ConfigError, match="'picture' is no field"):
        FolderConfig(columns={"picture": "x"})
