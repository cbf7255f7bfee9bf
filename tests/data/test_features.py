import json
import pickle

import numpy as np
import pytest
from data_samples import open_data_set, picture

from blip_pipelines.data import storage
from blip_pipelines.data.features import FeatureCache, expected_bytes
from blip_pipelines.data.images import decode
from blip_pipelines.data.storage import StorageError
from blip_pipelines.data.transforms import ImageConfig, to_pixels

CONFIG = ImageConfig(size=8)
THREE_VIEWS = ImageConfig(size=8, views=3)


def mean_rows(pixels: np.ndarray) -> np.ndarray:
    """A tower of 8 tokens (rows of the picture) and 3 channels."""
    return pixels.mean(3).transpose(0, 2, 1).astype(np.float32)


class Counting:
    def __init__(self):
        self.images = 0

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        self.images += len(pixels)
        return mean_rows(pixels)


def create(folder, config=CONFIG, encode=mean_rows, tower="t", **options):
    return FeatureCache.create(folder / "cache", folder / "images", config, tower, encode, batch_images=3, **options)


def expected(number: int) -> np.ndarray:
    return mean_rows(to_pixels(decode(picture(number), limits=None), 8)[None])[0].astype(np.float16)


def test_features_of_a_key_are_those_of_its_evaluation_view(tmp_path):
    pairs = open_data_set(tmp_path, [4, 5])
    cache = create(tmp_path, THREE_VIEWS)
    assert (len(cache), cache.views, cache.tokens, cache.width) == (9, 3, 8, 3)
    found = cache.read(pairs.keys[[8, 0, 3, 8]])
    assert found.dtype == np.float16
    assert np.array_equal(found, np.stack([expected(number) for number in (8, 0, 3, 8)]))
    assert cache.read([]).shape == (0, 8, 3)


def test_further_views_are_augmented_fixed_and_independent_of_batching(tmp_path):
    pairs = open_data_set(tmp_path, [4, 3])
    first = create(tmp_path, THREE_VIEWS)
    again = FeatureCache.create(tmp_path / "b", tmp_path / "images", THREE_VIEWS, "t", mean_rows, batch_images=2)
    views = [first.read(pairs.keys, view) for view in range(3)]
    for view in range(3):
        assert np.array_equal(views[view], again.read(pairs.keys, view))
    assert not np.array_equal(views[0], views[1]) and not np.array_equal(views[1], views[2])


def test_nothing_is_computed_twice(tmp_path):
    open_data_set(tmp_path, [4, 3])
    encode = Counting()
    create(tmp_path, encode=encode)
    create(tmp_path, encode=encode)
    assert encode.images == 7


def test_another_tower_view_or_image_set_gets_another_folder(tmp_path):
    open_data_set(tmp_path / "a", [2])
    open_data_set(tmp_path / "b", [3])
    folders = {
        create(tmp_path / "a").folder,
        create(tmp_path / "a", tower="other").folder,
        create(tmp_path / "a", config=ImageConfig(size=9)).folder,
        FeatureCache.create(tmp_path / "a/cache", tmp_path / "b/images", CONFIG, "t", mean_rows).folder,
    }
    assert len(folders) == 4 and len({folder.parent for folder in folders}) == 1


def test_a_killed_run_goes_on_after_its_last_finished_shard(tmp_path):
    pairs = open_data_set(tmp_path, [4, 5])

    def dies(pixels):
        if encode.images >= 6:
            raise KeyboardInterrupt
        return encode(pixels)

    encode = Counting()
    with pytest.raises(KeyboardInterrupt):
        create(tmp_path, encode=dies)
    rest = Counting()
    cache = create(tmp_path, encode=rest)
    assert rest.images == 5
    assert np.array_equal(cache.read(pairs.keys[[0, 8]]), [expected(0), expected(8)])
    cache.verify()
    assert not [path for path in cache.folder.iterdir() if path.name.startswith(".")]


def test_equal_runs_give_equal_bytes(tmp_path):
    open_data_set(tmp_path, [2, 2])
    one = create(tmp_path).folder
    two = FeatureCache.create(tmp_path / "b", tmp_path / "images", CONFIG, "t", mean_rows, batch_images=1).folder
    assert storage.content_hash(one) == storage.content_hash(two)


def test_damage_is_named(tmp_path):
    open_data_set(tmp_path, [2, 2])
    cache = create(tmp_path)
    file = cache.folder / "00001.npy"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    FeatureCache(cache.folder)
    with pytest.raises(StorageError, match=r"00001\.npy.*changed"):
        cache.verify()
    file.write_bytes(content[:-1])
    with pytest.raises(StorageError, match=r"00001\.npy.*remove the folder"):
        FeatureCache(cache.folder)
    index = json.loads((cache.folder / "index.json").read_text())
    index["shape"] = [1, 3, 8]
    (cache.folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(StorageError, match="does not match its own hash"):
        FeatureCache(cache.folder)


def test_unknown_images_and_overflow_are_refused(tmp_path):
    open_data_set(tmp_path, [2])
    with pytest.raises(StorageError, match="no features of image 'nobody'"):
        create(tmp_path).read(["nobody"])
    with pytest.raises(ValueError, match=r"00000\.tar.*not finite"), np.errstate(over="ignore"):
        create(tmp_path, tower="loud", encode=lambda pixels: mean_rows(pixels) + 1e6)


def test_the_size_is_known_beforehand(tmp_path):
    open_data_set(tmp_path, [4, 3])
    cache = create(tmp_path, THREE_VIEWS)
    stored = sum(file.stat().st_size for file in cache.folder.glob("*.npy"))
    headers = 2 * 128
    assert stored == expected_bytes(tmp_path / "images", THREE_VIEWS, 8, 3) + headers


def test_a_pickled_cache_carries_no_features(tmp_path):
    pairs = open_data_set(tmp_path, [40])
    cache = create(tmp_path)
    before = len(pickle.dumps(cache))
    cache.read(pairs.keys)
    content = pickle.dumps(cache)
    assert len(content) == before
    assert np.array_equal(pickle.loads(content).read(pairs.keys), cache.read(pairs.keys))  # noqa: S301  our own bytes
