import threading
import time
from contextlib import suppress

import pytest
from object_store_samples import BUCKET, Fault

from blip_pipelines.data import storage
from blip_pipelines.data.object_cache import ObjectCache
from blip_pipelines.data.object_requests import ObjectMissingError
from blip_pipelines.data.storage import StorageError


def cache(proxy, folder, limit=10_000):
    return ObjectCache(proxy.server.config(folder / "cache", endpoint=proxy.endpoint, cache_bytes=limit))


def put(server, number, size=1000):
    content = bytes([number]) * size
    return server.put(f"cached/{number}", content), size, storage.sha256(content), 0, size, storage.sha256(content)


def held(folder):
    total = 0
    for path in (folder / "cache").iterdir():
        with suppress(FileNotFoundError):  # let go meanwhile
            total += path.stat().st_size if path.is_file() and not path.name.startswith(".") else 0
    return total


def test_an_object_is_fetched_once_by_however_many_ask(proxy, tmp_path):
    wanted = put(proxy.server, 1)
    readers = [cache(proxy, tmp_path) for _ in range(8)]  # as of so many processes
    threads = [threading.Thread(target=reader.read, args=wanted) for reader in readers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert proxy.count("GET") == 1
    assert cache(proxy, tmp_path).read(*wanted[:3], 10, 5) == bytes([1]) * 5
    assert proxy.count("GET") == 1


def test_what_was_used_longest_ago_goes_and_the_bound_holds(proxy, tmp_path):
    objects = [put(proxy.server, number) for number in range(6)]
    reader = cache(proxy, tmp_path, limit=3500)
    for wanted in objects[:3]:
        reader.read(*wanted)
    reader.read(*objects[0])  # used again
    for wanted in objects[3:]:
        reader.read(*wanted)
        assert held(tmp_path) <= 3500
        reader.read(*objects[0])
    assert proxy.count("GET") == 6  # the first never went
    reader.read(*objects[1])
    assert proxy.count("GET") == 7


def test_a_changed_object_is_another_one(proxy, tmp_path):
    reader = cache(proxy, tmp_path)
    url = proxy.server.put("changing", b"old")
    assert reader.read(url, 3, "tag of the old", 0, 3) == b"old"
    proxy.server.put("changing", b"new")
    assert reader.read(url, 3, "tag of the new", 0, 3) == b"new"


def test_an_object_that_cannot_be_had_leaves_nothing_and_may_come_later(proxy, tmp_path):
    with pytest.raises(StorageError, match=f"s3://{BUCKET}/cached/1: 20,000 bytes, the cache may hold 10,000; raise"):
        cache(proxy, tmp_path).read(*put(proxy.server, 1, 20_000))
    wanted = put(proxy.server, 2)
    proxy.faults = [Fault("vanish")]
    with pytest.raises(ObjectMissingError, match="cached/2"):
        cache(proxy, tmp_path).read(*wanted)
    assert held(tmp_path) == 0
    assert cache(proxy, tmp_path).read(*put(proxy.server, 2)) == bytes([2]) * 1000


def test_fetches_that_run_at_once_leave_room_for_one_another(proxy, tmp_path, monkeypatch):
    reader, most = cache(proxy, tmp_path, limit=2500), []
    download = reader.store.download

    def slowly(url, path, sha256):
        time.sleep(0.05)  # long enough for all to have begun, if there were room
        download(url, path, sha256)
        most.append(held(tmp_path))

    monkeypatch.setattr(reader.store, "download", slowly)
    objects = [put(proxy.server, number) for number in range(6)]
    threads = [threading.Thread(target=reader.read, args=wanted) for wanted in objects]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    assert len(most) >= 6 and max(most) <= 2500


def test_room_kept_by_a_process_that_is_gone_is_taken_back(proxy, tmp_path):
    reader, wanted = cache(proxy, tmp_path, limit=1500), put(proxy.server, 1)
    reader.read(*put(proxy.server, 2))
    (tmp_path / "cache" / f".{'0' * 32}.{2**22 + 1}.room").write_bytes(b"\0" * 1000)  # no such process
    assert reader.read(*wanted) == bytes([1]) * 1000
    assert held(tmp_path) == 1000
