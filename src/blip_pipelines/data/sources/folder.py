"""A folder of pictures with their texts in one csv or jsonl file, or in a .txt file beside each picture.

One bad row costs that row: files are read as bytes and every line is decoded by itself.
"""

import csv
import hashlib
import io
import json
import sys
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from blip_pipelines.data.places import Place
from blip_pipelines.data.records import Caption
from blip_pipelines.data.sources import Quarantined, SourceError
from blip_pipelines.data.sources.files import (
    ORIGINS,
    SPLITS,
    FileSource,
    Row,
    category_of,
    check_choice,
    check_columns,
    is_utf8,
    printable,
)

SIDECAR = "sidecar"
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jp2", ".ppm"}
_FIELDS = ("image", "caption", "origin", "split", "language", "category")


@dataclass(frozen=True)
class FolderConfig:
    """Where the texts are.

    Args:
        captions: a csv or jsonl file in the folder with the fields image and caption and, where known, origin, split,
            language and category; or "sidecar": beside `a/b.jpg` lies `a/b.txt`, one caption a line.
        columns: the file's own names for those fields, where they differ: `{caption: alt_text}`.
        origin: of captions that do not say it themselves.
        name: what the table's column `source` says.
    """

    captions: str = "captions.csv"
    columns: dict[str, str] = field(default_factory=dict)
    origin: str = "web"
    name: str = "folder"

    def __post_init__(self) -> None:
        check_choice("origin", self.origin, ORIGINS)
        check_columns(self.columns, _FIELDS)


class FolderSource(FileSource):
    """Images of a folder tree; see the module."""

    def __init__(self, place: Place, config: FolderConfig):
        super().__init__(place, config.name)
        self.config = config
        if config.captions != SIDECAR and not place.has(config.captions):
            raise SourceError(
                f"{place.url(config.captions)}: no captions file; set ingestion.source.options.captions to its name, "
                f"or to '{SIDECAR}' for one .txt file an image"
            )

    def rows(self) -> Iterator[Row | Quarantined]:
        named = array("Q")  # of each name eight bytes, for there may be millions
        for row in self._sidecar_rows() if self.config.captions == SIDECAR else self._file_rows():
            named.append(_number(row.member if isinstance(row, Quarantined) else PurePosixPath(row.member).as_posix()))
            yield row
        known = np.unique(np.frombuffer(named, np.uint64))
        for member in sorted(name for name in self._images() if not _holds(known, _number(name))):
            yield Quarantined(member, "no_caption", "no caption names this image")

    def _images(self) -> Iterator[str]:
        return (name for name in self.place.names() if _suffix(name) in IMAGE_SUFFIXES)

    def _sidecar_rows(self) -> Iterator[Row | Quarantined]:
        by_stem = {member.rpartition(".")[0]: member for member in self._images()}
        wanted = []
        for sidecar in (name for name in self.place.names() if name.endswith(".txt")):
            member = by_stem.get(sidecar.removesuffix(".txt"))
            if member is None:
                yield Quarantined(sidecar, "missing_image", "a .txt file without an image of its name beside it")
            elif (error := self._refusal(sidecar)) is not None:
                yield Quarantined(sidecar, error.reason, str(error))
            else:
                wanted.append((member, sidecar))
        contents = self.place.read_all(sidecar for _, sidecar in wanted)
        for (member, sidecar), content in zip(wanted, contents, strict=True):
            for number, line in enumerate(content.splitlines(), start=1):
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    yield Quarantined(member, "invalid_utf8", f"{sidecar}, line {number}: {error}")
                    continue
                if text.strip():
                    yield Row(member, Caption(text, self.config.origin), None)

    def _file_rows(self) -> Iterator[Row | Quarantined]:
        is_json = _suffix(self.config.captions) in (".jsonl", ".json", ".ndjson")
        rows = self._jsonl_rows(self.config.captions) if is_json else self._csv_rows(self.config.captions)
        for where, values in rows:
            yield self._row(where, values) if isinstance(values, dict) else Quarantined(where, *values)

    def _csv_rows(self, name: str) -> Iterator[tuple[str, dict[str, object] | tuple[str, str]]]:
        """(place, values by the file's column names), or (place, (reason, error))."""
        csv.field_size_limit(sys.maxsize)  # a field over the module's default would end the whole file
        with self.place.open(name) as file:
            # What is no UTF-8 becomes lone surrogates, which `is_utf8` finds in the row that has them.
            text = io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="")
            yield from self._csv_values(name, csv.reader(text))

    def _csv_values(self, name: str, reader: Any) -> Iterator[tuple[str, dict[str, object] | tuple[str, str]]]:
        header = [name.strip() for name in next(reader, [])]
        self._check_columns(name, header)
        for values in reader:
            where = f"{PurePosixPath(name).name}, line {reader.line_num}"
            if not values:
                continue
            if len(values) != len(header):
                yield where, ("bad_row", f"{len(values)} fields where the header has {len(header)}")
            else:
                yield where, dict(zip(header, values, strict=True))

    def _jsonl_rows(self, name: str) -> Iterator[tuple[str, dict[str, object] | tuple[str, str]]]:
        with self.place.open(name) as file:
            for number, line in enumerate(file, start=1):
                where = f"{PurePosixPath(name).name}, line {number}"
                if not line.strip():
                    continue
                try:
                    values = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                except UnicodeDecodeError as error:
                    yield where, ("invalid_utf8", str(error))
                except (ValueError, RecursionError) as error:
                    yield where, ("bad_json", str(error))
                else:
                    yield where, values if isinstance(values, dict) else ("bad_row", "not a JSON object")

    def _check_columns(self, name: str, header: list[str]) -> None:
        for field_name in ("image", "caption"):
            column = self._column(field_name)
            if column not in header:
                raise SourceError(
                    f"{self.place.url(name)}: no column '{column}' among {', '.join(header) or 'no columns'}; "
                    f"name it in ingestion.source.options.columns.{field_name}"
                )

    def _column(self, name: str) -> str:
        return self.config.columns.get(name, name)

    def _row(self, where: str, values: dict[str, object]) -> Row | Quarantined:
        found = {name: values.get(self._column(name)) for name in _FIELDS}
        found["category"] = category = category_of(found["category"])
        member = found["image"] if isinstance(found["image"], str) and found["image"].strip() else where
        for name, value in found.items():
            if value is not None and not isinstance(value, str):
                return Quarantined(printable(member), "bad_row", f"{where}: '{name}' is {value!r:.80}, not a text")
            if value is not None and not is_utf8(value):
                return Quarantined(
                    printable(member), "invalid_utf8", f"{where}: '{name}' holds bytes that are no UTF-8"
                )
        if member is where:
            return Quarantined(where, "bad_row", "no image is named")
        if found["caption"] is None:
            return Quarantined(member, "bad_row", f"{where}: no caption")
        texts = {name: str(value or "").strip() for name, value in found.items()}
        if texts["origin"] not in ("", *ORIGINS):
            return Quarantined(member, "bad_origin", f"{where}: {texts['origin']!r} is not one of {', '.join(ORIGINS)}")
        if texts["split"] not in ("", *SPLITS):
            return Quarantined(member, "bad_split", f"{where}: {texts['split']!r} is not one of {', '.join(SPLITS)}")
        said = texts["origin"] or self.config.origin, texts["language"] or None, category
        return Row(texts["image"], Caption(str(found["caption"]), *said), texts["split"] or None)


def _suffix(name: str) -> str:
    return PurePosixPath(name).suffix.lower()


def _number(name: str) -> int:
    """64 bits of a hash: of ten million names two are one with a chance of three in a million."""
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def _holds(known: np.ndarray, number: int) -> bool:
    at = np.searchsorted(known, np.uint64(number))
    return bool(at < len(known) and int(known[at]) == number)
