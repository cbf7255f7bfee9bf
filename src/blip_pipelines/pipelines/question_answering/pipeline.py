"""An instruction table, the last pretrained MED → a MED that answers questions."""

from kedro.pipeline import Node, Pipeline

from blip_pipelines.pipelines.question_answering.nodes import learn_to_answer
from blip_pipelines.pipelines.rounds import models_of


def create_pipeline(rounds: int = 1) -> Pipeline:
    med = models_of(rounds)[-1]
    return Pipeline(
        [
            Node(
                learn_to_answer,
                ["instructions", "instructions_images", "images", f"{med}_model", "params:question_answering"],
                ["question_answering_model", "question_answering_history", "question_answering_run"],
                name="learn_to_answer",
            )
        ],
        tags="question_answering",
    )
