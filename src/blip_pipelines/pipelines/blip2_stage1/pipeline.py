"""The last composed corpus and the MED trained on it → a Q-Former."""

from kedro.pipeline import Node, Pipeline

from blip_pipelines.pipelines.blip2_stage1.nodes import learn_queries
from blip_pipelines.pipelines.rounds import in_round, models_of


def create_pipeline(rounds: int = 1) -> Pipeline:
    corpus, med = in_round("capfilt", rounds), models_of(rounds)[-1]
    return Pipeline(
        [
            Node(
                learn_queries,
                [
                    *(f"{corpus}_pairs", "images", "packages", f"{corpus}_pairs_checked", f"{med}_model"),
                    "params:blip2_stage1",
                ],
                ["blip2_stage1_model", "blip2_stage1_history", "blip2_stage1_run"],
                name="learn_queries",
            )
        ],
        tags="blip2_stage1",
    )
