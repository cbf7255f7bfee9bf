"""A source → images, written once; captions, in a table; what was refused; whether the contracts hold.

The nodes run in the Kedro process and do nothing where the same inputs, parameters and code made what lies there.
"""

import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from blip_pipelines.pipelines.parameters import Stage, read_block
from blip_pipelines.pipelines.work import Work, WorkConfig, run_record

INGEST = "blip_pipelines.data.ingest"
CONTRACTS = ("blip_pipelines.data.contracts", "blip_pipelines.data.quality")


def read_parameters(block: dict[str, Any]) -> Stage:
    from blip_pipelines.data.ingestion_plan import IngestionConfig

    return read_block(IngestionConfig, WorkConfig, block, "ingestion")


def ingest(
    source: Path | str, places: dict[str, Path], parameters: dict[str, Any]
) -> tuple[Path, Path, Path, Path, dict[str, Any]]:
    """Ingest a source.

    Image shards are written in place, since those that are there already are kept. The tables are written beside their
    place and moved by the catalog.

    Args:
        source: the folder of packages, or of a person's data, or `s3://bucket/folder`.
        places: where the catalog keeps the outputs of this stage.

    Returns:
        Images, pairs, quarantine, noise and the run record.
    """
    from blip_pipelines.config import arithmetic
    from blip_pipelines.data.ingest import DataSet
    from blip_pipelines.data.ingest import ingest as write_data_set
    from blip_pipelines.data.sources import identity, open_source

    started, stage = time.monotonic(), read_parameters(parameters)
    hashes = {"source": identity(stage.config.source, source)}
    decides = {key: value for key, value in arithmetic(stage.config).items() if key != "contracts"}
    work = Work.of([INGEST, __name__], decides, hashes, stage.launch)
    made = DataSet(*(places[key] for key in ("images", "pairs", "quarantine", "noise")))
    receipt = work.find(vars(made))
    if receipt is None:
        beside = {key: path.with_name(f".{path.name}.new") for key, path in places.items()}
        made = DataSet(places["images"], beside["pairs"], beside["quarantine"], beside["noise"])
        facts = write_data_set(open_source(stage.config, source), stage.config, made)
        receipt = work.note(vars(made), facts, time.monotonic() - started)
    return made.images, made.pairs, made.quarantine, made.noise, run_record(receipt)


def check_contracts(
    pairs: Path, images: Path, places: dict[str, Path], record: dict[str, Any], parameters: dict[str, Any]
) -> tuple[dict[str, str], list[dict[str, Any]], Path, dict[str, Any]]:
    """Judge the data set and leave the Data Docs, also of one that fails.

    Args:
        record: of `ingest`, to which this adds its seconds.

    Returns:
        The hash of the pairs that passed, without which nothing trains on them; a row for each rule; the docs; the run
        record of the stage.

    Raises:
        ContractError: a rule of severity `error` is broken; names the rule, the count and the first rows.
    """
    from blip_pipelines.config import arithmetic
    from blip_pipelines.data.contracts import check
    from blip_pipelines.data.quality import summarise
    from blip_pipelines.data.storage import content_hash

    started, stage = time.monotonic(), read_parameters(parameters)
    hashes = {"pairs": content_hash(pairs), "images": content_hash(images)}
    work = Work.of([*CONTRACTS, __name__], arithmetic(stage.config.contracts), hashes, stage.launch)
    docs = {"data_docs": places["data_docs"]}
    receipt = work.find(docs)
    if receipt is None:
        results = check(pairs, summarise(pairs, images), stage.config.contracts, places["data_docs"])
        rules = [{**asdict(result), "first_rows": list(result.first_rows)} for result in results]
        receipt = work.note(docs, {"rules": rules}, time.monotonic() - started)
    record = {**record, "seconds": record["seconds"] + receipt.seconds}
    return {"pairs": hashes["pairs"]}, receipt.facts["rules"], places["data_docs"], record


def show_samples(pairs: Path, images: Path) -> Callable[[Path], None]:
    """A picture of some training rows, as what writes it."""
    from blip_pipelines.data.contact_sheet import contact_sheet
    from blip_pipelines.data.storage import write_atomic

    return partial(write_atomic, content=contact_sheet(pairs, images))
