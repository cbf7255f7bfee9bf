"""Image shards as independent jobs: any process may do one, a restart finds it done, and the bytes are the same.

Beside each tar lies its index, a parquet table that says of every image wanted there where it is or why it was
refused, with a fingerprint for finding near duplicates. The index is written last and names the job that it answers.
"""

import hashlib
import io
import json
import logging
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from itertools import islice
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from blip_pipelines import config as strict
from blip_pipelines.data import images, quality, shards, storage
from blip_pipelines.data.images import ImageLimits
from blip_pipelines.data.object_requests import ObjectStoreError
from blip_pipelines.data.object_store import ObjectStore
from blip_pipelines.data.records import Refused
from blip_pipelines.data.shards import Shard, ShardWriter
from blip_pipelines.data.sources import Archive, Quarantined

log = logging.getLogger(__name__)

_LAYOUT = 3  # of what decides a shard's bytes and its index; a change writes all of them anew


class WorkerDiedError(RuntimeError):
    """A process that decoded images was killed; what to do is in the message."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """An image to store: `checksum` stands for all that decides its bytes."""

    read: Callable[[], bytes]
    checksum: str


class Item(NamedTuple):
    """An image on its way into a shard, or what a source refused.

    Attributes:
        offset: where it begins in a tar that is used in place.
        about: further columns of its row in the index.
    """

    read: Callable[[], bytes]
    offset: int | None = None
    about: dict[str, Any] = {}  # noqa: RUF012


@dataclass(frozen=True)
class Archived:
    """The images of an archive, or the first few of them."""

    archive: Archive
    at_most: int | None = None

    def items(self, file: BinaryIO) -> Iterator[Item]:
        for found in islice(self.archive.records(file), self.at_most):
            if isinstance(found, Quarantined):
                yield Item(partial(_refuse, *found[1:]), None, {"archive_member": found.member})
            else:
                captions = [asdict(caption) for caption in found.captions]
                about = {"archive_member": found.member, "split": found.split, "captions": captions}
                yield Item(found.read, found.offset, about)


@dataclass(frozen=True)
class ShardJob:
    """One tar shard of `folder` and what goes into it.

    Args:
        number: of the shard, or of the archive whose images stay in it.
        readers: threads that read files ahead of the decoding.
        spare: number of the shard for images of such an archive that cannot stay as they are.
    """

    number: int
    wanted: Iterable[Wanted] | Archived  # an iterable that gives the same each time
    folder: Path
    limits: ImageLimits
    readers: int = 1
    spare: int = 0

    @property
    def index_path(self) -> Path:
        return quality.index_path(self.folder, self.number)

    @property
    def url(self) -> str | None:
        """Where shard `number` lies, if its images stay in an archive."""
        return self.wanted.archive.url if isinstance(self.wanted, Archived) else None

    @cached_property
    def plan(self) -> str:
        """Hash of everything that decides the shard's bytes."""
        limits = json.dumps(strict.arithmetic(self.limits), sort_keys=True)
        about = [f"{_LAYOUT} {self.number} {self.spare} {limits}"]
        if isinstance(self.wanted, Archived):
            about += [self.wanted.archive.checksum, str(self.wanted.at_most)]
        else:
            about += [image.checksum for image in self.wanted]
        return hashlib.sha256("\n".join(about).encode()).hexdigest()

    @contextmanager
    def items(self) -> Iterator[tuple[Iterator[Item], BinaryIO | None]]:
        """The images on their way, and the archive that they come from."""
        if isinstance(self.wanted, Archived):
            with self.wanted.archive.open() as file:
                yield self.wanted.items(file), file
        else:
            yield _read_ahead(self.wanted, self.readers), None


def write_shards(jobs: Sequence[ShardJob], workers: int) -> list[tuple[Shard | None, pa.Table]]:
    """Do the jobs that are not done yet; returns for each its shard (None if every image was refused) and its index.

    For jobs over files, and as many as one wants to hold in memory; otherwise as `do_jobs`.
    """
    do_jobs(jobs, workers)
    return [(next(iter(_read_shards(job)), None), pq.read_table(job.index_path)) for job in jobs]


def do_jobs(jobs: Sequence[ShardJob], workers: int) -> list[Shard]:
    """Do the jobs that are not done yet; returns all shards, none of a job whose images were all refused.

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
    return sorted((shard for job in jobs for shard in _read_shards(job)), key=lambda shard: shard.name)


def _die_with_parent() -> None:
    """End this process when the one that started it is gone; a pool's workers would wait for its next job for ever."""
    parent = parent_process()
    assert parent is not None

    def wait_for_parent() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=wait_for_parent, daemon=True).start()


def _write_shard(job: ShardJob) -> None:
    in_place = job.url is not None
    rows: list[dict[str, Any]] = []
    here: set[str] = set()  # images that stay in their archive
    own = job.spare if in_place else job.number
    with (
        ShardWriter(job.folder, shard_images=sys.maxsize, first_shard=own) as writer,
        job.items() as (items, file),
    ):
        for item in items:
            try:
                content = item.read()
                stored, width, height, image = _decode(content, job.limits)
            except Refused as refused:
                rows.append({"reason": refused.reason, "error": str(refused), **item.about})
                continue
            except ObjectStoreError:
                raise  # the store is out of reach: no fault of this image
            except OSError as error:
                rows.append({"reason": "unreadable", "error": str(error), **item.about})
                continue
            if in_place and item.offset is not None and stored is content:
                key = storage.sha256(content)
                here.add(key)
                place = {"key": key, "offset": item.offset, "size": len(content), "shard": job.number}
            else:
                at = writer.add(stored)
                place = {"key": at.key, "offset": at.offset, "size": at.size, "shard": own}
            rows.append({**place, "width": width, "height": height, **quality.fingerprint(image), **item.about})
        entries = []
        if file is not None and here:
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
            size = os.fstat(file.fileno()).st_size
            entries.append(Shard(shards.shard_name(job.number), digest, len(here), size))
    entries += writer.shards
    if not writer.shards:
        (job.folder / shards.shard_name(own)).unlink(missing_ok=True)
    about = {"plan": job.plan, "shards": json.dumps([asdict(entry) for entry in entries])}
    schema = quality.INDEX_SCHEMA.with_metadata(about)
    with storage.writing(job.index_path) as temporary:
        pq.write_table(pa.Table.from_pylist(rows, schema), temporary, compression="zstd", compression_level=3)


def _read_ahead(wanted: Iterable[Wanted], readers: int) -> Iterator[Item]:
    if readers == 1:
        yield from (Item(image.read) for image in wanted)
        return
    with ThreadPoolExecutor(readers) as pool:
        ahead: deque[Any] = deque()
        for image in wanted:
            ahead.append(pool.submit(image.read))
            if len(ahead) > 2 * readers:
                yield Item(ahead.popleft().result)
        while ahead:
            yield Item(ahead.popleft().result)


def _refuse(reason: str, error: str) -> bytes:
    raise Refused(reason, error)


def _decode(content: bytes, limits: ImageLimits) -> tuple[bytes, int, int, Image.Image]:
    """(content to store, width, height, an image to take a fingerprint of, perhaps smaller)."""
    image = images.decode(content, limits=limits, at_least=quality.ENOUGH_PIXELS)
    if images.needs_reencoding(content):
        image = images.decode(content, limits=limits)
        return images.encode_plain(image), image.width, image.height, image
    with Image.open(io.BytesIO(content)) as header:
        return content, header.width, header.height, image


def _read_shards(job: ShardJob) -> list[Shard]:
    return [Shard(**entry) for entry in json.loads(pq.read_schema(job.index_path).metadata[b"shards"])]


def _is_done(job: ShardJob) -> bool:
    try:
        if pq.read_schema(job.index_path).metadata[b"plan"].decode() != job.plan:
            return False
        written = [s for s in _read_shards(job) if job.url is None or s.name != shards.shard_name(job.number)]
        elsewhere, config = shards.read_places(job.folder)
        return all(
            ObjectStore(config).about(elsewhere[shard.name]).size == shard.bytes
            if shard.name in elsewhere and not (job.folder / shard.name).exists()
            else storage.sha256_file(job.folder / shard.name) == shard.sha256
            for shard in written
        )
    except ObjectStoreError:
        raise
    except (OSError, pa.ArrowException, KeyError, TypeError):  # absent, damaged or by another hand
        return False
