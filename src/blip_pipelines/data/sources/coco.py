"""COCO's caption annotations, and Karpathy's split of them, as they are downloaded.

COCO: `images` (id, file_name) and `annotations` (image_id, caption), a file a split. Karpathy: `images` alone, each
with filepath, filename, split and sentences; it exists for COCO, Flickr8k and Flickr30K.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
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
    is_utf8,
    printable,
    read_annotations,
)

_KARPATHY_SPLITS = {"restval": "train"}  # images of COCO's validation that everyone trains on


@dataclass(frozen=True)
class AnnotationFile:
    """One annotation file.

    Args:
        images: folder of its images within the source's, as `train2014`; Karpathy's adds its own `filepath`.
        split: of its images, if the file does not say; None leaves the choice to ingestion.
    """

    images: str = ""
    split: str | None = None

    def __post_init__(self) -> None:
        check_choice("annotations.<file>.split", self.split, SPLITS)


@dataclass(frozen=True)
class CocoConfig:
    """`annotations`: by file name within the source's folder, what it is of."""

    annotations: dict[str, AnnotationFile] = field(default_factory=dict)
    origin: str = "human"
    language: str | None = "en"
    name: str = "coco"

    def __post_init__(self) -> None:
        check_choice("origin", self.origin, ORIGINS)


class CocoSource(FileSource):
    """Images and captions of annotation files; see the module."""

    def __init__(self, place: Place, config: CocoConfig):
        super().__init__(place, config.name)
        self.config = config
        if not config.annotations:
            raise SourceError(
                "ingestion.source.options.annotations: name the annotation files, as "
                "{annotations/captions_train2017.json: {images: train2017, split: train}}"
            )

    def rows(self) -> Iterator[Row | Quarantined]:
        for file, about in self.config.annotations.items():
            found = read_annotations(self.place, file, "annotations")
            images = found.get("images") if isinstance(found, dict) else None
            if not isinstance(images, list):
                raise SourceError(f"{self.place.url(file)}: has no list of images; it is neither COCO's nor Karpathy's")
            is_karpathy = "annotations" not in found
            rows = self._karpathy(file, images, about) if is_karpathy else self._coco(file, found, about)
            yield from rows

    def _coco(self, file: str, found: dict[str, Any], about: AnnotationFile) -> Iterator[Row | Quarantined]:
        members: dict[Any, str] = {}
        for number, image in enumerate(found["images"]):
            try:
                members[image["id"]] = _join(about.images, image["file_name"])
            except (KeyError, TypeError):
                yield Quarantined(f"{file}, image {number}", "bad_row", f"no id or file_name: {image!r:.200}")
        named = set()
        for number, annotation in enumerate(found["annotations"]):
            where = f"{file}, annotation {number}"
            try:
                image, text = annotation["image_id"], annotation["caption"]
                member = members.get(image)
            except (KeyError, TypeError):
                yield Quarantined(where, "bad_row", f"no image_id or caption: {annotation!r:.200}")
                continue
            if member is None:
                yield Quarantined(where, "missing_image", f"the file lists no image of id {image!r}")
                continue
            named.add(member)
            yield self._row(where, member, text, about.split)
        for member in members.values():
            if member not in named:
                yield Quarantined(member, "no_caption", f"no caption of {file} names this image")

    def _karpathy(self, file: str, images: list[Any], about: AnnotationFile) -> Iterator[Row | Quarantined]:
        for number, image in enumerate(images):
            where = f"{file}, image {number}"
            try:
                member = _join(about.images, image.get("filepath", ""), image["filename"])
                sentences = [sentence["raw"] for sentence in image["sentences"]]
                split = image.get("split", about.split)
            except (KeyError, TypeError, AttributeError):
                yield Quarantined(where, "bad_row", f"no filename or sentences: {image!r:.200}")
                continue
            split = _KARPATHY_SPLITS.get(split, split)
            if split not in (None, *SPLITS):
                refused = Quarantined(member, "bad_split", f"{where}: {split!r} is not one of {', '.join(SPLITS)}")
                yield from [refused] * max(len(sentences), 1)
            elif not sentences:
                yield Quarantined(member, "no_caption", f"{where}: has no sentences")
            else:
                yield from (self._row(where, member, text, split) for text in sentences)

    def _row(self, where: str, member: str, text: Any, split: str | None) -> Row | Quarantined:
        if not isinstance(text, str):
            return Quarantined(printable(member), "bad_row", f"{where}: the caption is {text!r:.80}, not a text")
        if not is_utf8(text + member):
            return Quarantined(printable(member), "invalid_utf8", f"{where}: holds half a character")
        return Row(member, Caption(text, self.config.origin, self.config.language), split)


def _join(*parts: str) -> str:
    return "/".join(part.strip("/") for part in parts if part)
