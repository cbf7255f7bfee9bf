"""Parquet with the images in it, as the Hugging Face hub stores data sets: a struct of bytes and path, and texts.

Files are named by split (`data/train-00000-of-00004-….parquet`). Images are copied to tar shards, one a file, since a
page of parquet cannot be read image by image.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import PurePosixPath
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from blip_pipelines.data.places import Place
from blip_pipelines.data.records import Caption, Record, Refused
from blip_pipelines.data.sources import Quarantined, SourceError
from blip_pipelines.data.sources.files import ORIGINS, SPLITS, category_of, check_choice, check_columns, check_place

_FIELDS = ("image", "caption", "split", "language", "category")
_SPLITS = {"train": "train", "training": "train", "validation": "val", "valid": "val", "val": "val", "dev": "val"}
_SPLITS |= {"test": "test"}
_ROWS = 32  # images in memory at once


@dataclass(frozen=True)
class ParquetConfig:
    """What the columns mean.

    Args:
        columns: names of the fields image, caption, split, language and category, where they differ; `caption` may
            hold a text or a list of them, one caption each.
        split: of all images; None takes the column, else the name of the file or of its folder (train, validation or
            val, test), else leaves the choice to ingestion.
        origin: of all captions.
        name: what the table's column `source` says.
    """

    columns: dict[str, str] = field(default_factory=dict)
    split: str | None = None
    origin: str = "web"
    name: str = "parquet"

    def __post_init__(self) -> None:
        check_choice("origin", self.origin, ORIGINS)
        check_choice("split", self.split, SPLITS)
        check_columns(self.columns, _FIELDS)

    def column(self, name: str) -> str:
        return self.columns.get(name, name)


class ParquetSource:
    """Every parquet file under a place; see the module."""

    credits: tuple[str, ...] = ()

    def __init__(self, place: Place, config: ParquetConfig):
        check_place(place)
        self.place, self.config, self.name = place, config, config.name

    def archives(self) -> Sequence["ParquetArchive"]:
        names = sorted(name for name in self.place.names() if name.endswith(".parquet"))
        if not names:
            raise SourceError(f"{self.place.where}: no .parquet in it")
        return [self._archive(name) for name in names]

    def _archive(self, name: str) -> "ParquetArchive":
        about = [self.place.stamp(name), *map(str, vars(self.config).values())]
        checksum = hashlib.sha256("\n".join(about).encode()).hexdigest()
        return ParquetArchive(self.place, name, self.config, checksum)


@dataclass(frozen=True)
class ParquetArchive:
    """One parquet file."""

    place: Place
    name: str
    config: ParquetConfig
    checksum: str
    url: None = None

    @property
    def split(self) -> str | None:
        """By the configuration, else by the name of the file, else of its folder."""
        path = PurePosixPath(self.name)
        named = [path.name.partition("-")[0].partition(".")[0], path.parent.name]
        return self.config.split or next((_SPLITS[name] for name in named if name in _SPLITS), None)

    def open(self) -> BinaryIO:
        return self.place.open(self.name)

    def records(self, file: BinaryIO) -> Iterator[Record | Quarantined]:
        try:
            parquet = pq.ParquetFile(file)
        except pa.ArrowException as error:
            raise SourceError(f"{self.place.url(self.name)}: not a parquet file ({error}); fetch it again") from error
        there = parquet.schema_arrow.names
        for name in ("image", "caption"):
            if self.config.column(name) not in there:
                raise SourceError(
                    f"{self.place.url(self.name)}: no column '{self.config.column(name)}' among {', '.join(there)}; "
                    f"name it in ingestion.source.options.columns.{name}"
                )
        columns = [self.config.column(name) for name in _FIELDS if self.config.column(name) in there]
        number, stem = 0, self.name.removesuffix(".parquet")
        for batch in parquet.iter_batches(_ROWS, columns=columns):
            for row in batch.to_pylist():
                found = {name: row.get(self.config.column(name)) for name in _FIELDS}
                yield from self._records(f"{stem}/{number:06d}", found)
                number += 1

    def _records(self, member: str, row: dict[str, Any]) -> Iterator[Record | Quarantined]:
        captions = row["caption"] if isinstance(row["caption"], list) else [row["caption"]]
        language = row["language"] if isinstance(row["language"], str) and row["language"] else None
        split = self.split if self.config.split or not row["split"] else _SPLITS.get(str(row["split"]), "")
        if split == "":
            error = f"{row['split']!r} is not one of {', '.join(_SPLITS)}"
            yield from [Quarantined(member, "bad_split", error)] * max(len(captions), 1)
            return
        if captions in ([], [None]):
            yield Quarantined(member, "no_caption", f"'{self.config.column('caption')}' is empty")
            return
        texts = [text for text in captions if isinstance(text, str)]
        for text in captions:
            if not isinstance(text, str):
                yield Quarantined(member, "bad_row", f"a caption is {text!r:.80}, not a text")
        if texts:
            category = category_of(row["category"])
            said = tuple(Caption(text, self.config.origin, language, category) for text in texts)
            yield Record(member, partial(_content, row["image"]), said, self.config.name, split)


def _content(image: Any) -> bytes:
    content = image.get("bytes") if isinstance(image, dict) else image
    if isinstance(content, bytes):
        return content
    path = image.get("path") if isinstance(image, dict) else None
    raise Refused("missing_image", f"no bytes, only the path {path!r}" if path else "the row has no image")
