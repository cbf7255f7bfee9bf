"""What a run ends with: models in the registry, the page, the numbers."""

import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from blip_pipelines.pipelines.parameters import Stage, parameters_of, read_block
from blip_pipelines.pipelines.release.released import Released
from blip_pipelines.pipelines.work import WorkConfig


def read_parameters(block: dict[str, Any]) -> Stage:
    from blip_pipelines.pipelines.release.parameters import ReleaseConfig

    return read_block(ReleaseConfig, WorkConfig, block, "release")


def register(
    parameters: dict[str, Any],
    settings: dict[str, Any],
    *,
    releases: Sequence[Released],
    **data: Any,
) -> dict[str, Any]:
    """Register every released model with the hashes of what made it, its scores sample by sample, and its card.

    Args:
        settings: parameters of all stages, for the cards and the recipes.
        data: the data sets that `releases` names, and `noise`.

    Returns:
        `models`, a row each: name, version, alias, stage; and `seconds`. The same content is registered once.
    """
    started = time.monotonic()
    from blip_pipelines.data.sources.packages import WHEELS
    from blip_pipelines.data.storage import MANIFEST, content_hash, read_json, write_json
    from blip_pipelines.evaluation.model_card import model_card
    from blip_pipelines.evaluation.scores import write_scores
    from blip_pipelines.inference.served import SERVED
    from blip_pipelines.jobs.receipt import RECEIPT
    from blip_pipelines.pipelines.release.gating import measures_of, recipe, scores_of_released
    from blip_pipelines.tracking.registry import register_served

    alias, models = read_parameters(parameters).config.alias, []
    for released in releases:
        record = data[released.record] if released.part is None else data[released.record]["parts"][released.part]
        measured = recipe(released, settings)
        made_from = {
            "stage": released.stage,
            "model": content_hash(data[released.model]),
            "pairs": content_hash(data[released.trained_on[0]]),
            "fingerprint": record["fingerprint"],
            "code": record["code"],
            "recipe": measured["version"],
        }
        measures, receipt = measures_of(released, data), data[released.model] / RECEIPT
        told = (
            measures,
            read_json(data[released.trained_on[0]] / MANIFEST),
            read_json(receipt) if receipt.exists() else {},
            parameters_of(released.stage, settings),
            [wheel.credit for wheel in WHEELS.values() if wheel.credit],
        )
        with tempfile.TemporaryDirectory() as folder:
            for name in released.names:
                scores, how = Path(folder) / f"{name}.parquet", Path(folder) / f"{name}.json"
                write_json(how, measured)
                write_scores(scores, scores_of_released(released, data))
                models.append(
                    register_served(
                        name,
                        SERVED[name],
                        data[released.model],
                        alias,
                        made_from,
                        measures,
                        {"scores": scores, "recipe": how},
                        model_card(name, made_from, *told),
                    )
                )
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
    gate: dict[str, Any],
    ablations: dict[str, Any] | None,
    **by_stage: Any,
) -> tuple[Callable[[Path], None], dict[str, float]]:
    """The page, as what writes it, and every number on it under flat keys.

    Args:
        metrics: flat measures `stage/metric/subset` of the evaluation.
        gate: decisions about the registered models.
        ablations: what `evaluation.ablation.collect` found; None where they were not run.
        by_stage: `run_<stage>`, run records; `history_<stage>`, curves; `predictions_<stage>` and
            `answers_<stage>`, folders; of each round of CapFilt also `decided_<stage>`, its judged captions, and
            `metrics_<stage>`.
    """
    from blip_pipelines.data.sources.packages import WHEELS
    from blip_pipelines.evaluation.evidence import Evidence
    from blip_pipelines.evaluation.measures import summary
    from blip_pipelines.evaluation.report import write_report

    def of(kind: str) -> dict[str, Any]:
        return {name.removeprefix(f"{kind}_"): by_stage[name] for name in by_stage if name.startswith(f"{kind}_")}

    stages = {**of("run"), "release": {"seconds": registered["seconds"] + gate["seconds"]}}
    measures = {name: value for each in (metrics, *of("metrics").values()) for name, value in each.items()}
    if ablations:
        measures |= ablations["metrics"]
    evidence = Evidence(
        stages=stages,
        metrics=measures,
        pairs=pairs,
        images=images,
        quarantine=quarantine,
        history=of("history"),
        predictions=of("predictions"),
        answers=of("answers"),
        decided=of("decided"),
        credits=[wheel.credit for wheel in WHEELS.values() if wheel.credit],
        registered=registered["models"],
        decisions=gate["decisions"],
        noise=noise,
        contracts=contracts,
        ablations=ablations,
    )
    return partial(write_report, evidence=evidence, docs=docs), summary(measures, stages)
