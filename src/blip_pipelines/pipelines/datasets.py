"""What the catalog stores: finished folders and files, moved into place, and small tables.

A node hands over a receipt or a path, never the data: outputs may be larger than memory, and a finished folder is
renamed, not written again.
"""

import csv
import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kedro.io import AbstractDataset, DatasetError

from blip_pipelines.data import storage
from blip_pipelines.jobs.receipt import Receipt, published


class Folder(AbstractDataset[Any, Any]):
    """A folder that a job finished; loading gives its path.

    Saving moves what the receipt (or path) names to `filepath`, nothing where it is already there. A folder that
    another place owns, because a job with the same fingerprint ran for it, is copied.
    """

    def __init__(self, filepath: str, metadata: dict[str, Any] | None = None):
        self.path, self.metadata = Path(filepath), metadata or {}

    def load(self) -> Any:
        return self.path

    def save(self, data: Receipt | Path) -> None:
        found = data.folder if isinstance(data, Receipt) else data
        if found.resolve() != self.path.resolve():
            self._publish(self._staged(found, copy=isinstance(data, Receipt) and data.reused))
        if isinstance(data, Receipt):
            published(data, self.path)

    def _publish(self, staged: Path) -> None:
        storage.publish(staged, self.path)

    def _staged(self, found: Path, copy: bool) -> Path:
        """`found` itself where a rename will do, else a copy beside `filepath`."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not copy and found.stat().st_dev == self.path.parent.stat().st_dev:
            return found
        staged = self.path.with_name(f".{self.path.name}.new")
        shutil.rmtree(staged, ignore_errors=True)
        if found.is_dir():
            shutil.copytree(found, staged)
        else:
            shutil.copy2(found, staged)
        return staged

    def _exists(self) -> bool:
        return self.path.exists()

    def _describe(self) -> dict[str, Any]:
        return {"filepath": self.path.as_posix()}


class Source(AbstractDataset[Any, Path | str]):
    """Where a person's data lies: a folder, or `s3://bucket/folder`, which is no path; never saved."""

    def __init__(self, filepath: str, metadata: dict[str, Any] | None = None):
        self.filepath, self.metadata = filepath, metadata or {}
        self.path = None if filepath.startswith("s3://") else Path(filepath)

    def load(self) -> Path | str:
        return self.path or self.filepath

    def save(self, data: Any) -> None:
        raise DatasetError("a source is only read")

    def _describe(self) -> dict[str, Any]:
        return {"filepath": self.filepath}


class File(Folder):
    """The same for a single file."""

    def _publish(self, staged: Path) -> None:
        staged.replace(self.path)


class Page(Folder):
    """A file that the node's output writes, when called with the path."""

    def save(self, data: Callable[[Path], None]) -> None:  # type: ignore[override]
        data(self.path)


class Json(Folder):
    """Plain values as JSON with sorted keys: equal values are equal bytes."""

    def load(self) -> Any:
        return storage.read_json(self.path)

    def save(self, data: Any) -> None:
        storage.write_json(self.path, data)


class OptionalJson(Json):
    """The same where nothing may be: None then."""

    def load(self) -> Any:
        return storage.read_json(self.path) if self.path.exists() else None


class Table(Folder):
    """Rows {column: number} as CSV, which `dvc plots` reads; columns in the order of their first appearance."""

    def load(self) -> list[dict[str, float]]:
        with self.path.open(newline="", encoding="utf-8") as file:
            rows = csv.DictReader(file)
            return [{k: int(v) if k == "step" else float(v) for k, v in row.items() if v} for row in rows]

    def save(self, data: list[dict[str, float]]) -> None:  # type: ignore[override]
        text = io.StringIO()
        writer = csv.DictWriter(text, list(dict.fromkeys(key for row in data for key in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(data)
        storage.write_atomic(self.path, text.getvalue())


class Places(AbstractDataset[Any, dict[str, Path]]):
    """Where other entries of the catalog lie, for a node that goes on from what it made before; never saved.

    Args:
        entries: by name, {"path": where}.
    """

    def __init__(self, entries: dict[str, dict[str, str]], metadata: dict[str, Any] | None = None):
        self.entries, self.metadata = entries, metadata or {}

    def load(self) -> dict[str, Path]:
        return {name: Path(entry["path"]) for name, entry in self.entries.items()}

    def save(self, data: Any) -> None:
        raise DatasetError("places are only read")

    def _describe(self) -> dict[str, Any]:
        return self.entries
