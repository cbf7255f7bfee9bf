"""The gate: what is found out about a candidate and about the champion, judged by `evaluation.gate`, and recorded."""

import json
import logging
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blip_pipelines.pipelines.parameters import Stage, read_stage
from blip_pipelines.pipelines.release.released import Released

if TYPE_CHECKING:
    from blip_pipelines.evaluation.gate import Facts
    from blip_pipelines.evaluation.scores import Scores

log = logging.getLogger(__name__)


def gate(
    registered: dict[str, Any],
    parameters: dict[str, Any],
    settings: dict[str, Any],
    *,
    releases: Sequence[Released],
    **data: Any,
) -> dict[str, Any]:
    """Promote each registered version to champion, or refuse it and say why.

    Args:
        registered: what `register` returned.
        settings: parameters of all stages, among them those by which the models were measured.
        data: the data sets that `releases` names; `pairs`, `images` and `noise`.

    Returns:
        `decisions`, one a model (`champions.decide`), none of a version that is champion already; and `seconds`.
    """
    from blip_pipelines.evaluation.gate import ModelRules, judge, refusals
    from blip_pipelines.pipelines.release.nodes import read_parameters
    from blip_pipelines.tracking import champions, registry, runs

    started, config, decisions = time.monotonic(), read_parameters(parameters).config.gate, []
    run = runs.current()
    if run is None:
        raise registry.RegistryError("the gate needs an MLflow run; use `kedro run --pipelines release`")
    by_stage = {released.stage: released for released in releases}
    for model in registered["models"]:
        name, version = model["name"], str(model["version"])
        before = champions.champion(run.store, name)
        if before and str(before.version) == version:
            log.info("gate: %s version %s is the champion already", name, version)
            continue
        facts = _facts(run, name, version, by_stage[model["stage"]], before, settings, data)
        rulings = judge(facts, config.models.get(name, ModelRules()), config)
        decision = champions.decide(run, name, version, [asdict(ruling) for ruling in rulings], refusals(rulings))
        if decision["promoted"]:
            log.info("gate: %s version %s is champion now", name, version)
        else:
            log.warning("gate: %s version %s stays a candidate; %s", name, version, decision["refused"])
        decisions.append(decision)
    return {"decisions": decisions, "seconds": time.monotonic() - started}


def recipe(released: Released, settings: Mapping[str, Any]) -> dict[str, Any]:
    """How a model was measured: `measured_by` and the parameters that change a score; `version` names the whole.

    Scores of other versions are not compared.
    """
    from blip_pipelines.config import arithmetic
    from blip_pipelines.data.storage import sha256
    from blip_pipelines.evaluation.scores import JUDGED_RIGHT

    how: Any
    if released.is_filter:
        judging = read_stage("capfilt", settings).config.judge
        how = {"judged_right_above": JUDGED_RIGHT, "judge": arithmetic(judging)}
    else:
        how = arithmetic(read_stage("evaluation", settings).config)
        questions = {block: how.pop(block) for block in ("questions", "med_questions")}
        how = questions[released.asks] if released.asks else how
    whole = {"measured_by": released.measured_by, "parameters": how}
    return {**whole, "version": sha256(json.dumps(whole, sort_keys=True).encode())[:16]}


def scores_of_released(released: Released, data: Mapping[str, Any]) -> "Scores":
    from blip_pipelines.evaluation.scores import scores_of, scores_of_filter

    found = data[released.predictions]
    return scores_of_filter(found, data["noise"]) if released.is_filter else scores_of(found)


def measures_of(released: Released, data: Mapping[str, Any]) -> dict[str, float]:
    """The stage's measures without its name: `<metric>/<subset>`."""
    start = f"{released.stage}/"
    return {name.removeprefix(start): value for name, value in data[released.metrics].items() if name.startswith(start)}


def _facts(
    run: Any, name: str, version: str, released: Released, before: Any, settings: dict[str, Any], data: dict[str, Any]
) -> "Facts":
    from blip_pipelines.data.leak import held_out, leaked
    from blip_pipelines.data.storage import content_hash
    from blip_pipelines.evaluation.gate import Cost, Facts
    from blip_pipelines.inference.cost import seconds_of, weights_bytes
    from blip_pipelines.models.reload import reload_differences
    from blip_pipelines.tracking import registry

    loaded = {"candidate": registry.load(run.store, name, version)}
    if before:
        loaded["champion"] = registry.load(run.store, name, str(before.version))
    asked = loaded["candidate"].input_example
    requests = {who: (lambda model=model: model.predict(asked)) for who, model in loaded.items()}
    seconds = seconds_of(requests)
    costs = {who: Cost(seconds[who], weights_bytes(loaded[who].unwrap_python_model())) for who in loaded}
    scores = scores_of_released(released, data)
    tags = run.store.client.get_model_version(name, version).tags
    evaluated = held_out(data["pairs"])
    if not released.is_filter:  # which is measured on the web captions of training images, of which it learns none
        evaluated |= {sample.key for samples in scores.values() for sample in samples}
    return Facts(
        metrics=measures_of(released, data),
        scores=scores,
        leaked=leaked(evaluated, [data[table] for table in released.trained_on]),
        contracts=data[released.contracts],
        checked=data[released.checked]["pairs"] == content_hash(data[released.trained_on[0]]),
        reload=reload_differences(registry.exported(loaded["candidate"])),
        cost=costs["candidate"],
        champion_scores=_champion_scores(run, name, released, loaded, before, tags, scores, settings, data),
        champion_cost=costs.get("champion"),
        withdrawn=tags.get("withdrawn"),
    )


def _champion_scores(
    run: Any,
    name: str,
    released: Released,
    loaded: Mapping[str, Any],
    before: Any,
    tags: Mapping[str, str],
    scores: "Scores",
    settings: dict[str, Any],
    data: Mapping[str, Any],
) -> "Scores | None":
    """As they were kept, or measured now where they were found by another recipe or on other rows."""
    from blip_pipelines.evaluation.scores import read_scores
    from blip_pipelines.tracking import registry

    if not before:
        return None
    with tempfile.TemporaryDirectory() as folder:
        file = registry.artifact(run.store, before, f"scores/{name}.parquet", Path(folder))
        kept = read_scores(file) if file else {}
    is_alike = before.tags.get("recipe") == tags.get("recipe") and all(
        kept.get(asked, {}).keys() == samples.keys() for asked, samples in scores.items()
    )
    if is_alike:
        return kept
    log.info("gate: measuring the champion of %s, version %s, on the rows of today", name, before.version)
    return _measured(released, registry.exported(loaded["champion"]), settings, data)


def _measured(released: Released, model: Path, settings: Mapping[str, Any], data: Mapping[str, Any]) -> "Scores":
    """What a model of this kind reaches on the rows of today."""
    from blip_pipelines.evaluation.scores import scores_of, scores_of_filter
    from blip_pipelines.pipelines.evaluation.parameters import asking, measuring
    from blip_pipelines.pipelines.launching import launched

    if released.is_filter:  # judges the very captions that the candidate decided on
        capfilt = read_stage("capfilt", settings)
        stage = Stage(capfilt.config.judge, capfilt.values.get("judge", {}), capfilt.launch)
        inputs = {"filter": model, "pairs": data[released.predictions], "images": data["images"]}
        return scores_of_filter(launched(released.measured_by, stage, inputs).receipt.folder, data["noise"])
    table = "instructions" if released.asks else "pairs"
    inputs = {"model": model, table: data[table], "images": data["images"]}
    stage = read_stage("evaluation", settings)
    stage = asking(stage, released.asks) if released.asks else measuring(stage)
    return scores_of(launched(released.measured_by, stage, inputs).receipt.folder)
