"""Rows that name an image, brought together by image on the disk, for annotation files may be of any length."""

import pickle
import sqlite3
from collections.abc import Iterator

from blip_pipelines.data.records import Caption
from blip_pipelines.data.sources import Quarantined

_TABLES = """
PRAGMA journal_mode = OFF;
PRAGMA synchronous = OFF;
CREATE TABLE groups (number INTEGER PRIMARY KEY, member BLOB, split TEXT, UNIQUE (member, split));
CREATE TABLE captions (number INTEGER, content BLOB);
CREATE TABLE refused (content BLOB);
"""


class GroupedRows:
    """Captions by (member, split), each pair at the place where it first came; and what was refused."""

    def __init__(self) -> None:
        self._database = sqlite3.connect("", isolation_level=None)  # a temporary file that has no name
        self._database.executescript(_TABLES)
        self._database.execute("BEGIN")  # never to end: nobody else reads it
        self._last: tuple[tuple[str, str | None], int] | None = None

    def add(self, member: str, split: str | None, caption: Caption) -> None:
        group = member, split
        if self._last is None or self._last[0] != group:
            key = member.encode("utf-8", "surrogatepass"), split or ""
            self._database.execute("INSERT OR IGNORE INTO groups (member, split) VALUES (?, ?)", key)
            found = self._database.execute("SELECT number FROM groups WHERE member = ? AND split = ?", key)
            self._last = group, int(found.fetchone()[0])
        self._database.execute("INSERT INTO captions VALUES (?, ?)", (self._last[1], pickle.dumps(caption)))

    def refuse(self, row: Quarantined) -> None:
        self._database.execute("INSERT INTO refused VALUES (?)", (pickle.dumps(tuple(row)),))

    def groups(self) -> Iterator[tuple[str, str | None, tuple[Caption, ...]]]:
        """Member, split and captions."""
        rows = self._database.execute(
            "SELECT number, member, split, content FROM groups JOIN captions USING (number) "
            "ORDER BY number, captions.rowid"
        )
        last, captions = None, list[Caption]()
        for number, member, split, content in rows:
            if last is not None and last[0] != number:
                yield last[1], last[2], tuple(captions)
                captions = []
            last = number, member.decode("utf-8", "surrogatepass"), split or None
            captions.append(pickle.loads(content))  # noqa: S301  our own bytes
        if last is not None:
            yield last[1], last[2], tuple(captions)

    def refused(self) -> Iterator[Quarantined]:
        for (content,) in self._database.execute("SELECT content FROM refused ORDER BY rowid"):
            yield Quarantined(*pickle.loads(content))  # noqa: S301

    def members(self) -> Iterator[str]:
        """Each image once."""
        rows = self._database.execute("SELECT member FROM groups GROUP BY member ORDER BY min(number)")
        return (member.decode("utf-8", "surrogatepass") for (member,) in rows)
