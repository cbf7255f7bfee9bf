"""A folder of pictures with their texts in one csv or jsonl file, or in a .txt file beside each picture.

One bad row costs that row: files are read as bytes and every line is decoded by itself.
"""

import csv
import io
import json
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

from blip_pipelines.config import ConfigError
from blip_pipelines.data import storage
from blip_pipelines.data.records import Caption, Record
from blip_pipelines.data.sources import Entry, Quarantined, SourceError

SIDECAR = "sidecar"
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jp2", ".ppm"}
ORIGINS = ("human", "web", "synthetic")
SPLITS = ("train", "val", "test")
_FIELDS = ("image", "caption", "origin", "split", "language")

_Row = tuple[str, Caption, str | None]  # member, caption, split


@dataclass(frozen=True)
class FolderConfig:
    """Where the texts are.

    Args:
        captions: a csv or jsonl file in the folder with the fields image and caption and, where known, origin, split
            and language; or "sidecar": beside `a/b.jpg` lies `a/b.txt`, one caption a line.
        columns: the file's own names for those fields, where they differ: `{caption: alt_text}`.
        origin: of captions that do not say it themselves.
        name: what the table's column `source` says.
    """

    captions: str = "captions.csv"
    columns: dict[str, str] = field(default_factory=dict)
    origin: str = "web"
    name: str = "folder"

    def __post_init__(self) -> None:
        if self.origin not in ORIGINS:
            raise ConfigError(f"ingestion.source.options.origin: {self.origin!r} is not one of {', '.join(ORIGINS)}")
        if unknown := self.columns.keys() - set(_FIELDS):
            raise ConfigError(
                f"ingestion.source.options.columns: {sorted(unknown)[0]!r} is no field; fields are {', '.join(_FIELDS)}"
            )


class FolderSource:
    """Images of a folder tree; see the module."""

    credits: tuple[str, ...] = ()

    def __init__(self, folder: Path, config: FolderConfig):
        self.folder, self.config, self.name = folder, config, config.name
        if not folder.is_dir():
            raise SourceError(f"{folder}: no such folder; set the source's folder to where the images are")
        self._captions_file = None if config.captions == SIDECAR else folder / config.captions
        if self._captions_file is not None and not self._captions_file.is_file():
            raise SourceError(
                f"{self._captions_file}: no captions file; set ingestion.source.options.captions to its name, "
                f"or to '{SIDECAR}' for one .txt file an image"
            )

    def records(self) -> Iterator[Record | Quarantined]:
        grouped, refused = self._rows
        for (member, split), captions in grouped.items():
            yield Record(member, partial(_read, self.folder / member), tuple(captions), self.name, split)
        yield from refused

    def listing(self) -> Iterable[Entry]:
        for member in dict.fromkeys(member for member, _ in self._rows[0]):
            path = self.folder / member
            try:
                yield Entry(member, path.stat().st_size, storage.sha256_file(path))
            except OSError:  # it vanished or may not be read: ingestion meets that again, and refuses the row by name
                yield Entry(member, 0, f"unreadable {member}")

    def truth(self) -> None:
        return None

    @cached_property
    def _rows(self) -> tuple[dict[tuple[str, str | None], list[Caption]], list[Quarantined]]:
        grouped: dict[tuple[str, str | None], list[Caption]] = {}
        refused: list[Quarantined] = []
        rows = self._sidecar_rows() if self._captions_file is None else self._file_rows(self._captions_file)
        images = set(self._images())
        named = set()
        for row in rows:
            if isinstance(row, Quarantined):
                refused.append(row)
                named.add(row.member)
                continue
            member, caption, split = row
            reason = self._refusal(member)
            if reason is not None:
                refused.append(Quarantined(member, *reason))
            else:
                grouped.setdefault((Path(member).as_posix(), split), []).append(caption)
            named.add(Path(member).as_posix())
        for member in sorted(images - named):
            refused.append(Quarantined(member, "no_caption", "no caption names this image"))
        return grouped, refused

    def _images(self) -> Iterator[str]:
        for parent, folders, files in os.walk(self.folder):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for file in sorted(files):
                if Path(file).suffix.lower() in IMAGE_SUFFIXES and not file.startswith("."):
                    yield (Path(parent) / file).relative_to(self.folder).as_posix()

    def _refusal(self, member: str) -> tuple[str, str] | None:
        """Why an image may not be read: (reason, error)."""
        path = self.folder / member
        try:
            target = path.resolve()
            if Path(member).is_absolute():
                return "outside_folder", f"an absolute path; images are named relative to {self.folder}"
            if ".." in Path(member).parts or not target.is_relative_to(self._root):
                return "outside_folder", f"leads out of {self.folder}, to {target}; only files inside are read"
            if not target.is_file():
                return "missing_image", f"there is no file {path}"
        except (OSError, ValueError, RuntimeError) as error:  # a name with a zero byte, too long, or links in a circle
            return "missing_image", f"not a name of a file: {error}"
        return None

    @cached_property
    def _root(self) -> Path:
        return self.folder.resolve()

    def _sidecar_rows(self) -> Iterator[_Row | Quarantined]:
        by_stem = {member.rpartition(".")[0]: member for member in self._images()}
        for parent, folders, files in os.walk(self.folder):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for file in sorted(name for name in files if name.endswith(".txt") and not name.startswith(".")):
                sidecar = (Path(parent) / file).relative_to(self.folder).as_posix()
                member = by_stem.get(sidecar.removesuffix(".txt"))
                if member is None:
                    yield Quarantined(sidecar, "missing_image", "a .txt file without an image of its name beside it")
                    continue
                if (reason := self._refusal(sidecar)) is not None:
                    yield Quarantined(sidecar, *reason)
                    continue
                for number, line in enumerate((self.folder / sidecar).read_bytes().splitlines(), start=1):
                    try:
                        text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                    except UnicodeDecodeError as error:
                        yield Quarantined(member, "invalid_utf8", f"{sidecar}, line {number}: {error}")
                        continue
                    if text.strip():
                        yield member, Caption(text, self.config.origin), None

    def _file_rows(self, path: Path) -> Iterator[_Row | Quarantined]:
        rows = self._jsonl_rows(path) if path.suffix in (".jsonl", ".json", ".ndjson") else self._csv_rows(path)
        for where, values in rows:
            yield self._row(where, values) if isinstance(values, dict) else Quarantined(where, *values)

    def _csv_rows(self, path: Path) -> Iterator[tuple[str, dict[str, object] | tuple[str, str]]]:
        """(place, values by the file's column names), or (place, (reason, error))."""
        csv.field_size_limit(sys.maxsize)  # a field over the module's default would end the whole file
        # Bytes that are no UTF-8 become lone surrogates here, which `_row` finds in the row that has them.
        text = path.read_bytes().removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")
        reader = csv.reader(io.StringIO(text, newline=""))
        header = [name.strip() for name in next(reader, [])]
        self._check_columns(path, header)
        for values in reader:
            where = f"{path.name}, line {reader.line_num}"
            if not values:
                continue
            if len(values) != len(header):
                yield where, ("bad_row", f"{len(values)} fields where the header has {len(header)}")
            else:
                yield where, dict(zip(header, values, strict=True))

    def _jsonl_rows(self, path: Path) -> Iterator[tuple[str, dict[str, object] | tuple[str, str]]]:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                where = f"{path.name}, line {number}"
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

    def _check_columns(self, path: Path, header: list[str]) -> None:
        for name in ("image", "caption"):
            column = self._column(name)
            if column not in header:
                raise SourceError(
                    f"{path}: no column '{column}' among {', '.join(header) or 'no columns'}; "
                    f"name it in ingestion.source.options.columns.{name}"
                )

    def _column(self, name: str) -> str:
        return self.config.columns.get(name, name)

    def _row(self, where: str, values: dict[str, object]) -> _Row | Quarantined:
        found = {name: values.get(self._column(name)) for name in _FIELDS}
        member = found["image"] if isinstance(found["image"], str) and found["image"].strip() else where
        for name, value in found.items():
            if value is not None and not isinstance(value, str):
                return Quarantined(_printable(member), "bad_row", f"{where}: '{name}' is {value!r:.80}, not a text")
            if value is not None and not _is_utf8(value):
                return Quarantined(
                    _printable(member), "invalid_utf8", f"{where}: '{name}' holds bytes that are no UTF-8"
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
        caption = Caption(str(found["caption"]), texts["origin"] or self.config.origin, texts["language"] or None)
        return texts["image"], caption, texts["split"] or None


def _read(path: Path) -> bytes:
    return path.read_bytes()


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate, from undecodable bytes or a JSON escape
        return False
    return True


def _printable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()
