"""Tar shards of images: WebDataset layout, equal bytes from equal input, each image one seek away.

A tar costs up to a kilobyte of header and padding per image; for that, every tool that knows WebDataset, and tar
itself, reads what we wrote, and a training worker that knows (offset, size) never parses a header. The manifest says
what the shards are; where they lie is another matter: in its folder, unless `places.json` there says otherwise, as of
shards on S3 and of tars by another hand that are used in place.
"""

import hashlib
import os
import tarfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

from blip_pipelines import config as strict
from blip_pipelines.data import storage
from blip_pipelines.data.images import extension
from blip_pipelines.data.object_cache import ObjectCache
from blip_pipelines.data.object_requests import ObjectStoreConfig
from blip_pipelines.data.object_store import SCHEME
from blip_pipelines.data.storage import MANIFEST, StorageError

PLACES = "places.json"
_OPEN_SHARDS = 64  # file handles a reader keeps
_REMEDY = "restore it (`dvc checkout`, `dvc pull`) or run ingestion again"


@dataclass(frozen=True)
class Shard:
    """One entry of the images manifest."""

    name: str
    sha256: str
    images: int
    bytes: int


@dataclass(frozen=True)
class StoredImage:
    """Where an image lies: the columns of a pairs row that name it."""

    key: str  # sha256 of its bytes
    member: str
    shard: int
    offset: int
    size: int


def shard_name(shard: int) -> str:
    return f"{shard:05d}.tar"


class ShardWriter:
    """Writes images into `{shard:05d}.tar`, each shard atomically; `shards` lists the finished ones.

    Members are named by content (`<sha256>.<jpg|png|webp>`), so the same images in the same order give the same bytes;
    a repeat within a shard is stored once. Use it as a context manager: an exception leaves no unfinished shard.
    """

    def __init__(self, folder: Path, *, shard_images: int = 10_000, first_shard: int = 0):
        self.folder, self.shard_images = folder, shard_images
        self.shards: list[Shard] = []
        self._number = first_shard
        self._stored: dict[str, StoredImage] = {}
        self._writing: AbstractContextManager[Path] | None = None
        self._file: BinaryIO
        self._digest = hashlib.sha256()

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *failure: Any) -> None:
        if failure[0] is None:
            self.next_shard()
        elif self._writing is not None:
            self._file.close()
            self._writing.__exit__(*failure)

    def add(self, content: bytes) -> StoredImage:
        """Append one encoded image (JPEG, PNG or WebP bytes) and say where it lies."""
        if len(self._stored) >= self.shard_images:
            self.next_shard()
        key = storage.sha256(content)
        if key in self._stored:
            return self._stored[key]
        if self._writing is None:
            self._writing = storage.writing(self.folder / shard_name(self._number))
            self._file = self._writing.__enter__().open("wb")
            self._digest = hashlib.sha256()
        header = tarfile.TarInfo(f"{key}.{extension(content)}")  # constant time, owner and mode
        header.size = len(content)
        self._write(header.tobuf(tarfile.USTAR_FORMAT))
        stored = StoredImage(key, header.name, self._number, self._file.tell(), header.size)
        self._write(content + bytes(-header.size % tarfile.BLOCKSIZE))
        self._stored[key] = stored
        return stored

    def next_shard(self) -> None:
        """Finish the current shard, if it holds anything, and put it into place."""
        if self._writing is None:
            return
        end = self._file.tell() + 2 * tarfile.BLOCKSIZE
        self._write(bytes(2 * tarfile.BLOCKSIZE + -end % tarfile.RECORDSIZE))
        shard_bytes = self._file.tell()
        self._file.close()
        writing, self._writing = self._writing, None
        writing.__exit__(None, None, None)
        self.shards.append(Shard(shard_name(self._number), self._digest.hexdigest(), len(self._stored), shard_bytes))
        self._number += 1
        self._stored = {}

    def _write(self, content: bytes) -> None:
        self._file.write(content)
        self._digest.update(content)


def write_manifest(images: Path, shards: Sequence[Shard]) -> str:
    """Record the shards of the folder `images`; returns the manifest's hash, which names the image set."""
    storage.write_json(images / MANIFEST, {"shards": [asdict(shard) for shard in shards]})
    return storage.content_hash(images)


def read_manifest(images: Path) -> list[Shard]:
    """The shards listed in the manifest of `images`.

    Raises:
        StorageError: there is no manifest or it is not one.
    """
    try:
        return [Shard(**entry) for entry in storage.read_json(images / MANIFEST)["shards"]]
    except (KeyError, TypeError) as error:
        raise StorageError(f"{images / MANIFEST}: not an images manifest ({error!r}); run ingestion again") from error


def write_places(images: Path, urls: Mapping[str, str], store: ObjectStoreConfig) -> None:
    """Record where shards lie that are not in the folder `images`: by name, a path or `s3://bucket/key`."""
    path = images / PLACES
    if urls:
        storage.write_json(path, {"shards": dict(urls), "s3": asdict(store)})
    else:
        path.unlink(missing_ok=True)


def read_places(images: Path) -> tuple[dict[str, str], ObjectStoreConfig]:
    """By name of a shard that lies elsewhere, where; and how S3 is reached.

    Raises:
        ConfigError: somebody edited the file and made a mistake.
    """
    path = images / PLACES
    found = storage.read_json(path) if path.exists() else {}
    return found.get("shards", {}), strict.read(ObjectStoreConfig, found.get("s3", {}), str(path))


def verify(images: Path, *, hashes: bool = True) -> None:
    """Check every shard of the manifest: there, of the recorded size and, with `hashes`, of the recorded content.

    Shards on S3 are checked when they are fetched.

    Raises:
        StorageError: names the first shard that differs and what to do.
    """
    urls, _ = read_places(images)
    for shard in read_manifest(images):
        where = urls.get(shard.name, images / shard.name)
        if str(where).startswith(SCHEME):
            continue
        path = Path(where)
        if not path.is_file():
            raise StorageError(f"{path}: image shard is missing; {_REMEDY}")
        if (found := path.stat().st_size) != shard.bytes:
            raise StorageError(f"{path}: {found} bytes where the manifest says {shard.bytes}; {_REMEDY}")
        if hashes and (digest := storage.sha256_file(path)) != shard.sha256:
            raise StorageError(f"{path}: content is {digest[:12]}, the manifest says {shard.sha256[:12]}; {_REMEDY}")


class ShardReader:
    """Reads images by position, from the disk or through the cache of objects; forked workers may share it.

    It keeps the shards of this disk that it used last open, those of the cache never: the cache may let them go.
    """

    def __init__(self, images: Path):
        self.images = images
        self._handles: OrderedDict[int, int] = OrderedDict()

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """The `size` bytes at `offset` of tar shard number `shard`.

        Raises:
            StorageError: the shard is missing or too short, or cannot be fetched.
        """
        name = shard_name(shard)
        if name in self.remote:
            about = self.remote[name]
            content = self._cache.read(self._urls[name], about.bytes, about.sha256, offset, size, about.sha256)
        else:
            try:
                content = os.pread(self._handle(shard), size, offset)
            except FileNotFoundError as error:
                raise StorageError(f"{self._path(shard)}: image shard is missing; {_REMEDY}") from error
        if len(content) != size:
            raise StorageError(
                f"{self._urls.get(name, self.images / name)}: ends before byte {offset + size}; {_REMEDY}"
            )
        return content

    def fetch(self, shard: int) -> None:
        """Bring a shard from S3 into the cache, if that is where it lies. Raises StorageError."""
        if (about := self.remote.get(shard_name(shard))) is not None:
            self._cache.file(self._urls[about.name], about.bytes, about.sha256, about.sha256)

    def open(self, shard: int) -> BinaryIO:
        """A whole shard, for reading from end to end. Raises StorageError."""
        if (about := self.remote.get(shard_name(shard))) is not None:
            return self._cache.open(self._urls[about.name], about.bytes, about.sha256, about.sha256)
        try:
            return self._path(shard).open("rb")
        except FileNotFoundError as error:
            raise StorageError(f"{self._path(shard)}: image shard is missing; {_REMEDY}") from error

    def is_in_place(self, shard: int) -> bool:
        """Whether the shard lies elsewhere; it may then hold other things than the images of the data set."""
        return shard_name(shard) in self._urls

    @cached_property
    def remote(self) -> dict[str, Shard]:
        """Shards that lie on S3, by name."""
        there = {name for name, url in self._urls.items() if url.startswith(SCHEME)}
        return {shard.name: shard for shard in read_manifest(self.images) if shard.name in there} if there else {}

    @property
    def cache_bytes(self) -> int:
        """What the cache of objects may hold."""
        return self._cache.limit

    def close(self) -> None:
        while self._handles:
            os.close(self._handles.popitem()[1])

    @cached_property
    def _places(self) -> tuple[dict[str, str], ObjectStoreConfig]:
        return read_places(self.images)

    @property
    def _urls(self) -> dict[str, str]:
        return self._places[0]

    @cached_property
    def _cache(self) -> ObjectCache:
        return ObjectCache(self._places[1])

    def _path(self, shard: int) -> Path:
        return Path(self._urls.get(shard_name(shard), self.images / shard_name(shard)))

    def _handle(self, shard: int) -> int:
        handle = self._handles.get(shard)
        if handle is None:
            if len(self._handles) >= _OPEN_SHARDS:
                os.close(self._handles.popitem(last=False)[1])
            handle = self._handles[shard] = os.open(self._path(shard), os.O_RDONLY)
        return handle

    def __getstate__(self) -> dict[str, Any]:
        return {"images": self.images, "_handles": OrderedDict()}

    def __del__(self) -> None:
        self.close()


def read_image(images: Path, shard: int, offset: int, size: int) -> bytes:
    """One image by position, for a caller that wants only a few; see `ShardReader`."""
    return ShardReader(images).read(shard, offset, size)
