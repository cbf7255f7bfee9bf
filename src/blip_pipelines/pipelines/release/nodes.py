"""What a run ends with: models in the registry, the page, the numbers."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from blip_pipelines.pipelines.parameters import Stage, read_block
from blip_pipelines.pipelines.work import WorkConfig

SERVED_BY = {"med": ("blip-captioner", "blip-retriever"), "filter": ("blip-filter",)}


@dataclass(frozen=True)
class Config:
    """Args: alias that the new versions get, for people and servers to ask for."""

    alias: str = "candidate"


def read_parameters(block: dict[str, Any]) -> Stage:
    return read_block(Config, WorkConfig, block, "release")


def register(
    model: Path,
    pairs: Path,
    run: dict[str, Any],
    judge: Path,
    judged_pairs: Path,
    judge_run: dict[str, Any],
    metrics: dict[str, float],
    capfilt_metrics: dict[str, float],
    parameters: dict[str, Any],
    *,
    stages: tuple[str, str] = ("med_bootstrapped", "capfilt"),
) -> dict[str, Any]:
    """Register captioner and retriever out of the last model, and the filter, with the hashes of what made them.

    Args:
        model, pairs, run: the last pretraining: its exports, what it was trained on, its run record.
        judge, judged_pairs, judge_run: the same of the filter.
        stages: of the two.

    Returns:
        `models`, a row each: name, version, alias, stage; and `seconds`. The same content is registered once.
    """
    started = time.monotonic()
    from blip_pipelines.data.storage import content_hash
    from blip_pipelines.inference.served import SERVED
    from blip_pipelines.tracking.registry import register_served

    alias, models = read_parameters(parameters).config.alias, []
    for kind, stage, folder, data, record, measures in (
        ("med", stages[0], model, pairs, run, metrics),
        ("filter", stages[1], judge, judged_pairs, judge_run["parts"]["filter"], capfilt_metrics),
    ):
        made_from = {
            "stage": stage,
            "model": content_hash(folder),
            "pairs": content_hash(data),
            "fingerprint": record["fingerprint"],
            "code": record["code"],
        }
        of_stage = {name: value for name, value in measures.items() if name.startswith(f"{stage}/")}
        models += [register_served(name, SERVED[name], folder, alias, made_from, of_stage) for name in SERVED_BY[kind]]
    return {"models": models, "seconds": time.monotonic() - started}


def report(
    pairs: Path,
    images: Path,
    quarantine: Path,
    noise: Path,
    contracts: list[dict[str, Any]],
    docs: Path,
    metrics: dict[str, float],
    registered: dict[str, Any],
    ablations: dict[str, Any] | None,
    **by_stage: Any,
) -> tuple[Callable[[Path], None], dict[str, float]]:
    """The page, as what writes it, and every number on it under flat keys.

    Args:
        metrics: flat measures `stage/metric/subset` of the evaluation.
        ablations: what `evaluation.ablation.collect` found; None where they were not run.
        by_stage: `run_<stage>`, run records; `history_<stage>`, curves; `predictions_<stage>`, folders; of each round
            of CapFilt also `decided_<stage>`, its judged captions, and `metrics_<stage>`.
    """
    from blip_pipelines.data.sources.packages import WHEELS
    from blip_pipelines.evaluation.report import summary, write_report

    def of(kind: str) -> dict[str, Any]:
        return {name.removeprefix(f"{kind}_"): by_stage[name] for name in by_stage if name.startswith(f"{kind}_")}

    stages = {**of("run"), "release": {"seconds": registered["seconds"]}}
    measures = {name: value for each in (metrics, *of("metrics").values()) for name, value in each.items()}
    if ablations:
        measures |= ablations["metrics"]
    page = partial(
        write_report,
        stages=stages,
        metrics=measures,
        pairs=pairs,
        images=images,
        quarantine=quarantine,
        history=of("history"),
        predictions=of("predictions"),
        decided=of("decided"),
        credits=[wheel.credit for wheel in WHEELS.values() if wheel.credit],
        registered=registered["models"],
        noise=noise,
        contracts=contracts,
        docs=docs,
        ablations=ablations,
    )
    return page, summary(measures, stages)
