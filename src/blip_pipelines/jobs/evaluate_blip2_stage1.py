"""Measure a Q-Former after stage 1 on held-out rows as a MED is measured, and keep where its queries look.

Retrieval by ITC takes the query nearest to the text; the best candidates are ranked anew by ITM. Captions are those of
ITG's decoder: the Q-Former alone, no language model.

Outputs: those of `measuring.measure`, and `attention.parquet`, a row for each of a few pictures.

Shapes: C layers that look at the image, Q queries, N image tokens.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from blip_pipelines.config import read
from blip_pipelines.data import storage
from blip_pipelines.data.pairs import Pairs
from blip_pipelines.evaluation.held_out import HeldOut, held_out
from blip_pipelines.evaluation.predictions import ATTENTION
from blip_pipelines.inference.qformer_image_text import QFormerImageText
from blip_pipelines.jobs.exported_blip2 import RankBlip2
from blip_pipelines.jobs.measuring import MeasuringConfig, measure
from blip_pipelines.jobs.receipt import OUTPUTS
from blip_pipelines.training.distributed import World

PICTURES = 3  # of a subset, whose attention is kept

Config = MeasuringConfig


def run(config: dict[str, Any], inputs: dict[str, Path], work: Path, world: World) -> dict[str, Any]:
    """Facts: `metrics`, flat, `<metric>/<subset>`; `rows` by subset.

    Args:
        inputs: `model`, the folder of `export_blip2`; `pairs`; `images`.

    Raises:
        NothingToMeasure: no row of the split is in any of the subsets.
    """
    settings = read(Config, config, "evaluation")
    model = RankBlip2(inputs["model"], inputs["images"], settings.precision, work, world)
    image_text = QFormerImageText(model.former, model.tower)
    facts = measure(image_text, model, settings, inputs, work, world, model.temperature)
    if world.is_first:
        pairs = Pairs.open(inputs["pairs"], inputs["images"])
        rows = [row for held in held_out(pairs, settings.split, settings.subsets) for row in attention(model, held)]
        with storage.writing(work / OUTPUTS / ATTENTION) as temporary:
            pq.write_table(pa.Table.from_pylist(rows), temporary, compression="zstd")
    return facts


@torch.no_grad()
def attention(model: RankBlip2, held: HeldOut) -> list[dict[str, Any]]:
    """Where the queries look in a few pictures of a subset: `weights`, C x Q x N in a row, and these sizes."""
    chosen = np.argsort(held.keys)[:PICTURES]  # keys are hashes, so that this is a lot
    rows = held.gallery.images[chosen]
    image_BND = model.tower(torch.from_numpy(model.reader(held.rows)(rows)).to(model.device))
    weights_CBQN = model.former.attention_to_image(model.former.project_image(image_BND)).cpu()
    layers, _, queries, tokens = weights_CBQN.shape
    return [
        {
            "subset": held.subset,
            "key": held.keys[image],
            "layers": layers,
            "queries": queries,
            "tokens": tokens,
            "weights": weights_CBQN[:, place].flatten().tolist(),
        }
        for place, image in enumerate(chosen)
    ]
