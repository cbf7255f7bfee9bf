"""Who is at a piece of work: one process, until its outputs lie in their place; others wait for it."""

import fcntl
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from blip_pipelines.data.storage import StorageError

LOCK = ".lock"
POLL_SECONDS = 0.2

logger = logging.getLogger(__name__)

# Locks on what this process has finished and not yet moved into place, by lock file.
_kept: dict[Path, int] = {}


@contextmanager
def claimed(root: Path, name: str, unpublished: Path) -> Iterator[int]:
    """A file descriptor that holds the lock on this piece of work; the agent of a job keeps it too.

    While another process holds it this one waits, and says so. If the file `unpublished` is there at the end, the lock
    stays with this process until `release`, so that nobody takes or makes anew what is about to be moved.

    Raises:
        StorageError: the folder is on a file system without locks.
    """
    path = _path(root, name)
    handle = _kept.pop(path) if path in _kept else _wait(path, root / name)
    try:
        yield handle
    finally:
        if unpublished.exists():
            _kept[path] = handle
        else:
            os.close(handle)


def release(root: Path, name: str) -> None:
    """The outputs of this work are in their place, and its lock file goes."""
    path = _path(root, name)
    path.unlink(missing_ok=True)
    if path in _kept:
        os.close(_kept.pop(path))


def _wait(path: Path, work: Path) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    told = False
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(handle, 100, 0).decode().strip() or "?"
            os.close(handle)
            if not told:
                logger.info("%s: process %s is at this work; waiting for it", work, holder)
            told = True
            time.sleep(POLL_SECONDS)
        except OSError as error:
            os.close(handle)
            raise StorageError(f"{path}: cannot lock ({error}); choose another folder as launch.work") from error
        else:
            if _lies_at(path, handle):
                os.truncate(handle, 0)
                os.pwrite(handle, str(os.getpid()).encode(), 0)
                return handle
            os.close(handle)  # whoever held it has finished and removed the file


def _lies_at(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(handle))
    except FileNotFoundError:
        return False


def _path(root: Path, name: str) -> Path:
    return root.absolute() / f"{name}{LOCK}"
