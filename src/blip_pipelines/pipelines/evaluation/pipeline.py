"""The models of all rounds → predictions and measures."""

from kedro.pipeline import Node, Pipeline

from blip_pipelines.pipelines.evaluation.nodes import compare_meds, evaluate_med
from blip_pipelines.pipelines.rounds import models_of, with_known


def create_pipeline(rounds: int = 1) -> Pipeline:
    stages = models_of(rounds)
    measured = [
        Node(
            with_known(evaluate_med, stage=stage),
            [f"{stage}_model", "pairs", "images", "params:evaluation"],
            [f"{stage}_predictions", f"{stage}_measures", f"{stage}_evaluation_record"],
            name=f"evaluate_{stage}",
        )
        for stage in stages
    ]
    compared = Node(
        with_known(compare_meds, stages=stages),
        [
            "params:evaluation",
            *(f"{stage}_{part}" for part in ("predictions", "measures", "evaluation_record") for stage in stages),
        ],
        ["evaluation_metrics", "evaluation_run"],
        name="compare_meds",
    )
    return Pipeline([*measured, compared], tags="evaluation")
