"""Features of a frozen image encoder, computed once per stored image and read back by key.

Trades disk for time: a frozen tower would otherwise see every image again each epoch. Augmentation shrinks to V fixed
views of an image, of which view 0 is the evaluation view. One float16 array per tar shard, each written atomically, so
that a killed run goes on where it was; the folder is named by all that decides its content.
"""

import json
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from blip_pipelines.data import shards, storage
from blip_pipelines.data.images import decode
from blip_pipelines.data.order import draw
from blip_pipelines.data.quality import index_path
from blip_pipelines.data.storage import StorageError
from blip_pipelines.data.transforms import ImageConfig, augment, to_pixels

INDEX = "index.json"
_REMEDY = "remove the folder; the stage that uses it computes it again"

# (B, 3, S, S) uint8, or float16 features of a cache below, -> (B, N, P) floating point
Encode = Callable[[np.ndarray], np.ndarray]


class FeatureCache:
    """Features (N, P) float16 of V views of every image of an images folder, memory-mapped."""

    def __init__(self, folder: Path):
        """Open a finished cache; sizes and the index are checked here, contents by `verify`.

        Raises:
            StorageError: the cache is missing, unfinished or damaged.
        """
        index = storage.read_json(folder / INDEX)
        if index.get("sha256") != _hash_of({name: value for name, value in index.items() if name != "sha256"}):
            raise StorageError(f"{folder / INDEX}: does not match its own hash; {_REMEDY}")
        self.folder, self.identity = folder, index["identity"]
        self.views, self.tokens, self.width = index["shape"]
        self._files = [folder / entry["name"] for entry in index["files"]]
        self._hashes = [entry["sha256"] for entry in index["files"]]
        self._place: dict[str, tuple[int, int]] = {}
        for number, (file, entry) in enumerate(zip(self._files, index["files"], strict=True)):
            if not file.is_file() or file.stat().st_size != entry["bytes"]:
                raise StorageError(f"{file}: missing or not of {entry['bytes']} bytes; {_REMEDY}")
            self._place.update((key, (number, row)) for row, key in enumerate(entry["keys"]))
        self._keys = {entry["name"]: entry["keys"] for entry in index["files"]}
        self._arrays: dict[int, np.ndarray] = {}

    @classmethod
    def create(
        cls,
        root: Path,
        images: Path,
        config: ImageConfig,
        tower_hash: str,
        encode: Encode,
        batch_images: int = 64,
        below: "FeatureCache | None" = None,
    ) -> "FeatureCache":
        """Open the cache of these images, tower and views under `root`; compute what is missing of it.

        Args:
            root: holds one folder per cache.
            images: folder of tar shards; every image in it gets features, whatever pairs use it.
            config: size of the views, their number, and how views after the first are augmented.
            tower_hash: names the weights and code of the encoder.
            encode: (B, 3, S, S) uint8 to (B, N, P); deterministic, called with at most `batch_images` images.
            below: features of the same images and views that `encode` takes in place of pixels.

        Raises:
            StorageError: the disk is full, or an image shard is damaged.
            ValueError: features are not finite in float16.
        """
        folder, identity = _named(root, images, config, tower_hash)
        if not (folder / INDEX).exists():
            entries = [_fill(folder, images, shard, config, encode, batch_images, below) for shard in _shards(images)]
            shapes = {tuple(entry.pop("shape")) for entry in entries}
            if len(shapes) != 1:
                raise StorageError(f"{folder}: shards hold features of shapes {sorted(shapes)}; {_REMEDY}")
            index = {"identity": identity, "shape": shapes.pop(), "files": entries}
            storage.write_json(folder / INDEX, {**index, "sha256": _hash_of(index)})
        return cls(folder)

    def __len__(self) -> int:
        return len(self._place)

    def verify(self, part: tuple[int, int] = (0, 1)) -> None:
        """Compare files with the hashes taken when they were written.

        Args:
            part: (i, n), every n-th file from the i-th on: the share of one of n processes.

        Raises:
            StorageError: names the file that changed.
        """
        for file, expected in list(zip(self._files, self._hashes, strict=True))[part[0] :: part[1]]:
            if storage.sha256_file(file) != expected:
                raise StorageError(f"{file}: content changed since it was written; {_REMEDY}")

    def places(self, keys: Iterable[str]) -> np.ndarray:
        """(B, 2) int64: file and row of each image key, for `gather`.

        Raises:
            StorageError: an image has no features here.
        """
        try:
            return np.array([self._place[key] for key in keys], np.int64).reshape(-1, 2)
        except KeyError as error:
            raise StorageError(f"{self.folder}: no features of image {error}; they are of other images") from error

    def gather(self, places: np.ndarray, views: np.ndarray) -> np.ndarray:
        """(B, N, P) float16: features at `places` (B, 2), of each the view in `views` (B,)."""
        features = np.empty((len(places), self.tokens, self.width), np.float16)
        for number in np.unique(places[:, 0]):
            here = places[:, 0] == number
            features[here] = self._array(int(number))[places[here, 1], views[here]]
        return features

    def batches(self, name: str, batch_images: int) -> Iterator[tuple[list[str], list[np.ndarray]]]:
        """Keys of one file in its order, and of each view their features, (B, N, P) float16."""
        keys = self._keys[name]
        for start in range(0, len(keys), batch_images):
            batch = keys[start : start + batch_images]
            yield batch, [self.read(batch, view) for view in range(self.views)]

    def read(self, keys: Sequence[str], view: int = 0) -> np.ndarray:
        """(B, N, P) float16: features of one view of the images with these keys."""
        return self.gather(self.places(keys), np.full(len(keys), view))

    def _array(self, number: int) -> np.ndarray:
        if number not in self._arrays:
            self._arrays[number] = np.load(self._files[number], mmap_mode="r", allow_pickle=False)
        return self._arrays[number]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_arrays": {}}  # a pickled memory map would carry its whole content


def fill(
    root: Path,
    images: Path,
    config: ImageConfig,
    tower_hash: str,
    encode: Encode,
    batch_images: int = 64,
    part: tuple[int, int] = (0, 1),
    below: FeatureCache | None = None,
) -> None:
    """Compute every n-th file of a cache, from the i-th on, where `part` is (i, n): the share of one of n processes.

    `FeatureCache.create`, called when all have done theirs, finds the files and writes the index.
    """
    folder = _named(root, images, config, tower_hash)[0]
    if not (folder / INDEX).exists():
        for shard in _shards(images)[part[0] :: part[1]]:
            _fill(folder, images, shard, config, encode, batch_images, below)


def place(root: Path, images: Path, config: ImageConfig, tower_hash: str) -> Path:
    """The folder that holds, or will hold, this cache."""
    return _named(root, images, config, tower_hash)[0]


def expected_bytes(images: Path, config: ImageConfig, tokens: int, width: int) -> int:
    """Disk that a cache of these images will take, for the caller to say before it is made."""
    return sum(shard.images for shard in _shards(images)) * config.views * tokens * width * 2


def _named(root: Path, images: Path, config: ImageConfig, tower_hash: str) -> tuple[Path, dict[str, Any]]:
    identity = {"tower": tower_hash, "views": asdict(config), "images": storage.content_hash(images)}
    return root / _hash_of(identity)[:16], identity


def _shards(images: Path) -> list[shards.Shard]:
    return [shard for shard in shards.read_manifest(images) if shard.images]


def _fill(
    folder: Path,
    images: Path,
    shard: shards.Shard,
    config: ImageConfig,
    encode: Encode,
    batch_images: int,
    below: FeatureCache | None,
) -> dict[str, Any]:
    """Compute one file, unless an earlier run finished it; returns its index entry."""
    file = folder / Path(shard.name).with_suffix(".npy").name
    note = file.with_suffix(".json")  # written last, so that its presence says the array is whole
    if note.exists():
        return storage.read_json(note)
    keys: list[str] = []
    shape: tuple[int, ...] = ()
    batches = _read_shard(images, shard, config, batch_images)
    if below is not None:
        batches = below.batches(file.name, batch_images)
    with storage.writing(file) as temporary, temporary.open("wb") as array:
        for batch_keys, views in batches:
            features = np.stack([np.asarray(encode(view)).astype("<f2") for view in views], 1)
            if not np.isfinite(features).all():
                raise ValueError(f"{shard.name}: features are not finite in float16; scale the outputs of the tower")
            if not keys:
                shape = features.shape[1:]
                header = {"descr": "<f2", "fortran_order": False, "shape": (shard.images, *shape)}
                np.lib.format.write_array_header_1_0(array, header)
            array.write(features.tobytes())
            keys += batch_keys
    found = {"name": file.name, "sha256": storage.sha256_file(file), "bytes": file.stat().st_size}
    entry = {**found, "keys": keys, "shape": list(shape)}
    storage.write_json(note, entry)
    return entry


def _read_shard(
    images: Path, shard: shards.Shard, config: ImageConfig, batch_images: int
) -> Iterator[tuple[list[str], list[np.ndarray]]]:
    """Keys of the images of a shard, in its order, and of each view their pixels, (B, 3, S, S) uint8."""
    reader, number = shards.ShardReader(images), int(Path(shard.name).stem)
    with reader.open(number) as file:
        is_foreign = reader.is_in_place(number) and index_path(images, number).exists()
        places = _places(images, number) if is_foreign else _walk(file)
        for start in range(0, len(places), batch_images):
            contents = [os.pread(file.fileno(), size, at) for at, size in places[start : start + batch_images]]
            keys = [storage.sha256(content) for content in contents]
            decoded = [decode(content, limits=None) for content in contents]
            views = []
            for view in range(config.views):
                pixels = [_view(image, key, view, config) for image, key in zip(decoded, keys, strict=True)]
                views.append(np.stack(pixels))
            yield keys, views


def _walk(file: BinaryIO) -> list[tuple[int, int]]:
    """(offset, size) of the members of a tar of ours."""
    with tarfile.open(fileobj=file, mode="r:") as tar:
        return [(member.offset_data, member.size) for member in tar.getmembers()]


def _places(images: Path, shard: int) -> list[tuple[int, int]]:
    """(offset, size) of the images that a tar in place has for the data set: its index knows them."""
    index = pq.read_table(index_path(images, shard), columns=["key", "offset", "size", "shard"])
    here = index.filter(pc.equal(index["shard"], shard)).group_by("key", use_threads=False)
    first = here.aggregate([("offset", "min"), ("size", "min")]).sort_by("offset_min")
    return list(zip(first["offset_min"].to_pylist(), first["size_min"].to_pylist(), strict=True))


def _view(image: Image.Image, key: str, view: int, config: ImageConfig) -> np.ndarray:
    if view == 0:
        return to_pixels(image, config.size)
    return augment(image, config, draw(0, view, "fixed view", int(key[:12], 16), 1, config.draws)[0])


def _hash_of(value: Any) -> str:
    return storage.sha256(json.dumps(value, sort_keys=True).encode())
