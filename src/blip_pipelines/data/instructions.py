"""The instruction table: a row is an image (or the frames of a video), an instruction and what is to be answered.

It has the face of the caption table, so that whatever reads images for `Pairs` reads them for `Instructions`. What an
instruction says is decided when the table is written (`questions`); nothing of it is made up in training.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from blip_pipelines.data import storage
from blip_pipelines.data.image_rows import ImageRows
from blip_pipelines.data.records import PAIR_SCHEMA
from blip_pipelines.data.storage import MANIFEST, StorageError
from blip_pipelines.data.table_shards import write_table

OWN_IMAGES = "own_images"  # in the manifest: the table's pictures are its own and lie beside it

_PLACE = [PAIR_SCHEMA.field(name) for name in ("key", "member", "shard", "offset", "size", "width", "height")]
_TEXTS = pa.list_(pa.string())

INSTRUCTION_SCHEMA = pa.schema(
    [
        *_PLACE,  # of the image, or of a video's first frame
        pa.field("frames", pa.list_(pa.struct(_PLACE))),  # of a video, in its order; null for an image
        pa.field("instruction", pa.string(), nullable=False),  # with all its context: OCR tokens, dialogue, options
        pa.field("answer", pa.string(), nullable=False),  # the likeliest of the answers: the training target
        pa.field("answers", _TEXTS, nullable=False),  # all references, one for each annotator where there were several
        pa.field("weight", pa.float32(), nullable=False),  # of all its answers together in a loss (BLIP: 0.2 for VG's)
        pa.field("candidates", _TEXTS),  # what may be answered to this one; null: see `DataSet.candidates`
        pa.field("sample", pa.string(), nullable=False),  # its name in the data set
        pa.field("template", pa.int32(), nullable=False),  # number of the data set's template that was drawn
        pa.field("answer_type", pa.string()),  # such as yes/no, number, other
        pa.field("task", pa.string(), nullable=False),
        pa.field("data_set", pa.string(), nullable=False),
        pa.field("role", pa.string(), nullable=False),  # held_in | held_out
        pa.field("split", pa.string(), nullable=False),  # train | val | test
        pa.field("subset", pa.string()),  # of an evaluation split, as in the caption table
    ]
)


def own_images(folder: Path) -> Path:
    """Where the pictures of a table lie that are its own: `instructions_images` beside `instructions`."""
    return folder.with_name(f"{folder.name}_images")


class Answer(NamedTuple):
    """One distinct answer and the share of the annotators who gave it."""

    text: str
    weight: float


@dataclass(frozen=True)
class DataSet:
    """What the manifest says of a data set.

    Attributes:
        task, role: of all its rows.
        metric: name in `evaluation.question_answering.METRICS`.
        multiplier: of its probability in training (InstructBLIP 3.3).
        rows: by split.
        candidates: what may be answered to every question; None where anything may, or each row has its own.
        majority: the answer that most training rows have, of a held-out data set most evaluation rows: no training row
            is there to guess from, and so the baseline is the best that any one answer can do. None where each row has
            its own candidates.
        majority_rates: by split, the share of rows with that split's commonest answer, or, where each row has its own
            candidates, with the answer at the commonest place among them.
    """

    task: str
    role: str
    metric: str
    multiplier: float
    rows: dict[str, int]
    candidates: list[str] | None
    majority: str | None
    majority_rates: dict[str, float]


def write_instructions(
    folder: Path, tables: Iterable[pa.Table], images_hash: str, about: Mapping[str, Any] | None = None
) -> str:
    """Write one parquet shard per table and the manifest; returns the manifest's hash.

    Args:
        tables: `INSTRUCTION_SCHEMA` tables; table i holds the rows of images in tar shard i.
        images_hash: content hash of the images folder that the rows speak of.
        about: further plain values for the manifest; under `data_sets`, by name, the values of a `DataSet`.

    Raises:
        StorageError: a table has another schema or a null where none may be.
    """
    return write_table(folder, tables, INSTRUCTION_SCHEMA, {**(about or {}), "images": images_hash})


class Instructions(ImageRows):
    """A view of an instruction table: all its rows, or those that `select` chose, in the table's order."""

    SCHEMA, TEXT = INSTRUCTION_SCHEMA, "answer"

    @classmethod
    def open(cls, folder: Path, images: Path | None = None) -> "Instructions":
        """As `ImageRows.open`; a table whose data sets bring pictures reads those, whatever `images` names."""
        if images is not None and storage.read_json(folder / MANIFEST).get(OWN_IMAGES):
            images = own_images(folder)
        return super().open(folder, images)

    def select(
        self,
        *,
        split: str | None = None,
        role: str | None = None,
        data_set: str | Sequence[str] | None = None,
        task: str | Sequence[str] | None = None,
        subset: str | Sequence[str] | None = None,
        rows: np.ndarray | None = None,
    ) -> "Instructions":
        """The rows of this view that meet every condition given.

        Args:
            split, role, data_set, task, subset: the value, or one of the values, that a row has there.
            rows: boolean mask over this view, or row numbers of it, which are sorted and may repeat.
        """
        return self.where(rows, split=split, role=role, data_set=data_set, task=task, subset=subset)

    @cached_property
    def data_sets(self) -> dict[str, DataSet]:
        """Of the whole table, by name."""
        return {name: DataSet(**values) for name, values in self.manifest["data_sets"].items()}

    def instructions(self, rows: np.ndarray) -> list[str]:
        return self.values("instruction", rows)

    def targets(self, rows: np.ndarray, draws: np.ndarray | None = None) -> list[str]:
        """What each row is trained to answer.

        Args:
            draws: (len(rows),) in [0, 1): one of a row's answers by its weight; None for the likeliest.
        """
        if draws is None:
            return self.values("answer", rows)
        answers = self.values("answers", rows)
        return [texts[int(at * len(texts))] for texts, at in zip(answers, draws.tolist(), strict=True)]

    def references(self, rows: np.ndarray) -> list[list[str]]:
        """All answers of each row, as often as annotators gave them."""
        return self.values("answers", rows)

    def weighted_answers(self, rows: np.ndarray) -> list[list[Answer]]:
        """The distinct answers of each row in the order of their first appearance; weights add up to 1.

        What all of them together weigh in a loss is the row's column `weight`.
        """
        return [
            [Answer(text, texts.count(text) / len(texts)) for text in dict.fromkeys(texts)]
            for texts in self.references(rows)
        ]

    def candidates(self, rows: np.ndarray) -> list[list[str] | None]:
        """What may be answered to each row, its own or its data set's; None for anything."""
        common = {name: data_set.candidates for name, data_set in self.data_sets.items()}
        own = self.values("candidates", rows)
        names = self.values("data_set", rows)
        return [common[name] if texts is None else texts for texts, name in zip(own, names, strict=True)]

    def frames(self, count: int) -> tuple["Frames", np.ndarray]:
        """The frames of this view's videos, `count` of each in equal distances; an image stands for all of its own.

        Returns:
            what image readers take in the place of a table, and (rows, count) int64 rows of it.

        Raises:
            StorageError: the table was opened without its images.
        """
        if self._table.reader is None:
            raise StorageError(f"{self._table.folder}: opened without its images; give `images` to Instructions.open")
        place_names = [field.name for field in _PLACE]
        every = np.arange(len(self))
        single = zip(*(self.values(name, every) for name in place_names), strict=True)
        places: list[tuple[Any, ...]] = []
        rows = np.empty((len(self), count), np.int64)
        for row, (image, video) in enumerate(zip(single, self.values("frames", every), strict=True)):
            found = [tuple(frame[name] for name in place_names) for frame in video] if video else [image]
            rows[row] = len(places) + ((np.arange(count) + 0.5) * len(found) / count).astype(np.int64)
            places += found
        columns = zip(*places, strict=True) if places else [()] * len(_PLACE)
        arrays = {
            field.name: pa.array(values, pa.large_string() if pa.types.is_string(field.type) else field.type)
            for field, values in zip(_PLACE, columns, strict=True)
        }
        return Frames(self._table.of_columns(arrays), np.arange(len(places))), rows


class Frames(ImageRows):
    """Images alone, a row each; see `Instructions.frames`."""

    SCHEMA, TEXT = pa.schema(_PLACE), "key"
