"""Image shards as independent jobs: any process may do one, a restart finds it done, and the bytes are the same.

Beside each tar lies its index, a parquet table that says of every image wanted there where it is or why it was
refused, with a fingerprint for finding near duplicates. The index is written last and names the job that it answers.
"""

import hashlib
import io
import json
import logging
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import cached_property
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from blip_pipelines import config as strict
from blip_pipelines.data import images, quality, shards, storage
from blip_pipelines.data.images import ImageLimits
from blip_pipelines.data.records import Refused
from blip_pipelines.data.shards import Shard, ShardWriter

log = logging.getLogger(__name__)

_LAYOUT = 1  # of what decides a shard's bytes and its index; a change writes all of them anew


class WorkerDiedError(RuntimeError):
    """A process that decoded images was killed; what to do is in the message."""


@dataclass(frozen=True)
class Wanted:
    """An image to store: `checksum` stands for all that decides its bytes."""

    read: Callable[[], bytes]
    checksum: str


@dataclass(frozen=True)
class ShardJob:
    """One tar shard of `folder` and what goes into it."""

    number: int
    wanted: tuple[Wanted, ...]
    folder: Path
    limits: ImageLimits

    @property
    def index_path(self) -> Path:
        return quality.index_path(self.folder, self.number)

    @cached_property
    def plan(self) -> str:
        """Hash of everything that decides the shard's bytes."""
        limits = json.dumps(strict.arithmetic(self.limits), sort_keys=True)
        checksums = (image.checksum for image in self.wanted)
        return hashlib.sha256("\n".join((f"{_LAYOUT} {self.number} {limits}", *checksums)).encode()).hexdigest()


def write_shards(jobs: Sequence[ShardJob], workers: int) -> list[tuple[Shard | None, pa.Table]]:
    """Do the jobs that are not done yet; returns for each its shard (None if every image was refused) and its index.

    Args:
        workers: processes; 0 for one a core. With one, all happens in the caller's.

    Raises:
        WorkerDiedError: a process was killed; finished shards stay.
    """
    todo = [job for job in jobs if not _is_done(job)]
    if len(todo) < len(jobs):
        log.info("%d of %d image shards are already there", len(jobs) - len(todo), len(jobs))
    workers = min(workers or len(os.sched_getaffinity(0)), len(todo))
    if workers <= 1:
        for job in todo:
            _write_shard(job)
    else:
        # Not fork: the caller may have threads, whose locks a forked child would inherit locked.
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_die_with_parent) as pool:
            try:
                list(pool.map(_write_shard, todo))
            except BrokenProcessPool as error:
                raise WorkerDiedError(
                    "a process that decodes images was killed, perhaps for want of memory; finished shards are kept: "
                    "run again, with fewer `workers` or lower `limits.max_pixels`"
                ) from error
    return [(_read_shard(job), pq.read_table(job.index_path)) for job in jobs]


def _die_with_parent() -> None:
    """End this process when the one that started it is gone; a pool's workers would wait for its next job for ever."""
    parent = parent_process()
    assert parent is not None

    def wait_for_parent() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=wait_for_parent, daemon=True).start()


def _write_shard(job: ShardJob) -> None:
    rows: list[dict[str, Any]] = []
    with ShardWriter(job.folder, shard_images=len(job.wanted), first_shard=job.number) as writer:
        for wanted in job.wanted:
            try:
                content, width, height, image = _decode(wanted.read(), job.limits)
            except Refused as refused:
                rows.append({"reason": refused.reason, "error": str(refused)})
                continue
            except OSError as error:
                rows.append({"reason": "unreadable", "error": str(error)})
                continue
            stored = writer.add(content)
            place = {"key": stored.key, "offset": stored.offset, "size": stored.size, "width": width, "height": height}
            rows.append({**place, **quality.fingerprint(image)})
    shard = writer.shards[0] if writer.shards else None
    if shard is None:
        (job.folder / shards.shard_name(job.number)).unlink(missing_ok=True)
    schema = quality.INDEX_SCHEMA.with_metadata(
        {"plan": job.plan, "shard": json.dumps(asdict(shard) if shard else None)}
    )
    with storage.writing(job.index_path) as temporary:
        pq.write_table(pa.Table.from_pylist(rows, schema), temporary, compression="zstd", compression_level=3)


def _decode(content: bytes, limits: ImageLimits) -> tuple[bytes, int, int, Image.Image]:
    """(content to store, width, height, an image to take a fingerprint of, perhaps smaller)."""
    image = images.decode(content, limits=limits, at_least=quality.ENOUGH_PIXELS)
    if images.needs_reencoding(content):
        image = images.decode(content, limits=limits)
        return images.encode_plain(image), image.width, image.height, image
    with Image.open(io.BytesIO(content)) as header:
        return content, header.width, header.height, image


def _read_shard(job: ShardJob) -> Shard | None:
    entry = json.loads(pq.read_schema(job.index_path).metadata[b"shard"])
    return None if entry is None else Shard(**entry)


def _is_done(job: ShardJob) -> bool:
    try:
        if pq.read_schema(job.index_path).metadata[b"plan"].decode() != job.plan:
            return False
        shard = _read_shard(job)
        return shard is None or storage.sha256_file(job.folder / shard.name) == shard.sha256
    except (OSError, pa.ArrowException, KeyError, TypeError):  # absent, damaged or by another hand
        return False
