"""The last corpus, a Q-Former after stage 1 → a BLIP-2 that captions through its language model."""

from kedro.pipeline import Node, Pipeline

from blip_pipelines.pipelines.blip2_stage2.nodes import pretrain
from blip_pipelines.pipelines.rounds import in_round, models_of


def create_pipeline(rounds: int = 1) -> Pipeline:
    corpus = in_round("capfilt", rounds)
    return Pipeline(
        [
            Node(
                pretrain,
                [
                    *(f"{corpus}_pairs", "images", "packages", f"{corpus}_pairs_checked"),
                    *("blip2_stage1_model", f"{models_of(rounds)[-1]}_model", "params:blip2_stage2"),
                ],
                ["blip2_stage2_model", "blip2_stage2_history", "blip2_stage2_run"],
                name="pretrain_generation",
            )
        ],
        tags="blip2_stage2",
    )
