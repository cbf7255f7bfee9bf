"""What sources of files have in common: rows that name an image become records by image, or are refused by name."""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property, lru_cache, partial
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from blip_pipelines.config import ConfigError
from blip_pipelines.data.places import Entry, Place
from blip_pipelines.data.records import Caption, Record, Refused
from blip_pipelines.data.sources import Quarantined, SourceError
from blip_pipelines.data.sources.grouped_rows import GroupedRows

ORIGINS = ("human", "web", "synthetic")
SPLITS = ("train", "val", "test")
_OPTIONS = "ingestion.source.options"
_KNOWN = 256  # images whose place was checked; the captions of one mostly follow one another


class Row(NamedTuple):
    """One caption of one image as an annotation file gives it."""

    member: str
    caption: Caption
    split: str | None


class FileSource(ABC):
    """Images that are files of a place, and rows that name them."""

    credits: tuple[str, ...] = ()

    def __init__(self, place: Place, name: str):
        check_place(place)
        self.place, self.name, self.readers = place, name, place.readers

    @abstractmethod
    def rows(self) -> Iterator[Row | Quarantined]:
        """Every caption, in the order of the annotations, and every row that is none."""

    def records(self) -> Iterator[Record | Quarantined]:
        read = self.place.read  # one bound method for all
        for member, split, captions in self._rows.groups():
            yield Record(member, partial(read, member), captions, self.name, split)
        yield from self._rows.refused()

    def listing(self) -> Iterable[Entry]:
        for member in self._rows.members():
            try:
                yield self.place.entry(member)
            except OSError:  # it vanished or may not be read: ingestion meets that again, and refuses the row by name
                yield Entry(member, 0, f"unreadable {member}")

    def truth(self) -> None:
        return None

    @cached_property
    def _rows(self) -> GroupedRows:
        grouped, refusal = GroupedRows(), lru_cache(_KNOWN)(self._refusal)
        for row in self.rows():
            if isinstance(row, Quarantined):
                grouped.refuse(row)
            elif (error := refusal(row.member)) is not None:
                grouped.refuse(Quarantined(row.member, error.reason, str(error)))
            else:
                grouped.add(PurePosixPath(row.member).as_posix(), row.split, row.caption)
        return grouped

    def _refusal(self, member: str) -> Refused | None:
        try:
            self.place.check(member)
        except Refused as error:
            return error
        return None


def check_place(place: Place) -> None:
    """Raise SourceError if there is nothing at a place."""
    if not any(True for _ in place.names()):
        raise SourceError(f"{place.where}: no such folder, or nothing in it; set `source` to where the data is")


def check_choice(key: str, value: str | None, choices: tuple[str, ...]) -> None:
    """Raise ConfigError if an option of a source is none of its choices; None is allowed."""
    if value is not None and value not in choices:
        raise ConfigError(f"{_OPTIONS}.{key}: {value!r} is not one of {', '.join(choices)}")


def check_columns(columns: Mapping[str, str], fields: tuple[str, ...]) -> None:
    """Raise ConfigError if a source names the column of what is none of its fields."""
    if unknown := columns.keys() - set(fields):
        raise ConfigError(f"{_OPTIONS}.columns: {sorted(unknown)[0]!r} is no field; fields are {', '.join(fields)}")


def read_annotations(place: Place, name: str, key: str) -> Any:
    """A JSON file of a place.

    Args:
        key: the option that names it.

    Raises:
        SourceError: there is none, or it is no JSON.
    """
    try:
        return json.loads(read_file(place, name, key))
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{place.url(name)}: not valid JSON ({error}); fetch it again") from error


def read_file(place: Place, name: str, key: str) -> bytes:
    """A small file of a place. Raises SourceError: there is none."""
    if not place.has(name):
        raise SourceError(f"{place.url(name)}: no such file; set {_OPTIONS}.{key} to its name within {place.where}")
    return place.read(name)


def decode(content: bytes) -> str:
    """Bytes as text; those that are no UTF-8 become lone surrogates, which `is_utf8` finds in the row that has them."""
    return content.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")


def is_utf8(text: str) -> bool:
    """Whether a text has no lone surrogate, from undecodable bytes or a JSON escape."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def category_of(value: object) -> str | None:
    """What a column says of the category: a text or a number; None where it says nothing of that kind."""
    text = " ".join(str(value).split()) if isinstance(value, str | int) else ""
    return text if text and is_utf8(text) else None


def printable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()
