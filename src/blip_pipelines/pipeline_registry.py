"""The stages in the order in which they run: the map of the product.

Written out rather than found by Kedro, which under `--pipelines X` finds only X and leaves `__default__` short.
"""

from kedro.pipeline import Pipeline

from blip_pipelines.pipelines.evaluation.pipeline import create_pipeline as evaluation
from blip_pipelines.pipelines.ingestion.pipeline import create_pipeline as ingestion
from blip_pipelines.pipelines.med_pretraining.pipeline import create_pipeline as med_pretraining
from blip_pipelines.pipelines.release.pipeline import create_pipeline as release


def register_pipelines() -> dict[str, Pipeline]:
    """Stage name → pipeline, and `__default__`, all of them."""
    stages = {
        "ingestion": ingestion(),
        "med_pretraining": med_pretraining(),
        "evaluation": evaluation(),
        "release": release(),
    }
    return {**stages, "__default__": sum(stages.values(), Pipeline([]))}
