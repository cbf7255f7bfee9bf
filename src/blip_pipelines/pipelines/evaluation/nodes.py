"""Evaluation on the test halves, each read once: retrieval both ways, captions; later models beside the first."""

import time
from pathlib import Path
from typing import Any

from blip_pipelines.jobs.receipt import Receipt
from blip_pipelines.pipelines.launching import launched
from blip_pipelines.pipelines.parameters import Stage, read_block

MED_JOB = "blip_pipelines.jobs.evaluate_med"
STAGE1_JOB = "blip_pipelines.jobs.evaluate_blip2_stage1"
STAGE2_JOB = "blip_pipelines.jobs.evaluate_blip2_stage2"

Measured = tuple[Receipt, dict[str, float], dict[str, Any]]


def read_parameters(block: dict[str, Any]) -> Stage:
    from blip_pipelines.jobs.evaluate_med import Config
    from blip_pipelines.jobs.launch import LaunchConfig

    return read_block(Config, LaunchConfig, block, "evaluation")


def evaluate_med(
    model: Path, pairs: Path, images: Path, parameters: dict[str, Any], *, stage: str = "med_pretraining"
) -> Measured:
    """Predictions and measures of an exported MED.

    Args:
        stage: that trained the model.

    Returns:
        The receipt of the predictions, one row a sample; flat measures `<stage>/<metric>/<subset>`; the run record.
    """
    return _measured(MED_JOB, stage, model, pairs, images, parameters)


def evaluate_blip2_stage1(model: Path, pairs: Path, images: Path, parameters: dict[str, Any]) -> Measured:
    """The same of a Q-Former, and where its queries look."""
    return _measured(STAGE1_JOB, "blip2_stage1", model, pairs, images, parameters)


def evaluate_blip2_stage2(model: Path, pairs: Path, images: Path, parameters: dict[str, Any]) -> Measured:
    """The captions of a language model that a Q-Former speaks to."""
    return _measured(STAGE2_JOB, "blip2_stage2", model, pairs, images, parameters)


def _measured(job: str, stage: str, model: Path, pairs: Path, images: Path, parameters: dict[str, Any]) -> Measured:
    done = launched(job, read_parameters(parameters), {"model": model, "pairs": pairs, "images": images})
    measures = {f"{stage}/{name}": value for name, value in done.receipt.facts["metrics"].items()}
    return done.receipt, measures, done.record


def compare_models(
    parameters: dict[str, Any], *parts: Any, stages: tuple[str, ...]
) -> tuple[dict[str, float], dict[str, Any]]:
    """All measures together, and whether each later model is better than the one of the first stage.

    Args:
        parts: for each of `stages` its predictions, then for each its measures, then for each its run record.

    Returns:
        Flat measures, with `<stage>/<metric>_over_<first stage>/<subset>` and its ends `_low` and `_high`; the run
        record of the stage.
    """
    from blip_pipelines.evaluation.comparison import compare

    started, config = time.monotonic(), read_parameters(parameters).config
    count = len(stages)
    predictions, measures, records = parts[:count], parts[count : 2 * count], parts[2 * count :]
    metrics = {name: value for each in measures for name, value in each.items()}
    for stage, folder in zip(stages[1:], predictions[1:], strict=True):
        for (metric, subset), found in compare(folder, predictions[0], config.bootstrap_draws, config.seed).items():
            for end, value in (("", found.mean), ("_low", found.low), ("_high", found.high)):
                metrics[f"{stage}/{metric}_over_{stages[0]}{end}/{subset}"] = value
    seconds = sum(record["seconds"] for record in records) + time.monotonic() - started
    reused = all(record["reused"] for record in records)
    return metrics, {"seconds": seconds, "reused": reused, "parts": dict(zip(stages, records, strict=True))}
