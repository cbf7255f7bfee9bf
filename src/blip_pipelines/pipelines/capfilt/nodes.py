"""CapFilt: the captioner writes, the filter judges, the corpus is composed anew (BLIP 3.3).

Training, writing and judging are jobs. Composing is work of the Kedro process with parameters of its own, so that
another rule composes from the same scores.
"""

import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from blip_pipelines.jobs.receipt import Receipt
from blip_pipelines.pipelines.launching import Launched, launched
from blip_pipelines.pipelines.parameters import Stage, read_block
from blip_pipelines.pipelines.work import Work, WorkConfig, run_record

FINETUNE = "blip_pipelines.jobs.med_pretraining"
WRITE = "blip_pipelines.jobs.capfilt_write"
JUDGE = "blip_pipelines.jobs.capfilt_judge"
COMPOSE = "blip_pipelines.data.composition"
CONTRACTS = ("blip_pipelines.data.contracts", "blip_pipelines.data.quality", "blip_pipelines.data.shift")


class NoTrustedCaptionsError(RuntimeError):
    """A corpus without the captions that captioner and filter learn from."""


def read_parameters(block: dict[str, Any]) -> Stage:
    from blip_pipelines.jobs.launch import LaunchConfig
    from blip_pipelines.pipelines.capfilt.parameters import CapfiltConfig

    return read_block(CapfiltConfig, LaunchConfig, block, "capfilt")


def finetune_captioner(model: Path, pairs: Path, images: Path, parameters: dict[str, Any]) -> Launched:
    """Train on human pairs by LM alone, from a pretrained model.

    Returns:
        The receipt of the captioner's exports; the curves; the run record.
    """
    stage = read_parameters(parameters)
    block = stage.values["captioner"] if stage.config.decoupled else _shared(stage.values)
    return _finetune("captioner", block, stage, {"start": model, "pairs": pairs, "images": images})


def finetune_filter(model: Path, pairs: Path, images: Path, parameters: dict[str, Any]) -> Launched:
    """Train on human pairs by ITC and ITM, from a pretrained model; or take the captioner, if the two share parameters.

    Returns:
        The receipt of the filter's exports; the curves; the run record.
    """
    stage = read_parameters(parameters)
    block = stage.values["filter"] if stage.config.decoupled else _shared(stage.values)
    return _finetune("filter", block, stage, {"start": model, "pairs": pairs, "images": images})


def _finetune(name: str, block: dict[str, Any], stage: Stage, inputs: Mapping[str, Path]) -> Launched:
    from blip_pipelines.config import read
    from blip_pipelines.data.storage import MANIFEST, read_json
    from blip_pipelines.jobs.med_pretraining import Config
    from blip_pipelines.models.exports import NOTE
    from blip_pipelines.pipelines.capfilt.parameters import job_values

    values = job_values(block, read_json(inputs["start"] / NOTE))
    counts = read_json(inputs["pairs"] / MANIFEST).get("origins")
    if counts is not None and not any(counts.get(origin) for origin in values["origins"]):
        raise NoTrustedCaptionsError(
            f"{inputs['pairs']}: no caption of origin {' or '.join(values['origins'])}, from which the {name} learns; "
            f"say which captions you trust (column origin, docs/your-data.md), or set capfilt.{name}.origins"
        )
    return launched(FINETUNE, Stage(read(Config, values, f"capfilt.{name}"), values, stage.launch), inputs, f"{name}.")


def _shared(values: Mapping[str, Any]) -> dict[str, Any]:
    """The captioner's block with the losses of both."""
    both = [values[name]["objective"].get("weights", {}) for name in ("captioner", "filter")]
    weights = {loss: max(weight.get(loss, 1.0) for weight in both) for loss in ("itc", "itm", "lm")}
    return {**values["captioner"], "objective": {**values["captioner"]["objective"], "weights": weights}}


def write_captions(
    captioner: Path, pairs: Path, images: Path, parameters: dict[str, Any], *, number: int
) -> tuple[Receipt, dict[str, Any]]:
    """Synthetic captions for the web images of the training split.

    Args:
        number: of the round.

    Returns:
        The receipt of a caption table of synthetic rows; the run record.
    """
    inputs = {"captioner": captioner, "pairs": pairs, "images": images}
    done = _launched(WRITE, "write", parameters, inputs, round=number)
    return done.receipt, done.record


def judge_captions(
    judge: Path, pairs: Path, images: Path, synthetic: Path, parameters: dict[str, Any]
) -> tuple[Receipt, dict[str, Any]]:
    """The match probability of every web and every synthetic caption.

    Returns:
        The receipt of a caption table of judged rows; the run record.
    """
    inputs = {"filter": judge, "pairs": pairs, "images": images, "synthetic": synthetic}
    done = _launched(JUDGE, "judge", parameters, inputs)
    return done.receipt, done.record


def _launched(job: str, name: str, parameters: dict[str, Any], inputs: Mapping[str, Path], **more: Any) -> Launched:
    stage = read_parameters(parameters)
    values = {**stage.values.get(name, {}), **more}
    return launched(job, Stage(getattr(stage.config, name), values, stage.launch), inputs)


def compose(
    pairs: Path, judged: Path, places: dict[str, Path], parameters: dict[str, Any], *, number: int
) -> tuple[Path, Path, dict[str, Any]]:
    """The next corpus by the rule, and what became of every judged caption.

    Args:
        places: where the catalog keeps `pairs` and `decided`.
        number: of the round.

    Returns:
        The corpus, the decided captions, the run record.
    """
    from blip_pipelines.config import arithmetic
    from blip_pipelines.data.composition import compose as write_corpus
    from blip_pipelines.data.storage import content_hash

    started, stage = time.monotonic(), read_parameters(parameters)
    decides = {"rule": arithmetic(stage.config.rule), "round": number}
    hashes = {"pairs": content_hash(pairs), "judged": content_hash(judged)}
    work = Work.of([COMPOSE, __name__], decides, hashes, _work_config(stage))
    made = {name: places[name] for name in ("pairs", "decided")}
    receipt = work.find(made)
    if receipt is None:
        made = {name: path.with_name(f".{path.name}.new") for name, path in made.items()}
        for path in made.values():
            shutil.rmtree(path, ignore_errors=True)
        facts = write_corpus(pairs, judged, stage.config.rule, number, made["pairs"], made["decided"])
        facts["rule"] = decides["rule"]
        receipt = work.note(made, facts, time.monotonic() - started)
    return made["pairs"], made["decided"], run_record(receipt)


def check_contracts(
    before: Path,
    pairs: Path,
    decided: Path,
    images: Path,
    places: dict[str, Path],
    parameters: dict[str, Any],
) -> tuple[dict[str, str], list[dict[str, Any]], Path, dict[str, float]]:
    """Judge the corpus, and leave the Data Docs also of one that fails.

    Args:
        before: the corpus of the last round.

    Returns:
        The hash of the pairs that passed, without which nothing trains on them; a row for each rule; the docs; what
        the round did to the text (`shift.summarise_round`).

    Raises:
        ContractError: a rule of severity `error` is broken; names the rule, the count and the first rows.
    """
    from blip_pipelines.config import arithmetic
    from blip_pipelines.data.contracts import check
    from blip_pipelines.data.quality import summarise
    from blip_pipelines.data.shift import summarise_round
    from blip_pipelines.data.storage import content_hash

    started, stage = time.monotonic(), read_parameters(parameters)
    inputs = {"before": before, "pairs": pairs, "decided": decided, "images": images}
    hashes = {name: content_hash(path) for name, path in inputs.items()}
    decides = {"contracts": arithmetic(stage.config.contracts), "rule": arithmetic(stage.config.rule)}
    work = Work.of([*CONTRACTS, __name__], decides, hashes, _work_config(stage))
    docs = {"data_docs": places["data_docs"]}
    receipt = work.find(docs)
    if receipt is None:
        of_round = summarise_round(before, decided, pairs, stage.config.rule)
        tables = {**summarise(pairs, images), "round": of_round}
        results = check(pairs, tables, stage.config.contracts, places["data_docs"])
        rules = [{**asdict(result), "first_rows": list(result.first_rows)} for result in results]
        shift = {name: value for name, value in of_round.to_pylist()[0].items() if value is not None}
        receipt = work.note(docs, {"rules": rules, "shift": shift}, time.monotonic() - started)
    facts = receipt.facts
    return {"pairs": hashes["pairs"]}, facts["rules"], places["data_docs"], facts["shift"]


def measure(
    decided: Path,
    noise: Path,
    shift: dict[str, float],
    captioner: dict[str, Any],
    judge: dict[str, Any],
    written: dict[str, Any],
    judged: dict[str, Any],
    composed: dict[str, Any],
    *,
    stage: str,
) -> tuple[dict[str, float], dict[str, Any]]:
    """How right captioner and filter were, where the noise is known, and what the round did to the corpus.

    Args:
        noise: the evaluator's side file; this node alone reads it.
        captioner, judge, written, judged, composed: run records of the other nodes.

    Returns:
        Flat measures `<stage>/<metric>`; the run record of the stage.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    from blip_pipelines.data.storage import MANIFEST, read_json
    from blip_pipelines.evaluation.filtering import COLUMNS, measure_capfilt

    started, known = time.monotonic(), pq.read_table(noise)
    metrics = dict(shift)
    if len(known):
        names = [entry["name"] for entry in read_json(decided / MANIFEST)["shards"]]
        rows = pa.concat_tables([pq.read_table(decided / name, columns=list(COLUMNS)) for name in names])
        metrics |= measure_capfilt(rows, known)
    records = {"captioner": captioner, "filter": judge, "write": written, "judge": judged, "compose": composed}
    return {f"{stage}/{name}": value for name, value in metrics.items()}, _of_stage(records, time.monotonic() - started)


def _of_stage(records: Mapping[str, dict[str, Any]], seconds: float) -> dict[str, Any]:
    """One record of all: seconds summed, speeds of writing and judging by name."""
    speeds = {f"{name}_per_second": record.get("samples_per_second") for name, record in records.items()}
    return {
        "seconds": seconds + sum(record["seconds"] for record in records.values()),
        "reused": all(record["reused"] for record in records.values()),
        "peak_memory_bytes": max(_numbers(record.get("peak_memory_bytes") for record in records.values()), default=0),
        "facts": {name: record["facts"] for name, record in records.items()},
        "parts": dict(records),
        **{name: speed for name, speed in speeds.items() if speed},
    }


def _numbers(values: Iterable[Any]) -> list[float]:
    return [value for value in values if value is not None]


def _work_config(stage: Stage) -> WorkConfig:
    return WorkConfig(stage.launch.force, stage.launch.work)
