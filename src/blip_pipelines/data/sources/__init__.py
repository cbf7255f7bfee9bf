"""Where pictures and texts come from: one small class a source, each a stream of records that ingestion can trust.

A source finds, names and describes; it decodes nothing. What it must refuse it yields as `Quarantined`, one a caption
that is lost, so that ingestion can account for every row. There are two kinds: sources of files, whose images ingestion
puts in an order of its own, and sources of archives, each of which holds many images and is a job by itself.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, Protocol, runtime_checkable

import pyarrow as pa

from blip_pipelines.data.object_requests import ObjectStoreConfig
from blip_pipelines.data.places import Entry, Folder, open_place
from blip_pipelines.data.records import Record

TRUTH_SCHEMA = pa.schema(
    [
        pa.field("member", pa.string(), nullable=False),
        pa.field("caption", pa.string(), nullable=False),  # as in the table
        pa.field("kind", pa.string(), nullable=False),  # clean, or what is wrong with it
        pa.field("truth", pa.string(), nullable=False),  # what a person would have written
    ]
)


class SourceError(ValueError):
    """A source that cannot be read at all; the message says what is wrong with the folder or its configuration."""


class Quarantined(NamedTuple):
    """A row that a source refuses: its name, a word to count by, a sentence to read."""

    member: str
    reason: str
    error: str


class Source(Protocol):
    """What ingestion asks of a source of files.

    Members are unique names of images; several records may speak of one. `records` never fails on one bad row. Records
    pickle, and wait on the disk for their turn; what all of them read from is kept once, if it is the source's `place`.
    """

    @property
    def name(self) -> str:
        """What the rows' column `source` says."""

    @property
    def credits(self) -> tuple[str, ...]:
        """Licence notices owed wherever the pictures are shown."""

    @property
    def readers(self) -> int:
        """How many images are worth reading at once."""

    def records(self) -> Iterator[Record | Quarantined]:
        """Every image with its captions, and every row that is refused; the same in the same order each time."""

    def listing(self) -> Iterable[Entry]:
        """Name, size and checksum of every image that `records` yields, without decoding any."""

    def truth(self) -> pa.Table | None:
        """`TRUTH_SCHEMA` rows of the captions whose truth is known, for the evaluator alone; None if there are none."""


class Archive(Protocol):
    """One file that holds many images. Pickles, so that any process may open it.

    Attributes:
        name: unique in its source.
        checksum: changes whenever an image or a caption would.
        split: that all its images are declared to be of, if any.
        url: of a tar whose images can stay in it; None where they must be copied.
    """

    name: str
    checksum: str
    split: str | None
    url: str | None

    def open(self) -> BinaryIO:
        """The file, for `records`. Raises OSError."""

    def records(self, file: BinaryIO) -> Iterator[Record | Quarantined]:
        """As of a source; `read` of a record works while the file is open."""


@runtime_checkable
class ArchiveSource(Protocol):
    """What ingestion asks of a source of archives."""

    name: str
    credits: tuple[str, ...]

    def archives(self) -> Sequence[Archive]:
        """All of them, in a fixed order."""


@dataclass(frozen=True)
class SourceConfig:
    """Which source, its own options (`EmojiConfig`, `FolderConfig`, ...) and, if it lies on S3, how that is reached."""

    kind: Literal["emoji", "folder", "tars", "parquet", "coco", "flickr", "vqa"] = "emoji"
    options: dict[str, Any] = field(default_factory=dict)
    s3: ObjectStoreConfig = field(default_factory=ObjectStoreConfig)


def open_source(config: Any, where: Path | str) -> Source | ArchiveSource:
    """The source that an `IngestionConfig` names.

    Args:
        config: the whole ingestion block; a source also needs its seed, splits and noise.
        where: the wheels of the embedded default; or the user's folder, or `s3://bucket/folder`.

    Raises:
        ConfigError: unknown options.
        SourceError, PackageError: the folder does not hold what it should.
        ObjectStoreError: S3 cannot be reached.
    """
    from blip_pipelines import config as strict

    options, place = config.source.options, "ingestion.source.options"
    if config.source.kind == "emoji":
        from blip_pipelines.data.sources.emoji import EmojiConfig, EmojiSource

        read = strict.read(EmojiConfig, options, place)
        return EmojiSource(Path(where), read, config.splits, config.noise, config.seed)
    kind, options_kind = _class_of(config.source.kind)
    return kind(open_place(where, config.source.s3), strict.read(options_kind, options, place))


def identity(config: SourceConfig, where: Path | str) -> str:
    """A hash that changes when a source does, from a listing: of names and contents, or of names, sizes and the times
    of change (tags on S3) where the contents are large.

    Raises:
        ObjectStoreError: S3 cannot be reached.
    """
    place, digest = open_place(where, config.s3), hashlib.sha256()
    is_large = config.kind in ("tars", "parquet") or not isinstance(place, Folder)
    for name in place.names():
        about = place.stamp(name) if is_large else place.entry(name).checksum
        digest.update(f"{name}\0{about}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _class_of(kind: str) -> tuple[Any, Any]:
    from blip_pipelines.data.sources import coco, flickr, folder, parquet, tars, vqa

    return {
        "folder": (folder.FolderSource, folder.FolderConfig),
        "tars": (tars.TarSource, tars.TarsConfig),
        "parquet": (parquet.ParquetSource, parquet.ParquetConfig),
        "coco": (coco.CocoSource, coco.CocoConfig),
        "flickr": (flickr.FlickrSource, flickr.FlickrConfig),
        "vqa": (vqa.VqaSource, vqa.VqaConfig),
    }[kind]
