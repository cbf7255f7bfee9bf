"""The filter of CapFilt: how well every web and every synthetic caption matches its image (BLIP 3.3).

Captions are judged independently of one another by the ITM head, and all scores are kept: what becomes of a caption is
decided later (`data.composition`). An image is encoded and its keys and values projected once for all its captions.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from blip_pipelines.config import read, speed_only
from blip_pipelines.data import storage
from blip_pipelines.data.composition import fill
from blip_pipelines.data.pairs import Pairs
from blip_pipelines.data.storage import StorageError
from blip_pipelines.inference import scoring
from blip_pipelines.jobs.by_shard import images_in_batches, make_by_shard
from blip_pipelines.jobs.exported import RankMed
from blip_pipelines.models.precision import Precision
from blip_pipelines.training.distributed import World


@dataclass(frozen=True)
class Config:
    """How captions are judged.

    Args:
        max_tokens: of a caption that is read.
        batch_images: scored together with all their captions; part of the arithmetic, as sums round differently in
            other batches.
        workers: processes that read images ahead.
    """

    max_tokens: int = 30
    batch_images: int = 64
    precision: Precision = "bfloat16"
    workers: int = speed_only(0)


def run(config: dict[str, Any], inputs: dict[str, Path], work: Path, world: World) -> dict[str, Any]:
    """A caption table of the judged rows, a shard for each of `pairs`. Facts: `captions`, `judged_by`.

    Args:
        inputs: `filter`, the folder of `export_med`; `pairs` and `images`; `synthetic`, what `capfilt_write` made, or
            nothing to judge the web captions alone.

    Raises:
        StorageError: the synthetic captions are not of these pairs.
    """
    settings = read(Config, config, "capfilt.judge")
    judge = RankMed(inputs["filter"], inputs["images"], settings.precision, work, world)
    pairs = Pairs.open(inputs["pairs"], inputs["images"])
    synthetic = Pairs.open(inputs["synthetic"]) if "synthetic" in inputs else None
    if synthetic is not None and _shards(pairs) != _shards(synthetic):
        raise StorageError(f"{inputs['synthetic']}: has other shards than {inputs['pairs']}; write captions again")
    judged_by = world.broadcast(storage.content_hash(inputs["filter"]) if world.is_first else None)

    def judged(shard: int) -> pa.Table:
        web = pairs.shard(shard).select(split="train", origins=["web"])
        written = [] if synthetic is None else [synthetic.shard(shard).table()]
        candidates = pa.concat_tables([web.table(), *written])
        images = web.select(rows=web.unique_images())
        probability = match_probabilities(judge, images, candidates, settings)
        return fill(candidates, match_probability=probability, judged_by=[judged_by] * len(candidates))

    rows = make_by_shard(judged, pairs, work, world, {"judged_by": judged_by})
    return {"captions": rows, "judged_by": judged_by}


def _shards(table: Pairs) -> list[str]:
    return [entry["name"] for entry in table.manifest["shards"]]


@torch.inference_mode()
def match_probabilities(judge: RankMed, images: Pairs, candidates: pa.Table, settings: Config) -> np.ndarray:
    """(rows,) float32 probability that each candidate caption matches its image.

    Args:
        images: a view of distinct images; candidates: rows with `key` and `caption` of these images.

    Raises:
        StorageError: a candidate is of another image.
    """
    place = {key: row for row, key in enumerate(images.keys)}
    try:
        image_of_row = np.array([place[key] for key in candidates["key"].to_pylist()], np.int64)
    except KeyError as error:
        raise StorageError(
            f"a synthetic caption is of image {error}, which has no web caption; write them again"
        ) from error
    captions = np.array(candidates["caption"].to_pylist(), dtype=object)
    probability = np.empty(len(candidates), np.float32)
    order = np.argsort(image_of_row, kind="stable")
    device = next(judge.med.parameters()).device
    read_images = judge.reader(images)
    for batch, pixels in images_in_batches(read_images, len(images), settings.batch_images, settings.workers):
        first, last = np.searchsorted(image_of_row[order], [batch[0], batch[-1] + 1])
        rows = order[first:last]
        token_ids, token_mask = judge.tokenizer(captions[rows].tolist(), settings.max_tokens)
        with judge.autocast():
            logits_P2 = scoring.match_logits(
                judge.med,
                judge.med.encode_image(pixels.to(device)),
                torch.from_numpy(token_ids),
                torch.from_numpy(token_mask),
                image_of_row[rows] - batch[0],
                np.arange(len(rows)),
                batch_images=len(batch),
            )
        probability[rows] = scoring.match_probabilities(logits_P2).numpy()
    return probability
