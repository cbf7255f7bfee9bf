"""Where a person's files lie: a folder of this machine or a prefix on S3, with one face.

Names are relative to the place, with slashes. A place lists, reads and hands out files; it never leads outside itself.
"""

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple, Protocol

from blip_pipelines.data import storage
from blip_pipelines.data.object_cache import ObjectCache
from blip_pipelines.data.object_requests import ObjectMissingError, ObjectStoreConfig
from blip_pipelines.data.object_store import SCHEME, ObjectStore
from blip_pipelines.data.records import Refused


class Entry(NamedTuple):
    """One line of a listing. `checksum` changes when the content does."""

    member: str
    size: int
    checksum: str


class Place(Protocol):
    """Files by name. Pickles without its listing, so that workers may have it."""

    where: str
    readers: int  # files worth reading at once

    def names(self) -> Iterable[str]:
        """All files, in a fixed order, hidden ones left out."""

    def check(self, name: str) -> None:
        """Raises Refused: outside_folder or missing_image."""

    def has(self, name: str) -> bool:
        """Whether there is such a file."""

    def entry(self, name: str) -> Entry:
        """Raises OSError: it cannot be read."""

    def stamp(self, name: str) -> str:
        """What changes when the file does, without reading it. Raises OSError."""

    def url(self, name: str) -> str:
        """Where the file is, for a program that knows nothing of the place."""

    def open(self, name: str) -> BinaryIO:
        """The file for reading here and there; an object is fetched whole first. Raises OSError."""

    def read(self, name: str) -> bytes:
        """The content. Raises OSError."""

    def read_all(self, names: Iterable[str]) -> Iterator[bytes]:
        """The contents of many small files, in order."""


def open_place(where: Path | str, config: ObjectStoreConfig) -> Place:
    """The place that a catalog entry or a parameter names: a folder or `s3://bucket/folder`."""
    return Prefix(str(where), config) if str(where).startswith(SCHEME) else Folder(Path(where))


class Folder:
    """A folder of this machine."""

    readers = 1

    def __init__(self, folder: Path):
        self.folder, self.where = folder, str(folder)

    def names(self) -> Iterator[str]:
        for parent, folders, files in os.walk(self.folder):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for file in sorted(name for name in files if not name.startswith(".")):
                yield (Path(parent) / file).relative_to(self.folder).as_posix()

    def check(self, name: str) -> None:
        path = self.folder / name
        try:
            target = path.resolve()
            if Path(name).is_absolute():
                raise Refused("outside_folder", f"an absolute path; images are named relative to {self.folder}")
            if ".." in Path(name).parts or not target.is_relative_to(self._root):
                raise Refused("outside_folder", f"leads out of {self.folder}, to {target}; only files inside are read")
            if not target.is_file():
                raise Refused("missing_image", f"there is no file {path}")
        except (OSError, RuntimeError) as error:  # a name that is too long, or links in a circle
            raise Refused("missing_image", f"not a name of a file: {error}") from error
        except ValueError as error:
            if isinstance(error, Refused):
                raise
            raise Refused("missing_image", f"not a name of a file: {error}") from error  # it holds a zero byte

    def has(self, name: str) -> bool:
        return (self.folder / name).is_file()

    def entry(self, name: str) -> Entry:
        path = self.folder / name
        return Entry(name, path.stat().st_size, storage.sha256_file(path))

    def stamp(self, name: str) -> str:
        stat = (self.folder / name).stat()
        return f"{stat.st_size} {stat.st_mtime_ns}"

    def url(self, name: str) -> str:
        return (self.folder / name).as_posix()

    def open(self, name: str) -> BinaryIO:
        return (self.folder / name).open("rb")

    def read(self, name: str) -> bytes:
        return (self.folder / name).read_bytes()

    def read_all(self, names: Iterable[str]) -> Iterator[bytes]:
        return map(self.read, names)

    @cached_property
    def _root(self) -> Path:
        return self.folder.resolve()


class Prefix:
    """What lies under `s3://bucket/folder/`; listed once, when that is first wanted."""

    readers = 16

    def __init__(self, where: str, config: ObjectStoreConfig):
        self.where, self.config = where.rstrip("/"), config
        self.store, self._cache = ObjectStore(config), ObjectCache(config)

    def __reduce__(self) -> tuple[Any, ...]:
        return Prefix, (self.where, self.config)

    def names(self) -> Iterable[str]:
        return self._entries

    def check(self, name: str) -> None:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            raise Refused("outside_folder", f"leads out of {self.where}; only objects inside are read")
        if path.as_posix() not in self._entries:
            raise Refused("missing_image", f"there is no object {self.url(name)}")

    def has(self, name: str) -> bool:
        return name in self._entries

    def entry(self, name: str) -> Entry:
        try:
            return self._entries[name]
        except KeyError:
            raise ObjectMissingError(f"{self.url(name)}: there is no such object") from None

    def stamp(self, name: str) -> str:
        return self.entry(name).checksum

    def url(self, name: str) -> str:
        return f"{self.where}/{PurePosixPath(name).as_posix()}"

    def open(self, name: str) -> BinaryIO:
        about = self.store.about(self.url(name))
        return self._cache.open(self.url(name), about.size, about.etag)

    def read(self, name: str) -> bytes:
        return self.store.read(self.url(name))

    def read_all(self, names: Iterable[str]) -> Iterator[bytes]:
        with ThreadPoolExecutor(self.readers) as pool:
            yield from pool.map(self.read, names)

    @cached_property
    def _entries(self) -> dict[str, Entry]:
        start = len(f"{self.where}/".removeprefix(SCHEME).partition("/")[2])
        found = {}
        for key, size, etag in self.store.listing(f"{self.where}/"):
            name = key[start:]
            if not name.endswith("/") and not any(part.startswith(".") for part in name.split("/")):
                found[name] = Entry(name, size, etag)
        return found
