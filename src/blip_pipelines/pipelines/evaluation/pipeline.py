"""A model → predictions and measures."""

from kedro.pipeline import Node, Pipeline

from blip_pipelines.pipelines.evaluation.nodes import evaluate_med


def create_pipeline() -> Pipeline:
    return Pipeline(
        [
            Node(
                evaluate_med,
                ["med_pretraining_model", "pairs", "images", "params:evaluation"],
                ["med_pretraining_predictions", "evaluation_metrics", "evaluation_run"],
                name="evaluate_med",
            )
        ],
        tags="evaluation",
    )
