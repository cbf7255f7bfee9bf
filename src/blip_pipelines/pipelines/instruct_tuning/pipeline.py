"""An instruction table, a BLIP-2 after stage 2 → an InstructBLIP."""

from kedro.pipeline import Node, Pipeline

from blip_pipelines.pipelines.instruct_tuning.nodes import tune


def create_pipeline() -> Pipeline:
    return Pipeline(
        [
            Node(
                tune,
                ["instructions", "instructions_images", "images", "blip2_stage2_model", "params:instruct_tuning"],
                ["instruct_tuning_model", "instruct_tuning_history", "instruct_tuning_run"],
                name="tune_on_instructions",
            )
        ],
        tags="instruct_tuning",
    )
