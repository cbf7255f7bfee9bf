"""The stages in the order in which they run: the map of the product.

Written out rather than found by Kedro, which under `--pipelines X` finds only X and leaves `__default__` short.
"""

from pathlib import Path

from kedro.pipeline import Pipeline
from kedro.utils import find_kedro_project

from blip_pipelines.pipelines.blip2_stage1.pipeline import create_pipeline as blip2_stage1
from blip_pipelines.pipelines.blip2_stage2.pipeline import create_pipeline as blip2_stage2
from blip_pipelines.pipelines.capfilt.pipeline import create_pipeline as capfilt
from blip_pipelines.pipelines.evaluation.pipeline import create_pipeline as evaluation
from blip_pipelines.pipelines.ingestion.pipeline import create_pipeline as ingestion
from blip_pipelines.pipelines.instruct_tuning.pipeline import create_pipeline as instruct_tuning
from blip_pipelines.pipelines.instructions.pipeline import create_pipeline as instructions
from blip_pipelines.pipelines.med_bootstrapped.pipeline import create_pipeline as med_bootstrapped
from blip_pipelines.pipelines.med_pretraining.pipeline import create_pipeline as med_pretraining
from blip_pipelines.pipelines.question_answering.pipeline import create_pipeline as question_answering
from blip_pipelines.pipelines.release.pipeline import create_pipeline as release
from blip_pipelines.pipelines.rounds import configured_rounds, in_round


def register_pipelines() -> dict[str, Pipeline]:
    """Stage name → pipeline, and `__default__`, all of them."""
    rounds = configured_rounds(find_kedro_project(Path.cwd()) or Path.cwd())
    stages = {"ingestion": ingestion(), "med_pretraining": med_pretraining()}
    for number in range(1, rounds + 1):
        stages[in_round("capfilt", number)] = capfilt(number)
        stages[in_round("med_bootstrapped", number)] = med_bootstrapped(number)
    stages |= {"blip2_stage1": blip2_stage1(rounds), "blip2_stage2": blip2_stage2(rounds)}
    stages |= {"instructions": instructions(), "question_answering": question_answering(rounds)}
    stages |= {"instruct_tuning": instruct_tuning()}
    stages |= {"evaluation": evaluation(rounds), "release": release(rounds)}
    return {**stages, "__default__": sum(stages.values(), Pipeline([]))}
