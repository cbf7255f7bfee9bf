"""A bounded folder of objects fetched from a store, shared by all processes of a machine.

An object is fetched once, whoever asks first; what was used longest ago goes when room is wanted. Nobody keeps a file
open, so what is removed is really gone, and the disk holds no more than the bound.
"""

import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from blip_pipelines.data.object_requests import ObjectStoreConfig
from blip_pipelines.data.object_store import ObjectStore
from blip_pipelines.data.storage import StorageError, locked

_LOCKS = 256
_ABANDONED_SECONDS = 86_400  # a half-fetched file this old belongs to no living process
_ROOM = ".room"
_LOOK_AGAIN_SECONDS = 0.02


class ObjectCache:
    """Objects as files. Safe for threads, forks and other processes; pickles as its configuration."""

    def __init__(self, config: ObjectStoreConfig):
        self.folder, self.limit, self.store = Path(config.cache), config.cache_bytes, ObjectStore(config)

    def file(self, url: str, size: int, identity: str, sha256: str | None = None) -> Path:
        """The object as a file, fetched if it is not here. It may go at any time: open it at once, or use `read`.

        Args:
            size: in bytes.
            identity: changes when the object does: its tag or hash.
            sha256: of the content, where it is known.

        Raises:
            ObjectMissingError, ObjectStoreError: it cannot be fetched as it should be.
            StorageError: it is larger than the cache may be, or the disk is full.
        """
        path = self._path(url, identity)
        if not _touch(path):
            with self._lock(f"{int(path.name, 16) % _LOCKS:02x}"):
                if not _touch(path):  # another process may have fetched it while we waited
                    with self._room(url, path.name, size):
                        self.store.download(url, path, sha256)
        return path

    def open(self, url: str, size: int, identity: str, sha256: str | None = None) -> BinaryIO:
        """The same, opened; it stays readable when the cache lets it go."""
        while True:
            with suppress(FileNotFoundError):  # removed between the two calls to make room for another
                return self.file(url, size, identity, sha256).open("rb")

    def read(self, url: str, size: int, identity: str, start: int, count: int, sha256: str | None = None) -> bytes:
        """`count` bytes of the object from `start` on; fewer where it ends."""
        with self.open(url, size, identity, sha256) as file:
            return os.pread(file.fileno(), count, start)

    def _path(self, url: str, identity: str) -> Path:
        return self.folder / hashlib.sha256(f"{url}\n{identity}".encode()).hexdigest()[:32]

    @contextmanager
    def _room(self, url: str, name: str, size: int) -> Iterator[None]:
        """So much room, made by letting go what was used longest ago, and kept until the object is there.

        Fetches that are under way keep theirs by a file of no blocks and of the object's size: who comes next counts
        it, and waits where nothing else is left to let go.
        """
        if size > self.limit:
            raise StorageError(f"{url}: {size:,} bytes, the cache may hold {self.limit:,}; raise `cache_bytes`")
        kept = self.folder / f".{name}.{os.getpid()}{_ROOM}"
        while not self._keep(kept, size):
            time.sleep(_LOOK_AGAIN_SECONDS)
        try:
            yield
        finally:
            kept.unlink(missing_ok=True)

    def _keep(self, kept: Path, size: int) -> bool:
        """Make room and note who has it; False if fetches of others need to end first."""
        with self._lock("room"):
            used, files = 0, []
            for entry in os.scandir(self.folder):
                with suppress(FileNotFoundError):  # a fetch ended meanwhile
                    if not entry.is_file() or _is_abandoned(entry):
                        continue
                    stat, is_hidden = entry.stat(), entry.name.startswith(".")
                    if not is_hidden:
                        files.append((stat.st_mtime_ns, stat.st_size, entry.path))
                    if not is_hidden or entry.name.endswith(_ROOM):  # what is half there has its room noted
                        used += stat.st_size
            for _, bytes_freed, path in sorted(files):
                if used + size <= self.limit:
                    break
                Path(path).unlink(missing_ok=True)
                used -= bytes_freed
            if used + size > self.limit:
                return False
            with kept.open("wb") as file:
                file.truncate(size)
            return True

    def _lock(self, name: str) -> AbstractContextManager[None]:
        return locked(self.folder / ".locks" / name)


def _touch(path: Path) -> bool:
    """Mark the file as just used; False if it is not there."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    return True


def _is_abandoned(entry: os.DirEntry[str]) -> bool:
    """Remove what a process left that is gone; whether it was that."""
    if not entry.name.startswith("."):
        return False
    if entry.name.endswith(_ROOM):
        try:
            os.kill(int(entry.name.split(".")[-2]), 0)
            return False
        except ProcessLookupError:
            pass
        except PermissionError:  # it lives, under another user
            return False
    elif time.time() - entry.stat().st_mtime <= _ABANDONED_SECONDS:
        return False
    Path(entry.path).unlink(missing_ok=True)
    return True
