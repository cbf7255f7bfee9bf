"""Evaluation on the test halves, each read once: retrieval both ways, captions by beam and nucleus."""

from pathlib import Path
from typing import Any

from blip_pipelines.jobs.receipt import Receipt
from blip_pipelines.pipelines.launching import launched
from blip_pipelines.pipelines.parameters import Stage, read_block

JOB = "blip_pipelines.jobs.evaluate_med"


def read_parameters(block: dict[str, Any]) -> Stage:
    from blip_pipelines.jobs.evaluate_med import Config
    from blip_pipelines.jobs.launch import LaunchConfig

    return read_block(Config, LaunchConfig, block, "evaluation")


def evaluate_med(
    model: Path, pairs: Path, images: Path, parameters: dict[str, Any]
) -> tuple[Receipt, dict[str, float], dict[str, Any]]:
    """Predictions and measures of an exported MED.

    Returns:
        The receipt of the predictions, one row a sample; flat measures `med_pretraining/<metric>/<subset>`; the run
        record.
    """
    done = launched(JOB, read_parameters(parameters), {"model": model, "pairs": pairs, "images": images})
    measures = {f"med_pretraining/{name}": value for name, value in done.receipt.facts["metrics"].items()}
    return done.receipt, measures, done.record
