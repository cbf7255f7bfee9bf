"""Training on a data set on S3 that is larger than the cache: the same batches as from disk, in the same order."""

import shutil
import time
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
from data_samples import tokenizer_json, write_data_set
from object_store_samples import BUCKET, Fault

from blip_pipelines.data.features import FeatureCache
from blip_pipelines.data.loader import DataError, DecodedPixels, FrozenFeatures, Loader
from blip_pipelines.data.order import Order
from blip_pipelines.data.pairs import Pairs
from blip_pipelines.data.prefetch import Prefetch
from blip_pipelines.data.shards import read_manifest, write_places
from blip_pipelines.data.storage import StorageError
from blip_pipelines.data.tokens import prune_vocabulary
from blip_pipelines.data.transforms import ImageConfig

pytestmark = pytest.mark.timeout(60)

IMAGES = [6] * 8
CONFIG = ImageConfig(size=16)


@pytest.fixture
def on_s3(proxy, tmp_path):
    """A data set whose shards lie on S3, behind a cache that holds three of the eight."""
    write_data_set(tmp_path / "disk", IMAGES)
    shutil.copytree(tmp_path / "disk", tmp_path / "s3")
    shards = read_manifest(tmp_path / "s3" / "images")
    urls = {}
    for shard in shards:
        path = tmp_path / "s3" / "images" / shard.name
        urls[shard.name] = proxy.server.put(f"streamed/{shard.name}", path.read_bytes())
        (tmp_path / "s3" / "content").mkdir(exist_ok=True)
        path.rename(tmp_path / "s3" / "content" / shard.name)
    held = 3 * shards[0].bytes
    config = proxy.server.config(tmp_path / "cache", endpoint=proxy.endpoint, cache_bytes=held, attempts=2)
    write_places(tmp_path / "s3" / "images", urls, config)
    return proxy, tmp_path


def open_pairs(folder):
    return Pairs.open(folder / "pairs", folder / "images").select(split="train")


def load(pairs, window=1, **options):
    order = Order(pairs.shard_rows, seed=3, window_shards=window)
    reader = DecodedPixels(pairs, CONFIG, seed=3, train=True)
    return Loader(
        pairs,
        order,
        reader,
        prune_vocabulary(tokenizer_json())[0],
        12,
        **{"steps": 16, **options},
        batch_samples_global=4,
    )


def arrays(steps):
    return [(b.pixels.numpy(), b.token_ids.numpy(), b.image_ids.numpy()) for (b,) in steps]


def check(found, expected, steps):
    """That these are the batches expected, so many."""
    assert len(found) == len(expected) == steps
    for one, other in zip(expected, found, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def held(folder):
    """Bytes in the cache, half-fetched objects included; the notes of room that is kept have a size and no blocks."""
    total = 0
    for path in (folder / "cache").iterdir():
        with suppress(FileNotFoundError):  # let go meanwhile
            total += path.stat().st_size if path.is_file() and path.suffix != ".room" else 0
    return total


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_from_disk_and_the_cache_keeps_its_bound(on_s3, workers):
    _, folder = on_s3
    expected = arrays(load(open_pairs(folder / "disk")))
    limit, found = open_pairs(folder / "s3").cache_bytes, []
    for step in load(open_pairs(folder / "s3"), workers=workers):
        found += arrays([step])
        assert held(folder) <= limit
    check(found, expected, 16)  # an epoch has ten


def test_a_resume_reads_the_shards_of_its_position_alone(on_s3):
    proxy, folder = on_s3
    pairs = open_pairs(folder / "s3")
    whole = arrays(load(open_pairs(folder / "disk"), steps=8))
    assert all(
        np.array_equal(a, b)
        for one, other in zip(whole[7:], arrays(load(pairs, start_step=7, steps=8)), strict=True)
        for a, b in zip(one, other, strict=True)
    )
    needed = pairs.shards_of(Order(pairs.shard_rows, 3, 1).rows(28, 4))
    assert {path.rpartition("/")[2] for method, path, _ in proxy.requests if method == "GET"} == {
        f"{shard:05d}.tar" for shard in needed
    }


def test_shards_are_there_before_the_position_reaches_them(on_s3):
    proxy, folder = on_s3
    pairs = open_pairs(folder / "s3")
    order = Order(pairs.shard_rows, seed=3, window_shards=1)
    with Prefetch(pairs, order, samples=4, start_step=0, stop_step=10) as prefetch:
        for step in range(10):  # an epoch; most steps read two shards
            prefetch.advance(step)
            wanted = set(pairs.shards_of(order.rows(step * 4, 4)).tolist())
            deadline = time.monotonic() + 5
            while not all(is_fetched(proxy, shard) for shard in wanted):
                assert time.monotonic() < deadline
                time.sleep(0.01)
    fetched = [path for method, path, _ in proxy.requests if method == "GET"]
    assert len(fetched) == len(set(fetched)) == 8  # each once, none again


def is_fetched(proxy, shard):
    return any(method == "GET" and path.endswith(f"{shard:05d}.tar") for method, path, _ in list(proxy.requests))


def test_a_window_that_does_not_fit_the_cache_is_refused_before_training(on_s3):
    _, folder = on_s3
    load(open_pairs(folder / "s3"), window=3)
    with pytest.raises(StorageError, match=r"a window of 4 shards takes up to .* bytes, the cache of objects holds"):
        load(open_pairs(folder / "s3"), window=4)


def test_passing_faults_change_no_batch(on_s3):
    proxy, folder = on_s3
    kinds = ("status", "truncated", "wrong_bytes", "reset")
    proxy.faults = [Fault(kind, 1, "GET", f"{shard:05d}.tar") for shard, kind in enumerate(kinds)]
    proxy.faults += [Fault("status", 1, "GET", "00004.tar", 503, "SlowDown")]
    check(arrays(load(open_pairs(folder / "s3"))), arrays(load(open_pairs(folder / "disk"))), 16)
    assert not proxy.faults


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Fault("vanish"), "there is no such object"),
        (Fault("status", None), "the store answers 500 InternalError, in the last of 2 attempts"),
        (Fault("status", None, status=503, code="SlowDown"), "the store answers 503 SlowDown, in the last of 2"),
        (Fault("status", None, status=400, code="ExpiredToken"), "the credentials have expired; renew them"),
        (Fault("truncated", None), r"the answer broke off after \d+ of \d+ bytes"),
        (Fault("wrong_bytes", None), r"content is \w+, \w+ was expected, 2 times"),
    ],
    ids=["vanished", "errors", "slow-downs", "expired", "truncated", "wrong bytes"],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_cannot_be_had_ends_training_by_name_and_a_resume_skips_no_batch(on_s3, fault, message, workers):
    proxy, folder = on_s3
    pairs = open_pairs(folder / "s3")
    lost = int(pairs.shards_of(Order(pairs.shard_rows, 3, 1).rows(0, 24))[-1])  # needed in the sixth batch
    place = f"streamed/{lost:05d}.tar"
    content = (folder / "s3" / "content" / f"{lost:05d}.tar").read_bytes()
    proxy.faults = [replace(fault, path=place)]
    found = []
    with pytest.raises(DataError, match=rf"{lost:05d}.tar, member .*: s3://{BUCKET}/{place}: {message}"):
        for step in load(pairs, workers=workers):
            found += arrays([step])
    assert len(found) < 6
    proxy.faults = []
    proxy.server.put(place, content)
    found += arrays(load(open_pairs(folder / "s3"), workers=workers, start_step=len(found)))
    check(found, arrays(load(open_pairs(folder / "disk"))), 16)


def test_features_of_a_frozen_tower_are_computed_from_s3_and_then_read_without_it(on_s3):
    proxy, folder = on_s3
    encode = lambda pixels: pixels.mean(3).transpose(0, 2, 1).astype(np.float32)  # noqa: E731
    caches = [
        FeatureCache.create(folder / f"features {name}", folder / name / "images", CONFIG, "t", encode)
        for name in ("disk", "s3")
    ]
    keys = list(open_pairs(folder / "s3").keys)
    assert np.array_equal(caches[0].read(keys), caches[1].read(keys))
    proxy.requests.clear()
    pairs = open_pairs(folder / "s3")
    order = Order(pairs.shard_rows, seed=3, window_shards=8)  # a window that the cache of objects would not hold
    reader, tokenizer = FrozenFeatures(pairs, caches[1]), prune_vocabulary(tokenizer_json())[0]
    assert len(list(Loader(pairs, order, reader, tokenizer, 12, 4, steps=8))) == 8
    assert not proxy.requests
