"""Where pictures and texts come from: one small class a source, each a stream of records that ingestion can trust.

A source finds, names and describes; it decodes nothing. What it must refuse it yields as `Quarantined`, one a caption
that is lost, so that ingestion can account for every row.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import pyarrow as pa

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


class Entry(NamedTuple):
    """One line of a source's listing: `checksum` changes whenever the stored image would."""

    member: str
    size: int
    checksum: str


class Source(Protocol):
    """What ingestion asks of a source.

    Members are unique names of images; several records may speak of one. `records` never fails on one bad row.
    """

    @property
    def name(self) -> str:
        """What the rows' column `source` says."""

    @property
    def credits(self) -> tuple[str, ...]:
        """Licence notices owed wherever the pictures are shown."""

    def records(self) -> Iterator[Record | Quarantined]:
        """Every image with its captions, and every row that is refused; the same in the same order each time."""

    def listing(self) -> Iterable[Entry]:
        """Name, size and checksum of every image that `records` yields, without decoding any."""

    def truth(self) -> pa.Table | None:
        """`TRUTH_SCHEMA` rows of the captions whose truth is known, for the evaluator alone; None if there are none."""


@dataclass(frozen=True)
class SourceConfig:
    """Which source, and its own options (`EmojiConfig`, `FolderConfig`)."""

    kind: Literal["emoji", "folder"] = "emoji"
    options: dict[str, Any] = field(default_factory=dict)


def open_source(config: Any, folder: Path) -> Source:
    """The source that an `IngestionConfig` names.

    Args:
        config: the whole ingestion block; a source also needs its seed, splits and noise.
        folder: the wheels of the embedded default, or the user's folder.

    Raises:
        ConfigError: unknown options.
        SourceError, PackageError: the folder does not hold what it should.
    """
    from blip_pipelines import config as strict
    from blip_pipelines.data.sources.emoji import EmojiConfig, EmojiSource
    from blip_pipelines.data.sources.folder import FolderConfig, FolderSource

    where, options = "ingestion.source.options", config.source.options
    if config.source.kind == "emoji":
        return EmojiSource(folder, strict.read(EmojiConfig, options, where), config.splits, config.noise, config.seed)
    return FolderSource(folder, strict.read(FolderConfig, options, where))
