"""What is known of pictures, or question data of others → the instruction table that both kinds of tuning read."""

from kedro.pipeline import Node, Pipeline

from blip_pipelines.pipelines.instructions.nodes import write_table


def create_pipeline() -> Pipeline:
    return Pipeline(
        [
            Node(
                write_table,
                ["pairs", "images", "packages", "instructions_places", "params:instructions"],
                ["instructions", "instructions_images", "instructions_counts", "instructions_run"],
                name="write_instructions",
            )
        ],
        tags="instructions",
    )
