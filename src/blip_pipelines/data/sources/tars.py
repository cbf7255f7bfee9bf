"""Tar shards as WebDataset defines and img2dataset writes them, used in place: no picture is copied that need not be.

A sample is the members that share a name up to its first dot: `000000012.jpg`, `.txt`, `.json`. Beside `00000.tar`,
img2dataset leaves `00000.parquet` with a row for every url that it tried, also of those that failed.
"""

import hashlib
import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import PurePosixPath
from typing import Any, BinaryIO, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from blip_pipelines.data.places import Place
from blip_pipelines.data.records import Caption, Record
from blip_pipelines.data.sources import Quarantined, SourceError
from blip_pipelines.data.sources.files import (
    ORIGINS,
    SPLITS,
    category_of,
    check_choice,
    check_columns,
    check_place,
    decode,
    is_utf8,
    printable,
)

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "jp2", "ppm")
_FIELDS = ("caption", "language", "category")
_Member = tuple[str, int, int]  # name, offset, size


@dataclass(frozen=True)
class TarsConfig:
    """Where the texts are.

    Args:
        captions: "parquet" beside each tar, or "txt" or "json" members within it; "auto" takes the first there is.
        columns: names of the fields caption, language and category in the parquet or json, where they differ.
        split: of all images; None leaves the choice to ingestion.
        origin: of all captions.
        name: what the table's column `source` says.
    """

    captions: Literal["auto", "parquet", "txt", "json"] = "auto"
    columns: dict[str, str] = field(default_factory=dict)
    split: str | None = None
    origin: str = "web"
    name: str = "tars"

    def __post_init__(self) -> None:
        check_choice("origin", self.origin, ORIGINS)
        check_choice("split", self.split, SPLITS)
        check_columns(self.columns, _FIELDS)

    def column(self, name: str) -> str:
        return self.columns.get(name, name)


class TarSource:
    """Every tar under a place; see the module."""

    credits: tuple[str, ...] = ()

    def __init__(self, place: Place, config: TarsConfig):
        check_place(place)
        self.place, self.config, self.name = place, config, config.name

    def archives(self) -> Sequence["TarArchive"]:
        names = sorted(name for name in self.place.names() if name.endswith(".tar"))
        if not names:
            raise SourceError(
                f"{self.place.where}: no .tar in it (compressed ones cannot be used in place: unpack them)"
            )
        return [self._archive(name) for name in names]

    def _archive(self, name: str) -> "TarArchive":
        sidecar: str | None = f"{name.removesuffix('.tar')}.parquet"
        if self.config.captions not in ("auto", "parquet") or not self.place.has(str(sidecar)):
            if self.config.captions == "parquet":
                raise SourceError(
                    f"{self.place.url(str(sidecar))}: no such file beside its tar; set `captions` to txt or json"
                )
            sidecar = None
        about = [self.place.stamp(file) for file in (name, sidecar) if file]
        about += map(str, vars(self.config).values())
        return TarArchive(self.place, name, sidecar, self.config, hashlib.sha256("\n".join(about).encode()).hexdigest())


@dataclass(frozen=True)
class TarArchive:
    """One tar, with its parquet if it has one."""

    place: Place
    name: str
    sidecar: str | None
    config: TarsConfig
    checksum: str

    @property
    def split(self) -> str | None:
        return self.config.split

    @property
    def url(self) -> str:
        return self.place.url(self.name)

    def open(self) -> BinaryIO:
        return self.place.open(self.name)

    def records(self, file: BinaryIO) -> Iterator[Record | Quarantined]:
        listed = {} if self.sidecar is None else self._listed(self.sidecar)
        stem = self.name.removesuffix(".tar")
        try:
            for key, members in _samples(file):
                image = next((members[each] for each in IMAGE_EXTENSIONS if each in members), None)
                row = listed.pop(key, None)
                if image is None:
                    yield Quarantined(f"{stem}/{key}", "missing_image", f"no image among {', '.join(members)}")
                    continue
                found = self._caption(file, members, row)
                member = printable(f"{stem}/{image[0]}")
                if isinstance(found, Caption):
                    read = partial(_read, file.fileno(), *image[1:])
                    yield Record(member, read, (found,), self.config.name, self.config.split, offset=image[1])
                else:
                    yield Quarantined(member, *found)
        except tarfile.TarError as error:
            yield Quarantined(self.name, "truncated", f"{self.url}: not a whole tar ({error}); fetch it again")
        for key, row in listed.items():
            yield Quarantined(f"{stem}/{key}", *_why_missing(row, self.name))

    def _listed(self, sidecar: str) -> dict[str, dict[str, Any]]:
        """Rows of the parquet by key."""
        with self.place.open(sidecar) as file:
            try:
                parquet = pq.ParquetFile(file)
                columns = ["key", *map(self.config.column, _FIELDS), "status", "error_message"]
                table = parquet.read([name for name in columns if name in parquet.schema_arrow.names])
            except (pa.ArrowException, OSError) as error:
                raise SourceError(f"{self.place.url(sidecar)}: not a parquet file ({error}); fetch it again") from error
        for name in ("key", self.config.column("caption")):
            if name not in table.column_names:
                raise SourceError(
                    f"{self.place.url(sidecar)}: no column '{name}'; set ingestion.source.options.columns or `captions`"
                )
        return {str(row["key"]): row for row in table.to_pylist()}

    def _caption(
        self, file: BinaryIO, members: dict[str, _Member], row: dict[str, Any] | None
    ) -> Caption | tuple[str, str]:
        """What is said of a sample, or why that cannot be used: (reason, error)."""
        if self.sidecar is not None:
            if row is None:
                return "no_caption", f"{self.sidecar} has no row of its key"
        elif "txt" in members and self.config.captions != "json":
            row = {self.config.column("caption"): decode(_read(file.fileno(), *members["txt"][1:]))}
        elif "json" in members and self.config.captions != "txt":
            try:
                row = json.loads(_read(file.fileno(), *members["json"][1:]))
            except (ValueError, RecursionError) as error:
                return "bad_json", f"{members['json'][0]}: {error}"
        text = row.get(self.config.column("caption")) if isinstance(row, dict) else None
        if text is None:
            return "no_caption", f"no caption among {', '.join(members)}"
        if not isinstance(text, str):
            return "bad_row", f"the caption is {text!r:.80}, not a text"
        if not is_utf8(text):
            return "invalid_utf8", "the caption holds bytes that are no UTF-8"
        said = row if isinstance(row, dict) else {}
        language, category = (said.get(self.config.column(name)) for name in ("language", "category"))
        language = language if isinstance(language, str) and language else None
        return Caption(text, self.config.origin, language, category_of(category))


def _samples(file: BinaryIO) -> Iterator[tuple[str, dict[str, _Member]]]:
    """Key and members by extension of each sample: neighbours whose names agree up to the first dot."""
    key, members = "", dict[str, _Member]()
    tar: Any = tarfile.TarFile(fileobj=file)
    while True:
        try:
            member = tar.next()
        except tarfile.TarError:
            if members:
                yield key, members
            raise
        tar.members = []  # it keeps what it has seen, which adds up
        if member is None:
            break
        path = PurePosixPath(member.name)
        if not member.isreg() or path.name.startswith("."):
            continue
        stem, _, extension = path.name.partition(".")
        if (found := path.with_name(stem).as_posix()) != key and members:
            yield key, members
            members = {}
        key = found
        members[extension.lower()] = (member.name, member.offset_data, member.size)
    if members:
        yield key, members


def _why_missing(row: dict[str, Any], tar: str) -> tuple[str, str]:
    status = row.get("status")
    if status not in (None, "success"):
        return "not_downloaded", f"img2dataset: {status}: {row.get('error_message') or 'no reason given'}"
    return "missing_image", f"{tar} has no image of its key"


def _read(handle: int, offset: int, size: int) -> bytes:
    return os.pread(handle, size, offset)
