"""Instructions and answers about pictures, put into words by templates.

A stage of its own: changing a template neither ingests again nor asks for more than the tuning that reads the table.
"""

import time
from pathlib import Path
from typing import Any

from blip_pipelines.pipelines.parameters import Stage, read_block
from blip_pipelines.pipelines.work import Work, WorkConfig, run_record

INSTRUCT = "blip_pipelines.data.instruct"


def read_parameters(block: dict[str, Any]) -> Stage:
    from blip_pipelines.data.instruct import InstructionsConfig

    return read_block(InstructionsConfig, WorkConfig, block, "instructions")


def write_table(
    pairs: Path, images: Path, packages: Path, places: dict[str, Path], parameters: dict[str, Any]
) -> tuple[Path, Path, dict[str, Any], dict[str, Any]]:
    """Write the instruction table.

    Args:
        pairs, images: of ingestion.
        packages: wheels of the embedded default, whose metadata are asked about.
        places: where the catalog keeps the table and pictures that data sets bring.

    Returns:
        The table, those pictures, the counts by data set, and the run record.
    """
    from blip_pipelines.config import arithmetic
    from blip_pipelines.data.instruct import EMOJI, files_hash, instruct
    from blip_pipelines.data.storage import content_hash

    started, stage = time.monotonic(), read_parameters(parameters)
    inputs = {"pairs": content_hash(pairs), "images": content_hash(images), "files": files_hash(stage.config)}
    if stage.config.facts == EMOJI:
        inputs["packages"] = content_hash(packages)
    work = Work.of([INSTRUCT, __name__], arithmetic(stage.config), inputs, stage.launch)
    made = {"instructions": places["instructions"], "own_images": places["own_images"]}
    receipt = work.find(made)
    if receipt is None:
        made["instructions"] = places["instructions"].with_name(f".{places['instructions'].name}.new")
        facts = instruct(stage.config, pairs, images, packages, made["instructions"], made["own_images"])
        receipt = work.note(made, facts, time.monotonic() - started)
    return made["instructions"], made["own_images"], receipt.facts["data_sets"], run_record(receipt)
