"""Questions about pictures, of many data sets, as one instruction table.

Most data sets ask about pictures that ingestion stored. Where one brings files of its own, the pictures of all of them
are stored with the table, so that it speaks of one set of images. Evaluation comes first: a picture that any data set
evaluates on is trained on by none.
"""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from blip_pipelines.config import speed_only
from blip_pipelines.data import storage
from blip_pipelines.data.images import ImageLimits
from blip_pipelines.data.instructions import INSTRUCTION_SCHEMA, OWN_IMAGES, DataSet, write_instructions
from blip_pipelines.data.own_images import Place, Stored, store, wanted_file
from blip_pipelines.data.pairs import Pairs
from blip_pipelines.data.question_files import read_files
from blip_pipelines.data.questions import Asker, DataSetConfig, Question, Sample
from blip_pipelines.data.shard_jobs import Wanted
from blip_pipelines.data.shards import read_image
from blip_pipelines.data.sources.emoji_facts import emoji_facts
from blip_pipelines.data.splits import SplitConfig

log = logging.getLogger(__name__)

EMOJI = "emoji"
_PLACE = ("key", "member", "shard", "offset", "size", "width", "height")


class InstructError(RuntimeError):
    """Data sets that give no table; the message says which, and what to do."""


@dataclass(frozen=True)
class InstructionsConfig:
    """Everything that decides an instruction table.

    Args:
        data_sets: by name; null leaves out one that another environment has.
        templates: lists of words that several data sets share.
        facts: what is known of the ingested pictures: `emoji`, of the embedded default, or a csv, jsonl or parquet
            file with a column `image`, the member or key of a picture, and any others.
        splits: shares of records that come without a split.
        limits, shard_images, workers: of pictures that data sets bring, as in ingestion.
    """

    data_sets: dict[str, DataSetConfig | None]
    templates: dict[str, tuple[str, ...]] = field(default_factory=dict)
    facts: str | None = None
    seed: int = 0
    splits: SplitConfig = field(default_factory=SplitConfig)
    shard_images: int = 1024
    limits: ImageLimits = field(default_factory=ImageLimits)
    workers: int = speed_only(0)

    @property
    def chosen(self) -> dict[str, DataSetConfig]:
        return {name: each for name, each in self.data_sets.items() if each is not None}


def instruct(
    config: InstructionsConfig, pairs: Path, images: Path, packages: Path | None, out: Path, own_images: Path
) -> dict[str, Any]:
    """Write the table of `config` to `out`; returns the counts that its manifest also holds.

    Args:
        pairs, images: of ingestion.
        packages: wheels of the embedded default, for `facts: emoji`.
        out: gets the table.
        own_images: gets all pictures that are asked about if a data set brings any, else nothing.

    Raises:
        ConfigError, QuestionFileError: a data set is not as described; names data set, template or file.
        InstructError: a data set has no rows, or names pictures that are not there.
    """
    if not config.chosen:
        raise InstructError("instructions.data_sets: none is chosen, so there is nothing to ask")
    ingested = _Ingested(Pairs.open(pairs, images), config, packages)
    data_sets = {name: _read(name, each, config, ingested) for name, each in config.chosen.items()}
    if has_own := any(each.files and not each.files.ingested for each in config.chosen.values()):
        stored = _store(data_sets, config, ingested, own_images)
    else:
        store({}, own_images, config.shard_images, config.limits)
        stored = Stored(ingested.places, storage.content_hash(images), {})
    kept, dropped = _keep(data_sets, stored)
    about = {
        "data_sets": {name: asdict(_describe(kept[name], data_sets[name])) for name in data_sets},
        "in_evaluation": dict(sorted(dropped.items())),
        "refused": stored.refused,
        "seed": config.seed,
        OWN_IMAGES: has_own,
    }
    tables = list(_tables(kept, data_sets, stored, ingested))
    write_instructions(out, tables, stored.images_hash, about)
    rows = sum(table.num_rows for table in tables)
    log.info("instructions: %d rows of %d data sets", rows, len(data_sets))
    return {"rows": rows, **about}


def files_hash(config: InstructionsConfig) -> str:
    """Names the state of all files that the data sets and facts are read from, by name, size and date."""
    listing = [] if config.facts in (None, EMOJI) else [Path(str(config.facts))]
    for each in config.chosen.values():
        listing += sorted(Path(each.files.folder).rglob("*")) if each.files else []
    stats = [(path.as_posix(), path.stat()) for path in listing if path.is_file()]
    return storage.sha256("\n".join(f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in stats).encode())


class _DataSet(NamedTuple):
    config: DataSetConfig
    questions: list[Question]  # a held-out data set's training questions are not among them
    candidates: list[str] | None


class _Ingested:
    """What ingestion knows of pictures."""

    def __init__(self, pairs: Pairs, config: InstructionsConfig, packages: Path | None):
        self.pairs, self.config, self.packages = pairs, config, packages
        first_rows = pairs.unique_images()
        columns = {name: pairs.column(name)[first_rows].tolist() for name in (*_PLACE, "split", "subset")}
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        self.places: dict[str, Place] = {row["key"]: {name: row[name] for name in _PLACE} for row in rows}
        self.splits: dict[str, tuple[str, str | None]] = {row["key"]: (row["split"], row["subset"]) for row in rows}
        self._key_of_member = {row["member"]: row["key"] for row in rows}

    def wanted(self, place: Place) -> Wanted:
        """A stored picture, to be stored again."""
        assert self.pairs.images is not None
        spot = place["shard"], place["offset"], place["size"]
        return Wanted(partial(read_image, self.pairs.images, *spot), place["key"])

    def key(self, image: str, where: str) -> str:
        """The key of a picture named by its member or key."""
        if image in self.places:
            return image
        if image not in self._key_of_member:
            raise InstructError(f"{where}: no ingested picture is called {image!r}; name it by its member or its key")
        return self._key_of_member[image]

    def samples(self, table: str) -> Iterator[Sample]:
        """A sample a picture, of what the table knows of it."""
        for image, fields in self._facts if table == "facts" else self._captions():
            yield Sample(self.places[image]["member"], (image,), self.splits[image][0], fields)

    def _captions(self) -> Iterator[tuple[str, dict[str, Any]]]:
        captions: dict[str, list[str]] = {}
        for key, caption in zip(self.pairs.keys, self.pairs.column("caption"), strict=True):
            captions.setdefault(key, []).append(caption)
        yield from ((key, {"answers": texts, "caption": texts[0]}) for key, texts in captions.items())

    @cached_property
    def _facts(self) -> list[tuple[str, dict[str, Any]]]:
        facts = self.config.facts
        if facts is None:
            raise InstructError("instructions.facts: null, but a data set asks about the table `facts`")
        if facts == EMOJI:
            if self.packages is None:
                raise InstructError("instructions.facts: emoji needs the folder of packages")
            table = emoji_facts(self.packages, self.pairs).drop_columns(["member"]).rename_columns({"key": "image"})
        else:
            table = _label_table(Path(facts))
        rows = table.to_pylist()
        return [(self.key(str(row.pop("image")), f"instructions.facts: {facts}"), row) for row in rows]


def _label_table(path: Path) -> pa.Table:
    readers = {".csv": pa.csv.read_csv, ".jsonl": pa.json.read_json, ".parquet": pq.read_table}
    if path.suffix not in readers or not path.is_file():
        raise InstructError(f"instructions.facts: {path} is no csv, jsonl or parquet file that is there")
    table = readers[path.suffix](path)
    if "image" not in table.column_names:
        raise InstructError(f"instructions.facts: {path} has no column 'image' among {', '.join(table.column_names)}")
    return table


def _read(name: str, config: DataSetConfig, all_of: InstructionsConfig, ingested: _Ingested) -> _DataSet:
    where = f"instructions.data_sets.{name}"
    asker = Asker(name, config, all_of.templates, all_of.seed)
    if config.files is None:
        samples = ingested.samples(config.table or "facts")
    else:
        samples = _of_files(config, where, all_of, ingested)
    questions = list(asker.ask(samples))
    candidates = asker.candidates(question for question in questions if question.sample.split == "train")
    if config.role == "held_out":
        questions = [question for question in questions if question.sample.split != "train"]
    if not questions:
        raise InstructError(f"{where}: gives no question; check its table or files, `answer` and `ask.about`")
    return _DataSet(config, questions, candidates)


def _of_files(config: DataSetConfig, where: str, all_of: InstructionsConfig, ingested: _Ingested) -> Iterator[Sample]:
    files = config.files
    assert files is not None
    unseen = ("train",) if config.role == "held_out" else ()  # their answers are wanted at most
    for name, images, split, fields in read_files(files, where, all_of.splits, all_of.seed, unseen):
        if files.ingested:
            keys = tuple(ingested.key(image, f"{where}: sample {name}") for image in images)
            yield Sample(name, keys, ingested.splits[keys[0]][0], fields)
        else:
            yield Sample(name, tuple(f"{files.folder}/{image}" for image in images), split, fields)


def _store(data_sets: Mapping[str, _DataSet], config: InstructionsConfig, ingested: _Ingested, folder: Path) -> Stored:
    """Every picture that is asked about, in the order of the questions."""
    wanted: dict[str, Wanted] = {}
    for each in data_sets.values():
        for question in each.questions:
            for name in question.sample.images:
                if name not in wanted:
                    place = ingested.places.get(name)
                    wanted[name] = wanted_file(Path(name)) if place is None else ingested.wanted(place)
    return store(wanted, folder, config.shard_images, config.limits, config.workers)


def _keep(data_sets: Mapping[str, _DataSet], stored: Stored) -> tuple[dict[str, list[Question]], Counter[str]]:
    """The questions whose pictures are there and, of those to train on, in no evaluation; how many of those are."""
    there = {
        name: [q for q in each.questions if all(stored.places.get(image) for image in q.sample.images)]
        for name, each in data_sets.items()
    }
    evaluated = {
        _place(stored, image)["key"]
        for questions in there.values()
        for question in questions
        if question.sample.split != "train"
        for image in question.sample.images
    }
    kept, dropped = {}, Counter[str]()
    for name, questions in there.items():
        kept[name] = [
            question
            for question in questions
            if question.sample.split != "train"
            or not any(_place(stored, image)["key"] in evaluated for image in question.sample.images)
        ]
        if lost := len(questions) - len(kept[name]):
            dropped[name] = lost
            log.warning(
                "instructions.data_sets.%s: %d training rows left out, their pictures are evaluated on", name, lost
            )
        if not kept[name]:
            raise InstructError(
                f"instructions.data_sets.{name}: none of {len(data_sets[name].questions)} questions is left: pictures "
                "cannot be read, or all of them are evaluated on by other data sets"
            )
    return kept, dropped


def _place(stored: Stored, image: str) -> Place:
    place = stored.places[image]
    assert place is not None
    return place


def _describe(questions: Sequence[Question], data_set: _DataSet) -> DataSet:
    config = data_set.config
    by_split: dict[str, list[Question]] = {}
    for question in questions:
        by_split.setdefault(question.sample.split, []).append(question)
    basis = by_split.get("train") or questions
    has_own = basis[0].candidates is not None
    return DataSet(
        task=config.task,
        role=config.role,
        metric=config.metric,
        multiplier=config.multiplier,
        rows={split: len(found) for split, found in sorted(by_split.items())},
        candidates=data_set.candidates,
        majority=None if has_own else _commonest(map(_likeliest, basis))[0],
        majority_rates={
            split: _commonest(map(_position if has_own else _likeliest, found))[1] / len(found)
            for split, found in sorted(by_split.items())
        },
    )


def _commonest(values: Iterator[Any]) -> tuple[Any, int]:
    return Counter(values).most_common(1)[0]


def _likeliest(question: Question) -> str:
    return Counter(question.answers).most_common(1)[0][0]


def _position(question: Question) -> int:
    answer, candidates = _likeliest(question), question.candidates or []
    return candidates.index(answer) if answer in candidates else -1


def _tables(
    kept: Mapping[str, list[Question]], data_sets: Mapping[str, _DataSet], stored: Stored, ingested: _Ingested
) -> Iterator[pa.Table]:
    """A table for each shard of pictures, its rows in the order of the pictures in it."""
    last = max(place["shard"] for place in stored.places.values() if place is not None)
    rows: list[list[dict[str, Any]]] = [[] for _ in range(last + 1)]
    for name, questions in kept.items():
        config = data_sets[name].config
        fixed = {"task": config.task, "data_set": name, "role": config.role, "weight": config.weight}
        for question in questions:
            sample = question.sample
            places = [_place(stored, image) for image in sample.images]
            subset = None if sample.split == "train" else ingested.splits.get(sample.images[0], (None, None))[1]
            row = {
                **places[0],
                "frames": places if len(places) > 1 else None,
                "instruction": question.instruction,
                "answer": _likeliest(question),
                "answers": question.answers,
                "candidates": question.candidates,
                "sample": sample.name,
                "template": question.template,
                "answer_type": sample.fields.get("answer_type"),
                "split": sample.split,
                "subset": subset,
                **fixed,
            }
            rows[places[0]["shard"]].append(row)
    for of_shard in rows:
        of_shard.sort(key=lambda row: row["offset"])
        yield pa.Table.from_pylist(of_shard, INSTRUCTION_SCHEMA)
