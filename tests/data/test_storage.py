import os

import pytest

from blip_pipelines.data import storage


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path):
    path = tmp_path / "manifest.json"
    storage.write_json(path, {"rows": 1})
    with pytest.raises(RuntimeError), storage.writing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert storage.read_json(path) == {"rows": 1}
    assert os.listdir(tmp_path) == ["manifest.json"]


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(storage.StorageError, match=r"shard\.tar: cannot write .*No space left"):
        storage.write_atomic(tmp_path / "shard.tar", b"bytes")
    assert os.listdir(tmp_path) == []


def test_equal_values_are_equal_bytes(tmp_path):
    storage.write_json(tmp_path / "a", {"x": 1, "y": "é"})
    storage.write_json(tmp_path / "b", {"y": "é", "x": 1})
    assert storage.sha256_file(tmp_path / "a") == storage.sha256_file(tmp_path / "b")


def test_a_folder_is_named_by_its_manifest_or_by_all_its_files(tmp_path):
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "a.txt").write_text("a")
    before = storage.content_hash(tmp_path / "plain")
    (tmp_path / "plain" / "a.txt").write_text("b")
    assert storage.content_hash(tmp_path / "plain") != before
    storage.write_json(tmp_path / "plain" / storage.MANIFEST, {"shards": []})
    manifest = storage.content_hash(tmp_path / "plain")
    assert manifest == storage.sha256_file(tmp_path / "plain" / storage.MANIFEST)


def test_publishing_replaces_the_older_folder(tmp_path):
    for name, text in (("final", "old"), ("staged", "new")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model").write_text(text)
    storage.publish(tmp_path / "staged", tmp_path / "final")
    assert (tmp_path / "final" / "model").read_text() == "new"
    assert os.listdir(tmp_path) == ["final"]


def test_broken_json_says_which_file_and_what_to_do(tmp_path):
    (tmp_path / "receipt.json").write_text("{")
    with pytest.raises(storage.StorageError, match=r"receipt\.json: not valid JSON"):
        storage.read_json(tmp_path / "receipt.json")
    with pytest.raises(storage.StorageError, match=r"missing\.json: missing; run the stage"):
        storage.read_json(tmp_path / "missing.json")
