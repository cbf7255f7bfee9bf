"""Small instruction tables over the pictures of `data_samples`."""

from pathlib import Path
from typing import Any

from data_samples import write_data_set

from blip_pipelines import config as strict
from blip_pipelines.data.instruct import InstructionsConfig, instruct
from blip_pipelines.data.instructions import Instructions
from blip_pipelines.data.pairs import Pairs

LETTERS = "abcd"


def write_labels(folder: Path, images_per_shard: list[int]) -> tuple[Path, Path, Path]:
    """(pairs, images, labels): of each picture a letter, of every other one a number too."""
    pairs, images = write_data_set(folder, images_per_shard)
    lines = ["image,letter,number"]
    for row, key in enumerate(Pairs.open(pairs).keys):
        lines.append(f"{key},{LETTERS[row % len(LETTERS)]},{row if row % 2 else ''}")
    labels = folder / "labels.csv"
    labels.write_text("\n".join(lines) + "\n")
    return pairs, images, labels


def letters(**changed: Any) -> dict[str, Any]:
    """A data set that asks for the letter."""
    base = {
        "task": "recognition",
        "role": "held_in",
        "metric": "exact_match",
        "table": "facts",
        "answer": "{letter}",
        "candidates": "answers",
        "templates": ["Which letter?", "Name the letter.", "Letter:"],
    }
    return {**base, **changed}


def write(folder: Path, data_sets: dict[str, Any], labels: Path | None, pairs: Path, images: Path, **more: Any) -> Path:
    """The folder of a table of these data sets."""
    block = {"data_sets": data_sets, "facts": str(labels) if labels else None, "workers": 1, **more}
    config = strict.read(InstructionsConfig, block, "instructions")
    out = folder / "instructions"
    instruct(config, pairs, images, None, out, folder / "instructions_images")
    return out


def open_letters(folder: Path, images_per_shard: list[int], **data_sets: Any) -> Instructions:
    pairs, images, labels = write_labels(folder, images_per_shard)
    return Instructions.open(write(folder, data_sets or {"letters": letters()}, labels, pairs, images), images)
