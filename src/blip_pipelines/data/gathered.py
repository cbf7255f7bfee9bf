"""The rows of the tables, from the images that were stored: captions checked, copies brought together, refusals kept.

Rows are counted in captions: rows in = rows kept + rows quarantined.
"""

import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from blip_pipelines.data import splits, storage
from blip_pipelines.data.ingestion_plan import IngestionConfig
from blip_pipelines.data.plan_store import SPLIT_RANK, PlanStore, Unit
from blip_pipelines.data.records import PAIR_SCHEMA, QUARANTINE_SCHEMA, Caption, Record, Refused
from blip_pipelines.data.shard_jobs import ShardJob
from blip_pipelines.data.sources import TRUTH_SCHEMA, Quarantined
from blip_pipelines.data.storage import StorageError

_QUARANTINED_AT_ONCE = 10_000
_USED = (
    *("key", "shard", "offset", "size", "width", "height"),
    *("reason", "error", "archive_member", "split", "captions"),
)  # columns of an index
NOISE_SCHEMA = pa.schema([pa.field("key", pa.string(), nullable=False), *TRUTH_SCHEMA])


class IngestionError(RuntimeError):
    """Ingestion that cannot give a data set; the message says what was found and what to do."""


class Quarantine:
    """The table of refused rows, written as they come; `rows` and `reasons` count them."""

    def __init__(self, path: Path, source: str):
        self.path, self.source, self.rows, self.reasons = path, source, 0, Counter[str]()
        self._waiting: list[dict[str, Any]] = []

    def __enter__(self) -> "Quarantine":
        self._stack = ExitStack().__enter__()
        temporary = self._stack.enter_context(storage.writing(self.path))
        self._writer = self._stack.enter_context(
            pq.ParquetWriter(temporary, QUARANTINE_SCHEMA, compression="zstd", compression_level=3)
        )
        return self

    def __exit__(self, *failure: Any) -> None:
        if failure[0] is None:
            self._flush()
        self._stack.__exit__(*failure)

    def add(self, row: Quarantined) -> None:
        self.rows += 1
        self.reasons[row.reason] += 1
        self._waiting.append({"source": self.source, **row._asdict()})
        if len(self._waiting) >= _QUARANTINED_AT_ONCE:
            self._flush()

    def _flush(self) -> None:
        self._writer.write_table(pa.Table.from_pylist(self._waiting, QUARANTINE_SCHEMA))
        self._waiting = []


class Gathered:
    """Captions of the images that were stored, shard by shard; an image's rows go to the table of its first copy.

    What holds of the whole set (copies in other shards, splits of copies) is looked up for images that occur more than
    once alone, so that memory follows one shard and the copies.
    """

    def __init__(
        self,
        jobs: Sequence[ShardJob],
        plan: PlanStore | None,
        config: IngestionConfig,
        source: str,
        quarantine: Quarantine,
        truth: pa.Table | None,
    ):
        self.jobs, self.plan, self.config, self.source, self.quarantine = jobs, plan, config, source, quarantine
        self.rows, self.counts, self.noise = 0, dict[str, Any](), list[dict[str, Any]]()
        self._truth = {row["member"]: row for row in truth.to_pylist()} if truth is not None else {}
        self._rows_in = quarantine.rows
        self._find_copies()

    def tables(self) -> Iterator[pa.Table]:
        """A `PAIR_SCHEMA` table for each job; afterwards `counts`, `rows` and `noise` are whole.

        Raises:
            IngestionError: nothing was kept, or rows went missing.
        """
        images, origins, of_split = 0, Counter[str](), Counter[str]()
        for number in range(len(self.jobs)):
            rows: list[dict[str, Any]] = []
            texts: set[tuple[str, str]] = set()
            for unit, image in self._images(number):
                self._rows_in += max(unit.rows, 1)
                if image["key"] is None or self._first.get(image["key"], (number,))[0] == number:
                    self._add_rows(unit, image, rows, texts)
            for unit, image in self._later.get(number, ()):
                self._add_rows(unit, image, rows, texts)
            self.rows += len(rows)
            images += len({row["key"] for row in rows})
            origins.update(row["origin"] for row in rows)
            of_split.update("/".join(filter(None, (row["split"], row["subset"]))) for row in rows)
            yield pa.Table.from_pylist(rows, PAIR_SCHEMA)
        self._check()
        self.counts["distinct_images"] = images
        self.counts["origins"], self.counts["splits"] = dict(sorted(origins.items())), dict(sorted(of_split.items()))
        self.counts["quarantined"] = dict(sorted(self.quarantine.reasons.items()))

    def _check(self) -> None:
        if self.rows + self.quarantine.rows != self._rows_in:
            raise IngestionError(
                f"{self._rows_in} rows came in, {self.rows} were kept and {self.quarantine.rows} quarantined; rows "
                "went missing, which is a fault of ingestion and not of the data: report it"
            )
        if self.rows == 0:
            reasons = sorted(self.quarantine.reasons.items())
            said = ", ".join(f"{reason} {count}" for reason, count in reasons) or "it has no rows"
            raise IngestionError(f"nothing of the source '{self.source}' can be used: {said}")

    def _images(self, number: int) -> Iterator[tuple[Unit, dict[str, Any]]]:
        """Each image that was wanted in a shard, with its row of the index."""
        job = self.jobs[number]
        index = pq.read_table(job.index_path, columns=list(_USED)).to_pylist()
        if self.plan is not None:
            start = number * self.config.shard_images
            yield from zip(self.plan.units(start, start + len(index)), index, strict=True)
            return
        for row in index:
            captions = tuple(Caption(**caption) for caption in row["captions"] or ())
            record = Record(row["archive_member"], _unread, captions, self.source, row["split"])
            yield Unit((record,)), row

    def _find_copies(self) -> None:
        """`_first`: (shard, place and names, strongest declared split) by key, of images that occur more than once.
        `_later`: by shard, their copies from other shards."""
        starts = [_starts_of_keys(job) for job in self.jobs]
        values, counts = np.unique(np.concatenate([np.empty(0, np.uint64), *starts]), return_counts=True)
        repeated = set(values[counts > 1].tolist())
        self._first: dict[str, tuple[int, Unit, dict[str, Any], str | None]] = {}
        self._later: dict[int, list[tuple[Unit, dict[str, Any]]]] = {}
        for number, of_shard in enumerate(starts):
            if repeated.isdisjoint(of_shard.tolist()):
                continue
            for unit, image in self._images(number):
                if (key := image["key"]) is None or _start_of(key) not in repeated:
                    continue
                first, first_unit, first_image, declared = self._first.get(key, (number, unit, image, None))
                declared = _strongest([declared, *(record.split for record in unit.records)])
                self._first[key] = first, first_unit, first_image, declared
                if first != number:
                    self._later.setdefault(first, []).append((unit, image))

    def _add_rows(
        self, unit: Unit, image: dict[str, Any], rows: list[dict[str, Any]], texts: set[tuple[str, str]]
    ) -> None:
        key = image["key"]
        if key is None:
            row = Quarantined(unit.member, image["reason"], image["error"])
            for record in unit.records:
                for _ in record.captions or (None,):
                    self.quarantine.add(row._replace(member=record.member))
            return
        _, first, stored, declared = self._first.get(key) or (
            0, unit, image, _strongest([record.split for record in unit.records])
        )  # fmt: skip
        belongs = declared or splits.by_image(key, self.config.splits, self.config.seed)
        place = {name: stored[name] for name in ("key", "shard", "offset", "size", "width", "height")}
        named = first.records[0]
        place |= {"member": first.member, "related_key": named.related_key, "source": named.source}
        for record in unit.records:
            split = record.split or belongs
            subset = None if split == "train" else record.subset or "all"
            for caption in record.captions:
                try:
                    text = _check_text(caption.text, self.config.max_caption_characters)
                    if split != belongs:
                        raise Refused("in_evaluation", f"the same image is in {belongs}, as {first.member}")
                    if (key, text.lower()) in texts:
                        raise Refused("duplicate_caption", f"the image has this caption already, as {first.member}")
                except Refused as error:
                    self.quarantine.add(Quarantined(record.member, error.reason, str(error)))
                    continue
                texts.add((key, text.lower()))
                said = {name: getattr(caption, name) for name in ("origin", "language", "category")}
                rows.append({**place, **said, "caption": text, "split": split, "subset": subset})
                if (known := self._truth.get(record.member)) is not None:
                    self.noise.append({**known, "key": key, "member": first.member, "caption": text})


def _strongest(declared: Iterable[str | None]) -> str | None:
    return max((split for split in declared if split is not None), key=SPLIT_RANK.__getitem__, default=None)


def _starts_of_keys(job: ShardJob) -> np.ndarray:
    """(images,) uint64: the first 16 digits of each key of a shard."""
    keys = pq.read_table(job.index_path, columns=["key"])["key"].to_pylist()
    return np.fromiter((_start_of(key) for key in keys if key is not None), np.uint64)


def _start_of(key: str) -> int:
    return int(key[:16], 16)


def _unread() -> bytes:
    raise StorageError("an archived image is read by the job of its archive alone")


def _check_text(text: str, max_characters: int) -> str:
    """The caption with single spaces.

    Raises:
        Refused: empty_caption, long_caption, invalid_utf8 or control_character.
    """
    if len(text) > max_characters:
        raise Refused("long_caption", f"{len(text)} characters, over the limit of {max_characters}: {text[:60]!r}...")
    text = " ".join(text.split())
    if not text:
        raise Refused("empty_caption", "the caption has no characters")
    for character in text:
        if (category := unicodedata.category(character)) == "Cs":
            raise Refused("invalid_utf8", f"{character!r} is half a character")
        if category == "Cc":
            raise Refused("control_character", f"holds {character!r}")
    return text
