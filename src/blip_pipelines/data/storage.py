"""Bytes on disk: atomic writes, content hashes, and locks.

Every file this project leaves behind is written under a temporary name, flushed to the disk and renamed,
so that a reader sees the old file or the new one and never half of it.
"""

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"


class StorageError(OSError):
    """A read or write that failed; the message names the path and what to do."""


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomic(path: Path, content: bytes | str) -> None:
    """Put `content` at `path`: temporary name, fsync, rename.

    Raises:
        StorageError: the disk is full or the folder cannot be written; nothing is left behind.
    """
    with writing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, value: Any) -> None:
    """JSON with sorted keys, so that equal values are equal bytes."""
    write_atomic(path, json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise StorageError(f"{path}: missing; run the stage that writes it") from error
    except ValueError as error:
        raise StorageError(f"{path}: not valid JSON ({error}); remove it and run the stage that writes it") from error


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`; renamed to it on success, removed on failure. For writers that want a path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        _sync(temporary)
        temporary.replace(path)
        _sync(path.parent)
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(f"{path}: cannot write ({error}); free some space or choose another folder") from error
    finally:
        temporary.unlink(missing_ok=True)


def publish(staged: Path, final: Path) -> None:
    """Move a finished folder into place; an older one there is replaced in two renames."""
    final.parent.mkdir(parents=True, exist_ok=True)
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.replace(old)
    staged.replace(final)
    _sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def content_hash(path: Path) -> str:
    """What names a file or folder in receipts: of a folder the hash of its manifest, or else of all its files."""
    if path.is_file():
        return sha256_file(path)
    if not path.is_dir():
        raise StorageError(f"{path}: missing; run the stage that writes it")
    manifest = path / MANIFEST
    if manifest.exists():
        return sha256_file(manifest)
    digest = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith(".")):
        digest.update(f"{file.relative_to(path).as_posix()}\0{sha256_file(file)}\n".encode())
    return digest.hexdigest()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Held by one thread of one process of the machine; the system releases what a killed process held."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
