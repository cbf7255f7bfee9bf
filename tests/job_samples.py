"""A job that is cut, and what a job left, for tests that cutting it changes no bit of what it leaves."""

from types import ModuleType
from typing import Any

import pytest

from blip_pipelines.data.loader import DataError
from blip_pipelines.jobs.receipt import Receipt


def cut_after(monkeypatch: pytest.MonkeyPatch, module: ModuleType, loader: str, steps: int) -> None:
    """The loader of that name in the module fails once it gave the batches of so many steps, all runs together."""
    kind, seen = getattr(module, loader), []

    class Cut(kind):
        def __iter__(self):
            for batches in super().__iter__():
                if len(seen) == steps:
                    raise DataError("the cable was pulled")
                seen.append(0)
                yield batches

    monkeypatch.setattr(module, loader, Cut)


def outputs(receipt: Receipt) -> dict[str, bytes]:
    """Every file by its path in the folder."""
    files = [path for path in receipt.folder.rglob("*") if path.is_file()]
    return {path.relative_to(receipt.folder).as_posix(): path.read_bytes() for path in files}


def half(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a training job, in bfloat16."""
    return {**settings, "training": {**settings["training"], "precision": "bfloat16"}}
