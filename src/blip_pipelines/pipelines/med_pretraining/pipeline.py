"""Pairs and images → a pretrained MED."""

from kedro.pipeline import Node, Pipeline

from blip_pipelines.pipelines.med_pretraining.nodes import pretrain


def create_pipeline() -> Pipeline:
    return Pipeline(
        [
            Node(
                pretrain,
                ["pairs", "images", "packages", "pairs_checked", "params:med_pretraining"],
                ["med_pretraining_model", "med_pretraining_history", "med_pretraining_run"],
                name="pretrain",
            )
        ],
        tags="med_pretraining",
    )
