"""What a finished job hands back, and the index by which finished work is found again.

Two kinds of facts are kept apart. `receipt.json` inside the outputs is deterministic bytes: what was made, from what,
with which results. Seconds, speeds, versions and dates are in the index entry, on which nothing depends.
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from blip_pipelines.data.storage import read_json, sha256, sha256_file, write_json
from blip_pipelines.jobs.claim import release

RECEIPT = "receipt.json"
OUTPUTS = "out"
INDEX = "index"
VERSIONS = ("torch", "transformers", "numpy", "pillow")


@dataclass(frozen=True)
class Receipt:
    """A finished job.

    Args:
        folder: its outputs; still in the work folder unless `reused`.
        facts: what the job's `run` returned; deterministic.
        seconds: of wall time, all attempts together.
        speed: the meter's last numbers (samples/s, data wait, memory, MFU).
        reused: nothing ran; the outputs were there.
    """

    job: str
    fingerprint: str
    code: str
    folder: Path
    facts: dict[str, Any]
    seconds: float = 0.0
    reused: bool = False
    speed: dict[str, float] = field(default_factory=dict)


def fingerprint(job: str, arithmetic: Any, inputs: Mapping[str, str]) -> str:
    """The name of a piece of work: the job, the parameters that change its results, and the hashes of its inputs."""
    identity = json.dumps([job, arithmetic, dict(inputs)], sort_keys=True, ensure_ascii=False)
    return sha256(identity.encode())


def write_receipt(outputs: Path, job: str, name: str, inputs: Mapping[str, str], facts: Mapping[str, Any]) -> None:
    """The last file of a job's outputs: with it they are complete."""
    write_json(
        outputs / RECEIPT,
        {"job": job, "fingerprint": name, "inputs": dict(inputs), "outputs": _hashes(outputs), "facts": dict(facts)},
    )


def find(root: Path, name: str, code: str) -> Receipt | None:
    """The published outputs with this fingerprint and code, if they are still there, unaltered."""
    entry_file = root / INDEX / f"{name}.json"
    if not entry_file.exists():
        return None
    entry = read_json(entry_file)
    folder = Path(os.path.normpath(root / entry["folder"]))
    if entry["code"] != code or not (folder / RECEIPT).exists():
        return None
    kept = read_json(folder / RECEIPT)
    if kept["fingerprint"] != name or kept["outputs"] != _hashes(folder):
        return None
    return Receipt(kept["job"], name, code, folder, kept["facts"], entry["seconds"], True, entry["speed"])


def published(receipt: Receipt, final: Path) -> None:
    """Note that the outputs now lie in `final`, so that the same job returns at once, and drop the partial work.

    Called by who moved `receipt.folder` to `final`; whoever waits for this work goes on.
    """
    if receipt.reused:
        return
    work = receipt.folder.parent
    root = work.parent
    entry = {
        "job": receipt.job,
        "folder": os.path.relpath(final, root),  # the project may be moved as a whole
        "fingerprint": receipt.fingerprint,
        "code": receipt.code,
        "seconds": receipt.seconds,
        "speed": receipt.speed,
        "versions": versions(),
    }
    write_json(root / INDEX / f"{receipt.fingerprint}.json", entry)
    shutil.rmtree(work, ignore_errors=True)
    release(root, receipt.fingerprint)


def versions() -> dict[str, str]:
    """Of the libraries that do the arithmetic."""
    return {name: metadata.version(name) for name in VERSIONS}


def _hashes(outputs: Path) -> dict[str, str]:
    """sha256 by path of every file but the receipt; hidden ones (of DVC, of the desktop) are not ours."""
    files = sorted(path for path in outputs.rglob("*") if path.is_file() and not path.name.startswith("."))
    named = {path.relative_to(outputs).as_posix(): path for path in files}
    named.pop(RECEIPT, None)
    return {name: sha256_file(path) for name, path in named.items()}
