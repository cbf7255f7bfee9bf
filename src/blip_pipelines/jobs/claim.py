"""Who is at a piece of work: one process, until its outputs lie in their place; others wait for it."""

import fcntl
import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from blip_pipelines.data.storage import StorageError

LOCK = ".lock"
POLL_SECONDS = 0.2

logger = logging.getLogger(__name__)

# Locks on what a thread of this process has finished and not yet moved into place, by lock file.
_kept: dict[Path, tuple[int, int]] = {}


@dataclass
class Claim:
    """A lock that is held.

    Attributes:
        handle: file descriptor; the lock lasts as long as any process has it open, so the agent of a job keeps it too.
        keeps: set to hold on to the lock until `release`: the outputs are about to be moved.
    """

    handle: int
    keeps: bool = False


@contextmanager
def claimed(root: Path, name: str, what: str) -> Iterator[Claim]:
    """The lock on a piece of work; while another process holds it this one waits, and says so.

    Args:
        what: is being made, for that message.

    Raises:
        StorageError: the folder cannot be written, or is on a file system without locks.
    """
    path = _path(root, name)
    kept = _take(path)
    claim = Claim(_wait(path, what) if kept is None else kept)
    try:
        yield claim
    finally:
        if claim.keeps:
            _kept[path] = claim.handle, threading.get_ident()
        else:
            if not (root / name).exists():
                path.unlink(missing_ok=True)
            os.close(claim.handle)


def release(root: Path, name: str) -> None:
    """The outputs of this work are in their place, and its lock file goes."""
    path = _path(root, name)
    path.unlink(missing_ok=True)
    if path in _kept:
        os.close(_kept.pop(path)[0])


def _take(path: Path) -> int | None:
    """What this thread kept, or one that is gone, if it is still the lock."""
    if path not in _kept:
        return None
    handle, owner = _kept[path]
    if owner != threading.get_ident() and owner in {thread.ident for thread in threading.enumerate()}:
        return None
    del _kept[path]
    if _lies_at(path, handle):
        return handle
    os.close(handle)
    return None


def _wait(path: Path, what: str) -> int:
    told = None
    while isinstance(found := attempt(path), str):
        if told != found:
            logger.info("%s: process %s, or a job that it started, is at this work; waiting for it", what, found)
        told = found
        time.sleep(POLL_SECONDS)
    return found


def attempt(path: Path) -> int | str:
    """A file descriptor that holds the lock on a file, or else the number of the process that has it."""
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise StorageError(
                f"{path}: cannot open ({error}); who runs a stage must be able to write there"
            ) from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(handle, 100, 0).decode().strip()
            os.close(handle)
            return holder or "?"
        except OSError as error:
            os.close(handle)
            raise StorageError(f"{path}: cannot lock ({error}); work on a file system that has locks") from error
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
