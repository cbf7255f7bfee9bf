"""Measure an exported MED on held-out rows: retrieval both ways, captions, each against something simple.

Outputs: see `measuring.measure`.
"""

from pathlib import Path
from typing import Any

from blip_pipelines.config import read
from blip_pipelines.inference.image_text import MedImageText
from blip_pipelines.jobs.exported import RankMed
from blip_pipelines.jobs.measuring import MeasuringConfig, measure
from blip_pipelines.training.distributed import World

Config = MeasuringConfig


def run(config: dict[str, Any], inputs: dict[str, Path], work: Path, world: World) -> dict[str, Any]:
    """Facts: `metrics`, flat, `<metric>/<subset>`; `rows` by subset.

    Args:
        inputs: `model`, the folder of `export_med`; `pairs`; `images`.

    Raises:
        NothingToMeasure: no row of the split is in any of the subsets.
    """
    settings = read(Config, config, "evaluation")
    model = RankMed(inputs["model"], inputs["images"], settings.precision, work, world)
    return measure(MedImageText(model.med), model, settings, inputs, work, world, model.temperature)
