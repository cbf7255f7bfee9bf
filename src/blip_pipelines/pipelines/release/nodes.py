"""What a run ends with: models in the registry, the page, the numbers."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from blip_pipelines.pipelines.parameters import Stage, read_block
from blip_pipelines.pipelines.work import WorkConfig

REGISTERED = ("blip-captioner", "blip-retriever")


@dataclass(frozen=True)
class Config:
    """Args: alias that the new versions get, for people and servers to ask for."""

    alias: str = "candidate"


def read_parameters(block: dict[str, Any]) -> Stage:
    return read_block(Config, WorkConfig, block, "release")


def register(
    model: Path, pairs: Path, metrics: dict[str, float], run: dict[str, Any], parameters: dict[str, Any]
) -> dict[str, Any]:
    """Register the captioner and the retriever of one model folder, with the hashes of what made them.

    Args:
        run: the record of the run that trained it.

    Returns:
        `models`, a row each: name, version, alias, stage; and `seconds`. The same content is registered once.
    """
    started = time.monotonic()
    from blip_pipelines.data.storage import content_hash
    from blip_pipelines.inference.served import SERVED
    from blip_pipelines.tracking.registry import register_served

    made_from = {
        "stage": "med_pretraining",
        "model": content_hash(model),
        "pairs": content_hash(pairs),
        "fingerprint": run["fingerprint"],
        "code": run["code"],
    }
    alias = read_parameters(parameters).config.alias
    models = [register_served(name, SERVED[name], model, alias, made_from, metrics) for name in REGISTERED]
    return {"models": models, "seconds": time.monotonic() - started}


def report(
    pairs: Path,
    images: Path,
    quarantine: Path,
    noise: Path,
    contracts: list[dict[str, Any]],
    docs: Path,
    history: list[dict[str, float]],
    predictions: Path,
    metrics: dict[str, float],
    registered: dict[str, Any],
    ingestion: dict[str, Any],
    med_pretraining: dict[str, Any],
    evaluation: dict[str, Any],
) -> tuple[Callable[[Path], None], dict[str, float]]:
    """The page, as what writes it, and every number on it under flat keys.

    Args:
        history: curves of pretraining.
        metrics: flat measures `stage/metric/subset`.
        ingestion, med_pretraining, evaluation: run records.
    """
    from blip_pipelines.data.sources.packages import WHEELS
    from blip_pipelines.evaluation.report import summary, write_report

    stages = {
        "ingestion": ingestion,
        "med_pretraining": med_pretraining,
        "evaluation": evaluation,
        "release": {"seconds": registered["seconds"]},
    }
    page = partial(
        write_report,
        stages=stages,
        metrics=metrics,
        pairs=pairs,
        images=images,
        quarantine=quarantine,
        history={"med_pretraining": history},
        predictions={"med_pretraining": predictions},
        credits=[wheel.credit for wheel in WHEELS.values() if wheel.credit],
        registered=registered["models"],
        noise=noise,
        contracts=contracts,
        docs=docs,
    )
    return page, summary(metrics, stages)
