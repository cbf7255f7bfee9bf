"""Measure the captions that an exported BLIP-2 writes through its language model, as those of a MED are measured.

Every rank captions its share of the images; the first counts and writes. Outputs: `predictions_captions.parquet`.
"""

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blip_pipelines.config import read
from blip_pipelines.data.pairs import Pairs
from blip_pipelines.data.storage import StorageError
from blip_pipelines.evaluation.held_out import HeldOut, held_out
from blip_pipelines.evaluation.predictions import Written
from blip_pipelines.inference.language_decoder import write_captions
from blip_pipelines.jobs.exported_blip2 import RankBlip2
from blip_pipelines.jobs.measuring import MeasuringConfig, Share, predictions_of
from blip_pipelines.jobs.receipt import OUTPUTS
from blip_pipelines.models.blip2 import Blip2
from blip_pipelines.training.distributed import World

Config = MeasuringConfig  # of which captions by `beam` are measured; what is for retrieval and for sampling is not read

log = logging.getLogger(__name__)


def run(config: dict[str, Any], inputs: dict[str, Path], work: Path, world: World) -> dict[str, Any]:
    """Facts: `metrics`, flat, `<metric>/<subset>`; `rows` by subset.

    Args:
        inputs: `model`, the folder of `export_blip2` after stage 2; `pairs`; `images`.

    Raises:
        NothingToMeasure: no row of the split is in any of the subsets.
        StorageError: the folder has no language model.
    """
    settings = read(Config, config, "evaluation")
    model = RankBlip2(inputs["model"], inputs["images"], settings.precision, work, world)
    if model.model is None:
        raise StorageError(f"{inputs['model']}: no language model in it; give the export of stage 2")
    pairs = Pairs.open(inputs["pairs"], inputs["images"])
    scenes = held_out(pairs, settings.split, settings.subsets)
    predictions = predictions_of(pairs, model, settings, world)
    for held in scenes:
        share = Share(held, world, settings.batch_images)
        captions = _captions(model, model.model, settings, held, share)
        if predictions:
            predictions.add_captions(held, captions)
            found = predictions.metrics[f"cider/{held.subset}"]
            log.info("evaluation: %-8s %5d images   CIDEr %.3f", held.subset, len(held.keys), found)
    if predictions:
        predictions.write(work / OUTPUTS)
    return {
        "metrics": predictions.metrics if predictions else {},
        "rows": {held.subset: len(held.captions) for held in scenes},
    }


def _captions(rank: RankBlip2, model: Blip2, settings: Config, held: HeldOut, share: Share) -> list[Written]:
    """Of every image of the subset, on every rank."""
    read_images = rank.reader(held.rows)

    def captions_of(batch: slice, draw_ids: Tensor) -> list[Written]:
        pixels = torch.from_numpy(read_images(held.gallery.images[share.mine[batch]])).to(rank.device)
        with rank.autocast():
            captions = write_captions(
                *(model, pixels, settings.beam), prompt=settings.prompt, seed=settings.seed, draw_ids=draw_ids
            )
        return list(zip(captions.texts, captions.log_probability.tolist(), strict=True))

    return share.write(captions_of)
