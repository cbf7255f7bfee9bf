"""The models of all stages → predictions and measures."""

from kedro.pipeline import Node, Pipeline

from blip_pipelines.pipelines.evaluation.nodes import (
    compare_answers,
    compare_models,
    evaluate_answers,
    evaluate_blip2_stage1,
    evaluate_blip2_stage2,
    evaluate_med,
)
from blip_pipelines.pipelines.rounds import models_of, with_known


def create_pipeline(rounds: int = 1) -> Pipeline:
    evaluators = {stage: with_known(evaluate_med, stage=stage) for stage in models_of(rounds)}
    evaluators |= {"blip2_stage1": evaluate_blip2_stage1, "blip2_stage2": evaluate_blip2_stage2}
    stages = tuple(evaluators)
    measured = [
        Node(
            evaluate,
            [f"{stage}_model", "pairs", "images", "params:evaluation"],
            [f"{stage}_predictions", f"{stage}_measures", f"{stage}_evaluation_record"],
            name=f"evaluate_{stage}",
        )
        for stage, evaluate in evaluators.items()
    ]
    answering, others = ("instruct_tuning", "blip2_stage2"), ("question_answering",)
    asked = [
        Node(
            with_known(evaluate_answers, stage=stage),
            [f"{stage}_model", "instructions", "instructions_images", "images", "params:evaluation"],
            [f"{stage}_answers", f"{stage}_answer_measures", f"{stage}_answer_record"],
            name=f"ask_{stage}",
        )
        for stage in (*answering, *others)
    ]
    answered = Node(
        with_known(compare_answers, stages=answering, others_stages=others),
        [
            "params:evaluation",
            *(f"{stage}_{part}" for part in ("answers", "answer_measures", "answer_record") for stage in answering),
            *(f"{stage}_{part}" for part in ("answer_measures", "answer_record") for stage in others),
        ],
        ["answers_compared", "answer_records"],
        name="compare_answers",
    )
    compared = Node(
        with_known(compare_models, stages=stages),
        [
            "params:evaluation",
            *(f"{stage}_{part}" for part in ("predictions", "measures", "evaluation_record") for stage in stages),
            *("answers_compared", "answer_records"),
        ],
        ["evaluation_metrics", "evaluation_run"],
        name="compare_models",
    )
    return Pipeline([*measured, *asked, answered, compared], tags="evaluation")
