"""Evaluation on the test halves, each read once: retrieval both ways, captions; later models beside the first."""

import logging
import time
from pathlib import Path
from typing import Any

from blip_pipelines.jobs.receipt import Receipt
from blip_pipelines.pipelines.launching import Launched, launched
from blip_pipelines.pipelines.parameters import Stage, read_block

MED_JOB = "blip_pipelines.jobs.evaluate_med"
STAGE1_JOB = "blip_pipelines.jobs.evaluate_blip2_stage1"
STAGE2_JOB = "blip_pipelines.jobs.evaluate_blip2_stage2"
QUESTIONS_JOB = "blip_pipelines.jobs.evaluate_instructions"
MED_QUESTIONS_JOB = "blip_pipelines.jobs.evaluate_question_answering"

log = logging.getLogger(__name__)

Measured = tuple[Receipt, dict[str, float], dict[str, Any]]


def read_parameters(block: dict[str, Any]) -> Stage:
    from blip_pipelines.jobs.launch import LaunchConfig
    from blip_pipelines.pipelines.evaluation.parameters import EvaluationConfig

    return read_block(EvaluationConfig, LaunchConfig, block, "evaluation")


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
    from blip_pipelines.pipelines.evaluation.parameters import measuring

    how = measuring(read_parameters(parameters))
    return _of_stage(stage, launched(job, how, {"model": model, "pairs": pairs, "images": images}))


def evaluate_answers(
    model: Path, instructions: Path, own_images: Path, images: Path, parameters: dict[str, Any], *, stage: str
) -> Measured:
    """What an exported BLIP-2, InstructBLIP or MED answers to held-out rows of the instruction table.

    Args:
        own_images: pictures that data sets brought; found by the table.
        stage: that trained the model; `question_answering` trained a MED.

    Returns:
        As `evaluate_med`; the receipt is of one row a question.
    """
    from blip_pipelines.pipelines.evaluation.parameters import asking

    is_med = stage == "question_answering"
    how = asking(read_parameters(parameters), "med_questions" if is_med else "questions")
    inputs = {"model": model, "instructions": instructions, "images": images}
    return _of_stage(stage, launched(MED_QUESTIONS_JOB if is_med else QUESTIONS_JOB, how, inputs))


def _of_stage(stage: str, done: Launched) -> Measured:
    measures = {f"{stage}/{name}": value for name, value in done.receipt.facts["metrics"].items()}
    return done.receipt, measures, done.record


def compare_answers(
    parameters: dict[str, Any],
    new: Path,
    old: Path,
    new_measures: dict[str, float],
    old_measures: dict[str, float],
    new_record: dict[str, Any],
    old_record: dict[str, Any],
    *others: dict[str, Any],
    stages: tuple[str, str],
    others_stages: tuple[str, ...],
) -> tuple[dict[str, float], dict[str, dict[str, Any]]]:
    """Measures of two models that were asked the same, and whether the new one is better than the old.

    Args:
        others: for each of `others_stages` its measures, then for each its run record; they are passed on.
        stages: that trained the new and the old one.

    Returns:
        Flat measures, with `<new>/accuracy_over_<old>/<role>` and, by data set, `<new>/score_over_<old>/<data set>`,
        each with its ends `_low` and `_high`; the run records.
    """
    from blip_pipelines.evaluation.answers import ROLES, named
    from blip_pipelines.evaluation.answers import compare_answers as compared

    config, metrics = read_parameters(parameters).config.questions, {**new_measures, **old_measures}
    for measures in others[: len(others_stages)]:
        metrics |= measures
    for name, found in compared(new, old, config.bootstrap_draws, config.seed).items():
        metric = f"{stages[0]}/{'accuracy' if name in ROLES else 'score'}_over_{stages[1]}"
        metrics |= named(metric, name, found)
        if name in ROLES:
            ends = f"{found.low:+.3f} to {found.high:+.3f}"
            log.info("%s over %s, %s: accuracy %+.3f (%s)", *stages, name.replace("_", " "), found.mean, ends)
    records = (new_record, old_record, *others[len(others_stages) :])
    return metrics, {
        f"{stage}_answers": record for stage, record in zip((*stages, *others_stages), records, strict=True)
    }


def compare_models(
    parameters: dict[str, Any], *parts: Any, stages: tuple[str, ...]
) -> tuple[dict[str, float], dict[str, Any]]:
    """All measures together, and whether each later model is better than the one of the first stage.

    Args:
        parts: for each of `stages` its predictions, then for each its measures, then for each its run record; then, of
            models that answer, what `compare_answers` gave.

    Returns:
        Flat measures, with `<stage>/<metric>_over_<first stage>/<subset>` and its ends `_low` and `_high`; the run
        record of the stage.
    """
    from blip_pipelines.evaluation.comparison import compare

    started, config = time.monotonic(), read_parameters(parameters).config
    count = len(stages)
    predictions, measures, records = parts[:count], parts[count : 2 * count], parts[2 * count : 3 * count]
    answers, answers_records = parts[3 * count :] or ({}, {})
    metrics = {name: value for each in (answers, *measures) for name, value in each.items()}
    for stage, folder in zip(stages[1:], predictions[1:], strict=True):
        for (metric, subset), found in compare(folder, predictions[0], config.bootstrap_draws, config.seed).items():
            for end, value in (("", found.mean), ("_low", found.low), ("_high", found.high)):
                metrics[f"{stage}/{metric}_over_{stages[0]}{end}/{subset}"] = value
    kept = {**dict(zip(stages, records, strict=True)), **answers_records}
    seconds = sum(record["seconds"] for record in kept.values()) + time.monotonic() - started
    return metrics, {"seconds": seconds, "reused": all(record["reused"] for record in kept.values()), "parts": kept}
