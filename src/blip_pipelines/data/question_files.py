"""Published question data as it lies on disk, read by a description of its layout instead of a class for each.

    vqav2:
      folder: data/01_raw/vqav2
      splits:
        val:
          file: v2_OpenEnded_mscoco_val2014_questions.json
          at: questions                                       # the list of records inside the file
          join: [{file: v2_mscoco_val2014_annotations.json, at: annotations, by: question_id, into: note}]
      fields: {question: question, answers: "note.answers[].answer", answer_type: note.answer_type}
      image: "val2014/COCO_val2014_{image_id:012d}.jpg"

A path such as `note.answers[].answer` goes into mappings by name, into lists by number, and over a whole list by `[]`.
Beside its own keys a record knows `key` (in a file that maps names to records), `item` (see `each`) and `file`.
"""

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from blip_pipelines.config import ConfigError
from blip_pipelines.data.splits import SplitConfig, by_image

ANY = "*"  # in `where`: whatever is there
UNSPLIT = "all"  # name of the split of records that say theirs themselves, in the field `split`, or have none
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


class QuestionFileError(ValueError):
    """Files that are not laid out as described; names the file and what was looked for."""


@dataclass(frozen=True)
class JoinConfig:
    """Records of another file that belong to those of the first.

    Args:
        by: path in the first record to the value that both share; key: in the other, null for the same path.
        into: the name under which the first record then has the other; with `many` a list of all that match.
    """

    file: str
    by: str
    into: str
    at: str = ""
    key: str | None = None
    many: bool = False


@dataclass(frozen=True)
class RecordsConfig:
    """The records of one split.

    Args:
        file: json, jsonl, csv or tsv, relative to the folder; at: path to the list, or mapping, of records in it.
        where: by path, the value (or one of the values) that a record must have; `*` for any.
    """

    file: str
    at: str = ""
    join: tuple[JoinConfig, ...] = ()
    where: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class FilesConfig:
    """Layout of one data set; see the module.

    Args:
        folder: of all its files and pictures.
        splits: train, val, test; or `all`, whose records say their split or are divided by a hash of their picture.
        fields: by the name that templates use, the path of its value, or paths whose values together are a list.
        image: path of a record's picture in the folder, with `{name}` of its keys or fields, or `{split}`, ours if it
            has none; `frames`: of a video, the folder of its frames, in the order of their names.
        ingested: pictures are named as in the caption table, by member or key, and have no file here.
        id: path of a sample's name; null counts them.
        each: path of a list in a record, whose every element is a sample of its own, `item`; with several paths, the
            lists side by side.
        turn: how many elements of `each` are one `item` (question and answer of a conversation: 2).
        history: give later items of a record the field `history`: questions and answers of the earlier ones.
        lookup: by field whose value is a number (or several), the path of the list that it counts in.
        pick: by field whose value is a number, the field with the list that it counts in.
        values: by field, what its values are called.
        drop: pieces of text that are no words, such as "<image>".
    """

    folder: str
    splits: dict[str, RecordsConfig]
    fields: dict[str, str | tuple[str, ...]]
    image: str | None = None
    frames: str | None = None
    ingested: bool = False
    id: str | None = None
    each: tuple[str, ...] = ()
    turn: int = 1
    history: bool = False
    lookup: dict[str, str] = field(default_factory=dict)
    pick: dict[str, str] = field(default_factory=dict)
    values: dict[str, dict[str, str]] = field(default_factory=dict)
    drop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if (self.image is None) == (self.frames is None):
            raise ConfigError("files: give either `image` or `frames`: where the pictures are")
        if unknown := self.splits.keys() - {"train", "val", "test", UNSPLIT}:
            raise ConfigError(f"files.splits: {sorted(unknown)[0]!r} is none of train, val, test, {UNSPLIT}")


class FileSample(NamedTuple):
    """A sample as files have it; `images` are paths below the folder, or names of ingested pictures."""

    name: str
    images: tuple[str, ...]
    split: str
    fields: dict[str, Any]


def read_files(
    config: FilesConfig, where: str, shares: SplitConfig, seed: int, unseen: Sequence[str] = ()
) -> Iterator[FileSample]:
    """The samples of all splits, in the order of the files.

    Args:
        where: names the data set in messages.
        unseen: splits of which only the words are wanted; their pictures need not be there, and are not given.
        shares, seed: divide records that have no split.

    Raises:
        QuestionFileError: a file is missing, unreadable or without what the description says.
    """
    for split, records in config.splits.items():
        number = 0
        for record in _records(config, records, where):
            for item in _items(config, record, where):
                name = str(value_at(item, config.id)) if config.id else f"{split}/{number}"
                fields = _fields(config, item)
                known = {"split": split, **item, **fields}
                images = () if split in unseen else _images(config, known, f"{where}: sample {name}")
                of_sample = split
                if split == UNSPLIT:
                    of_sample = fields.get("split") or by_image(images[0], shares, seed)
                yield FileSample(name, images, of_sample, fields)
                number += 1


def value_at(record: Any, path: str) -> Any:
    """What lies at a path, None where nothing does; `[]` gives a list of what lies behind it."""
    found, parts = record, path.split(".") if path else []
    for place, part in enumerate(parts):
        name = part.removesuffix("[]")
        if isinstance(found, Mapping):
            found = found.get(name)
        elif isinstance(found, Sequence) and not isinstance(found, str) and name.isdigit() and int(name) < len(found):
            found = found[int(name)]
        else:
            return None
        if part.endswith("[]") and found is not None:
            return [value_at(element, ".".join(parts[place + 1 :])) for element in found]
    return found


def _records(config: FilesConfig, wanted: RecordsConfig, where: str) -> Iterator[dict[str, Any]]:
    folder = Path(config.folder)
    joined = []
    for join in wanted.join:
        by_key: dict[Any, list[Any]] = {}
        for other in _list(folder / join.file, join.at, where):
            by_key.setdefault(str(value_at(other, join.key or join.by)), []).append(other)
        joined.append((join, by_key))
    for record in _list(folder / wanted.file, wanted.at, where):
        for join, by_key in joined:
            others = by_key.get(str(value_at(record, join.by)), [])
            record[join.into] = others if join.many else (others[0] if others else None)
        if all(_is_wanted(value_at(record, path), value) for path, value in wanted.where.items()):
            yield record


def _list(path: Path, at: str, where: str) -> Iterator[dict[str, Any]]:
    """The records of a file, each a dictionary of its own."""
    if not path.is_file():
        raise QuestionFileError(f"{where}: there is no {path}; the data set's `files` describe what should lie there")
    if path.suffix in (".jsonl", ".ndjson"):
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _checked(_parsed(line, f"{path}, line {number}"), f"{path}, line {number}")
    elif path.suffix in (".csv", ".tsv"):
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from (dict(row) for row in csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","))
    else:
        content = _parsed(path.read_text("utf-8"), str(path))
        found = value_at(content, at)
        if isinstance(found, Mapping):
            found = [{"key": key, **_checked(record, f"{path}, {key}")} for key, record in found.items()]
        if not isinstance(found, list):
            raise QuestionFileError(f"{path}: no list of records {f'at {at!r}' if at else 'in it'}")
        for number, record in enumerate(found):
            yield {"file": content, **_checked(record, f"{path}, record {number}")}


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise QuestionFileError(f"{place}: not JSON ({error})") from error


def _checked(record: Any, place: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise QuestionFileError(f"{place}: {record!r:.60} where a record with names is expected")
    return record


def _is_wanted(value: Any, wanted: Any) -> bool:
    if wanted == ANY:
        return value not in (None, "")
    return value in wanted if isinstance(wanted, list | tuple) else value == wanted


def _items(config: FilesConfig, record: dict[str, Any], where: str) -> Iterator[dict[str, Any]]:
    """The record, or one for each `item` of it."""
    if not config.each:
        yield record
        return
    lists = [value_at(record, path) for path in config.each]
    for path, found in zip(config.each, lists, strict=True):
        if not isinstance(found, list):
            raise QuestionFileError(f"{where}: no list at {path!r} of a record with {', '.join(record)}")
    elements = lists[0] if len(lists) == 1 else [list(together) for together in zip(*lists, strict=True)]
    turns: list[tuple[Any, Any]] = []
    for start in range(0, len(elements) - config.turn + 1, config.turn):
        item = elements[start : start + config.turn] if config.turn > 1 else elements[start]
        found = {**record, "item": item, "number": start // config.turn, "history": list(turns)}
        yield found
        if config.history:
            fields = _fields(config, found)
            turns.append((fields.get("question"), fields.get("answer")))


def _fields(config: FilesConfig, record: dict[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {"history": record["history"]} if config.history else {}
    for name, path in config.fields.items():
        value: Any = value_at(record, path) if isinstance(path, str) else _several(record, path)
        if name in config.lookup:
            value = _counted(value, value_at(record, config.lookup[name]))
        if isinstance(value, str):
            for piece in config.drop:
                value = value.replace(piece, "")
            value = value.strip()
        fields[name] = value
    for name, of in config.pick.items():
        fields[name] = _counted(fields[name], fields[of])
    for name, called in config.values.items():
        fields[name] = called.get(str(fields[name]), fields[name])
    return fields


def _several(record: Any, paths: Sequence[str]) -> list[Any]:
    values = (value_at(record, path) for path in paths)
    return [value for value in values if value not in (None, "")]


def _counted(numbers: Any, values: Any) -> Any:
    if numbers is None or not isinstance(values, list):
        return None
    return [values[int(number)] for number in numbers] if isinstance(numbers, list) else values[int(numbers)]


def _images(config: FilesConfig, known: Mapping[str, Any], where: str) -> tuple[str, ...]:
    words = config.image or config.frames or ""
    try:
        name = words.format_map(known)
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise QuestionFileError(f"{where}: cannot name its picture by {words!r}: {error!r}") from error
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise QuestionFileError(f"{where}: its picture {name} is outside {config.folder}")
    if config.image:
        return (name,)
    folder = Path(config.folder) / name
    frames = sorted(path for path in folder.glob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not frames:
        raise QuestionFileError(f"{where}: no frames in {folder}; extract some of the video's there as pictures")
    return tuple(path.relative_to(config.folder).as_posix() for path in frames)
