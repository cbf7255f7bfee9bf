"""The composed corpus → a pretrained MED."""

from kedro.pipeline import Node, Pipeline

from blip_pipelines.pipelines.med_bootstrapped.nodes import pretrain
from blip_pipelines.pipelines.rounds import in_round


def create_pipeline(number: int = 1) -> Pipeline:
    stage, corpus = in_round("med_bootstrapped", number), in_round("capfilt", number)
    before = "med_pretraining" if number == 1 else in_round("med_bootstrapped", number - 1)
    return Pipeline(
        [
            Node(
                pretrain,
                [
                    *(f"{corpus}_pairs", "images", "packages", f"{corpus}_pairs_checked", f"{before}_model"),
                    *("params:med_pretraining", "params:med_bootstrapped"),
                ],
                [f"{stage}_model", f"{stage}_history", f"{stage}_run"],
                name=in_round("pretrain_bootstrapped", number),
            )
        ],
        tags=stage,
    )
