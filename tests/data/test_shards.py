import errno
import tarfile
from pathlib import Path

import pytest
from data_samples import picture

from blip_pipelines.data import storage
from blip_pipelines.data.shards import ShardReader, ShardWriter, read_image, read_manifest, verify, write_manifest
from blip_pipelines.data.storage import StorageError


def write(folder: Path, numbers, shard_images: int = 4):
    with ShardWriter(folder, shard_images=shard_images) as writer:
        stored = [writer.add(picture(number)) for number in numbers]
    write_manifest(folder, writer.shards)
    return stored


def test_every_image_is_one_seek_away(tmp_path):
    stored = write(tmp_path, range(10))
    assert [image.shard for image in stored] == [0] * 4 + [1] * 4 + [2] * 2
    reader = ShardReader(tmp_path)
    for number, image in enumerate(stored):
        content = reader.read(image.shard, image.offset, image.size)
        assert content == picture(number) == read_image(tmp_path, image.shard, image.offset, image.size)
        assert image.key == storage.sha256(content)


def test_tarfile_reads_the_same_members(tmp_path):
    stored = write(tmp_path, range(4))
    with tarfile.open(tmp_path / "00000.tar") as tar:
        members = tar.getmembers()
        assert [(m.name, m.offset_data, m.size) for m in members] == [(s.member, s.offset, s.size) for s in stored]
        assert {(m.mtime, m.uid, m.gid, m.uname, m.mode) for m in members} == {(0, 0, 0, "", 0o644)}
        assert tar.extractfile(members[2]).read() == picture(2)


def test_webdataset_reads_the_same_images(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    stored = write(tmp_path, range(5))
    urls = [str(tmp_path / name) for name in ("00000.tar", "00001.tar")]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [image.key for image in stored]
    assert [sample["png"] for sample in samples] == [picture(number) for number in range(5)]


def test_equal_images_give_equal_bytes(tmp_path):
    write(tmp_path / "a", range(6))
    write(tmp_path / "b", range(6))
    assert storage.content_hash(tmp_path / "a") == storage.content_hash(tmp_path / "b")
    assert (tmp_path / "a" / "00001.tar").read_bytes() == (tmp_path / "b" / "00001.tar").read_bytes()


def test_a_repeat_within_a_shard_is_stored_once(tmp_path):
    first, again, _ = write(tmp_path, [1, 1, 2])
    assert first == again
    assert read_manifest(tmp_path)[0].images == 2


def test_appending_continues_the_numbering(tmp_path):
    write(tmp_path, range(4))
    old = read_manifest(tmp_path)
    with ShardWriter(tmp_path, first_shard=len(old)) as writer:
        assert writer.add(picture(9)).shard == 1
    write_manifest(tmp_path, old + writer.shards)
    verify(tmp_path)


def test_verification_names_the_shard_that_changed(tmp_path):
    write(tmp_path, range(8))
    verify(tmp_path)
    path = tmp_path / "00001.tar"
    content = bytearray(path.read_bytes())
    content[600] ^= 1
    path.write_bytes(content)
    verify(tmp_path, hashes=False)
    with pytest.raises(StorageError, match=r"00001\.tar.*run ingestion again"):
        verify(tmp_path)
    path.write_bytes(content[:-512])
    with pytest.raises(StorageError, match=r"00001\.tar"):
        verify(tmp_path, hashes=False)
    path.unlink()
    with pytest.raises(StorageError, match=r"00001\.tar.*missing"):
        verify(tmp_path)


def test_reading_a_missing_or_cut_shard_names_it(tmp_path):
    stored = write(tmp_path, range(8))
    (tmp_path / "00000.tar").unlink()
    (tmp_path / "00001.tar").write_bytes(b"short")
    for image in (stored[0], stored[-1]):
        with pytest.raises(StorageError, match=rf"0000{image.shard}\.tar"):
            read_image(tmp_path, image.shard, image.offset, image.size)


def test_failure_while_writing_leaves_no_unfinished_shard(tmp_path):
    with pytest.raises(KeyboardInterrupt), ShardWriter(tmp_path, shard_images=2) as writer:
        for number in range(3):
            writer.add(picture(number))
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["00000.tar"]


def test_a_full_disk_names_the_shard(tmp_path, monkeypatch):
    def full(self, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ShardWriter, "_write", full)
    with pytest.raises(StorageError, match=r"00000\.tar.*No space left"), ShardWriter(tmp_path) as writer:
        writer.add(picture(0))
    assert list(tmp_path.iterdir()) == []


def test_a_reader_survives_more_shards_than_it_keeps_open(tmp_path):
    stored = write(tmp_path, range(70), shard_images=1)
    reader = ShardReader(tmp_path)
    for _ in range(2):
        for number, image in enumerate(stored):
            assert reader.read(image.shard, image.offset, image.size) == picture(number)
    assert len(reader._handles) <= 64
