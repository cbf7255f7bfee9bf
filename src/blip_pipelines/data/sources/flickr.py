"""Flickr30K and Flickr8k with their captions in a table, in each form that goes round.

`results.csv` of Kaggle (image_name| comment_number| comment), the original `results_20130124.token` (name#number, tab,
caption), `captions.txt` of Flickr8k (image,caption), `flickr_annotations_30k.csv` of the Hub (raw, sentids, split,
filename). Which one a file is, its first line says.
"""

import csv
import io
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from blip_pipelines.data.places import Place
from blip_pipelines.data.records import Caption
from blip_pipelines.data.sources import Quarantined, SourceError
from blip_pipelines.data.sources.files import (
    ORIGINS,
    SPLITS,
    FileSource,
    Row,
    check_choice,
    decode,
    is_utf8,
    printable,
    read_file,
)

_Fields = tuple[str, list[str]]  # where a line is, its fields


@dataclass(frozen=True)
class FlickrConfig:
    """Args:
    captions: the table, within the source's folder.
    images: the folder of the images there.
    split: of all images, if the table does not say; None leaves the choice to ingestion.
    """

    captions: str = "results.csv"
    images: str = "flickr30k_images"
    split: str | None = None
    origin: str = "human"
    language: str | None = "en"
    name: str = "flickr30k"

    def __post_init__(self) -> None:
        check_choice("origin", self.origin, ORIGINS)
        check_choice("split", self.split, SPLITS)


class FlickrSource(FileSource):
    """Images and captions of one table; see the module."""

    def __init__(self, place: Place, config: FlickrConfig):
        super().__init__(place, config.name)
        self.config = config

    def rows(self) -> Iterator[Row | Quarantined]:
        text = decode(read_file(self.place, self.config.captions, "captions"))
        first = text.split("\n", 1)[0].strip()
        header = [name.strip() for name in first.split("|" if "|" in first else ",")]
        if header[:3] == ["image_name", "comment_number", "comment"] and "|" in first:
            return self._comments(text)
        if "#" in first and "\t" in first:
            return self._tokens(text)
        if {"raw", "filename"} <= set(header):
            return self._annotations(text, header)
        if header[:2] == ["image", "caption"]:
            return self._pairs(text)
        raise SourceError(
            f"{self.place.url(self.config.captions)}: starts with {first[:80]!r}, which no table of Flickr's does; for "
            "any other csv use `kind: folder`"
        )

    def _comments(self, text: str) -> Iterator[Row | Quarantined]:
        for number, line in enumerate(text.splitlines()[1:], start=2):
            fields = line.split("|", 2)
            if not line.strip():
                continue
            if len(fields) < 3:  # one line of the file that goes round has lost its second bar
                yield self._bad(number, fields[0].strip(), f"{len(fields)} fields where the header has 3: {line:.80}")
            else:
                yield self._row(number, fields[0].strip(), fields[2])

    def _tokens(self, text: str) -> Iterator[Row | Quarantined]:
        for number, line in enumerate(text.splitlines(), start=1):
            name, tab, caption = line.partition("\t")
            if tab and "#" in name:
                yield self._row(number, name.rpartition("#")[0], caption)
            elif line.strip():
                yield self._bad(number, "", f"no name#number before a tab: {line:.80}")

    def _pairs(self, text: str) -> Iterator[Row | Quarantined]:
        for number, fields in self._csv(text):
            if len(fields) < 2:
                yield self._bad(number, fields[0], "no caption")
            else:
                yield self._row(number, fields[0], ",".join(fields[1:]))  # commas of captions were not always quoted

    def _annotations(self, text: str, header: list[str]) -> Iterator[Row | Quarantined]:
        for number, fields in self._csv(text):
            found = dict(zip(header, fields, strict=False))
            name, split = found.get("filename", ""), found.get("split") or self.config.split
            try:
                captions = json.loads(found["raw"])
                if not isinstance(captions, list) or not captions:
                    raise ValueError("no list of captions")
            except (KeyError, ValueError, RecursionError) as error:
                yield self._bad(number, name, f"'raw' cannot be read: {error}")
                continue
            if split not in (None, *SPLITS):
                refused = self._bad(number, name, f"{split!r} is not one of {', '.join(SPLITS)}", "bad_split")
                yield from [refused] * len(captions)
            else:
                yield from (self._row(number, name, caption, split) for caption in captions)

    def _csv(self, text: str) -> Iterator[tuple[int, list[str]]]:
        csv.field_size_limit(sys.maxsize)
        reader = csv.reader(io.StringIO(text, newline=""))
        next(reader)
        yield from ((reader.line_num, fields) for fields in reader if fields)

    def _row(self, number: int, name: str, text: Any, split: str | None = None) -> Row | Quarantined:
        if not name or not isinstance(text, str):
            return self._bad(number, name, "no image is named" if not name else f"a caption is {text!r:.80}, no text")
        if not is_utf8(name + text):
            return self._bad(number, name, "holds bytes that are no UTF-8", "invalid_utf8")
        member = f"{self.config.images.strip('/')}/{name}".lstrip("/")
        return Row(member, Caption(text, self.config.origin, self.config.language), split or self.config.split)

    def _bad(self, number: int, name: str, error: str, reason: str = "bad_row") -> Quarantined:
        where = f"{PurePosixPath(self.config.captions).name}, line {number}"
        return Quarantined(printable(name) or where, reason, f"{where}: {printable(error)}")
