"""The plan of an ingestion on the disk: what is known of each image, so that memory does not follow their number."""

import io
import pickle
import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from blip_pipelines.data.records import Record
from blip_pipelines.data.shard_jobs import Wanted
from blip_pipelines.data.sources import Quarantined
from blip_pipelines.data.storage import StorageError

SPLIT_RANK = {"train": 0, "val": 1, "test": 2}
_TABLES = """
PRAGMA journal_mode = OFF;
PRAGMA synchronous = OFF;
CREATE TABLE images (member BLOB PRIMARY KEY, checksum TEXT) WITHOUT ROWID;
CREATE TABLE records (number INTEGER PRIMARY KEY, checksum TEXT, at REAL, content BLOB);
CREATE TABLE units (number INTEGER PRIMARY KEY, checksum TEXT);
CREATE TABLE lost (content BLOB);
"""


@dataclass(frozen=True, slots=True)
class Unit:
    """One distinct file of the source: the records of all its copies."""

    records: tuple[Record, ...]
    checksum: str = ""

    @property
    def member(self) -> str:
        return self.records[0].member

    @property
    def rows(self) -> int:
        return sum(len(record.captions) for record in self.records)

    @property
    def cell(self) -> tuple[str, str | None]:
        """Declared (split, subset) of the strongest copy, from which `limit` draws."""
        strongest = max(self.records, key=lambda record: SPLIT_RANK.get(record.split or "", -1))
        split = strongest.split or ""
        return split, None if split in ("", "train") else strongest.subset or "all"


class PlanStore:
    """Records as they come, then by content in an order; a file that is there while it is entered.

    Args:
        path: of the file, which other processes read too.
        place: an object that the records share, of which they keep no copy each.

    Raises (at its end):
        StorageError: the disk is full.
    """

    def __init__(self, path: Path, place: Any = None):
        self.path, self.place = path, place

    def __enter__(self) -> "PlanStore":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.unlink(missing_ok=True)  # of a run that was killed
        self._database = sqlite3.connect(self.path, isolation_level=None)
        self._database.executescript(_TABLES)
        self._database.execute("BEGIN")
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._database.close()
        self.path.unlink(missing_ok=True)
        if isinstance(error, sqlite3.OperationalError):
            raise StorageError(f"{self.path}: cannot write ({error}); free some space") from error

    def know(self, checksums: Iterable[tuple[str, str]]) -> None:
        """Keep (member, checksum) of images."""
        self._database.executemany(
            "INSERT OR REPLACE INTO images VALUES (?, ?)",
            ((_bytes(member), checksum) for member, checksum in checksums),
        )

    def add(self, record: Record, at: float) -> None:
        """Keep a record; `at` is where its image comes if this is the first record of its content."""
        found = self._database.execute("SELECT checksum FROM images WHERE member = ?", (_bytes(record.member),))
        self._database.execute(
            "INSERT INTO records (checksum, at, content) VALUES (?, ?, ?)",
            (found.fetchone()[0], at, _pack(record, self.place)),
        )

    def lose(self, row: Quarantined) -> None:
        self._database.execute("INSERT INTO lost VALUES (?)", (pickle.dumps(tuple(row)),))

    @property
    def lost(self) -> Iterator[Quarantined]:
        """The rows that the source refused."""
        for (content,) in self._database.execute("SELECT content FROM lost ORDER BY rowid"):
            yield Quarantined(*pickle.loads(content))  # noqa: S301  our own bytes, as are those below

    def settle(self) -> None:
        """No record comes any more: put the distinct files in order."""
        self._run(
            "INSERT INTO units (checksum) SELECT checksum FROM "
            "(SELECT checksum, at, min(number) AS first FROM records GROUP BY checksum) ORDER BY at, first",
            "CREATE INDEX of_checksum ON records (checksum)",
            "COMMIT",  # now others may read
        )

    def keep(self, numbers: Iterable[int]) -> None:
        """Leave out all distinct files but some, by their number in the order."""
        self._run("BEGIN", "CREATE TABLE kept (number INTEGER PRIMARY KEY)")
        self._database.executemany("INSERT INTO kept VALUES (?)", ((number + 1,) for number in numbers))
        self._run(
            "ALTER TABLE units RENAME TO every",
            "CREATE TABLE units (number INTEGER PRIMARY KEY, checksum TEXT)",
            "INSERT INTO units (checksum) SELECT checksum FROM every JOIN kept USING (number) ORDER BY number",
            "COMMIT",
        )

    def _run(self, *statements: str) -> None:
        for statement in statements:
            self._database.execute(statement)

    def __len__(self) -> int:
        """Distinct files."""
        return int(self._database.execute("SELECT count(*) FROM units").fetchone()[0])

    def units(self, start: int, stop: int) -> Iterator[Unit]:
        """Distinct files start to stop of the order."""
        return _units(self._database, self.place, start, stop)

    def images(self, start: int, stop: int) -> "PlannedImages":
        return PlannedImages(self.path, self.place, start, stop)


@dataclass(frozen=True, slots=True)
class PlannedImages:
    """A run of the distinct files, as a job wants them; pickles, and reads the plan when it is asked."""

    path: Path
    place: Any
    start: int
    stop: int

    def __iter__(self) -> Iterator[Wanted]:
        database = sqlite3.connect(f"{self.path.absolute().as_uri()}?mode=ro", uri=True)
        try:
            for unit in _units(database, self.place, self.start, self.stop):
                yield Wanted(unit.records[0].read, unit.checksum)
        finally:
            database.close()

    def __len__(self) -> int:
        return self.stop - self.start


def _units(database: sqlite3.Connection, place: Any, start: int, stop: int) -> Iterator[Unit]:
    rows = database.execute(
        "SELECT units.number, checksum, content FROM units JOIN records USING (checksum) "
        "WHERE units.number > ? AND units.number <= ? ORDER BY units.number, records.number",
        (start, stop),
    )
    for (_, checksum), same in groupby(rows, key=lambda row: row[:2]):
        yield Unit(tuple(_unpack(content, place) for *_, content in same), checksum)


def _pack(record: Record, place: Any) -> bytes:
    packed = io.BytesIO()
    pickler = pickle.Pickler(packed, pickle.HIGHEST_PROTOCOL)
    pickler.persistent_id = lambda value: "place" if value is place and place is not None else None  # type: ignore[method-assign]
    pickler.dump(record)
    return packed.getvalue()


def _unpack(content: bytes, place: Any) -> Record:
    unpickler = pickle.Unpickler(io.BytesIO(content))  # noqa: S301
    unpickler.persistent_load = lambda _: place  # type: ignore[method-assign]
    return unpickler.load()


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")  # a name of a file may be no text
