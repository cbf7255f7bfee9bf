"""A registered model over a whole caption table: a caption for every image, or how well every caption matches.

What the model answers is what it answers over HTTP: the same code on the same bytes, shard by shard, ranks taking whole
shards. Any model that is served in one of these ways can do it.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa

from blip_pipelines.config import ConfigError, read, speed_only
from blip_pipelines.data.composition import fill
from blip_pipelines.data.pairs import Pairs
from blip_pipelines.jobs.by_shard import make_by_shard
from blip_pipelines.jobs.capfilt_write import synthetic_rows
from blip_pipelines.tracking.registry import open_model
from blip_pipelines.training.distributed import World

log = logging.getLogger(__name__)

Ask = Callable[[pd.DataFrame], pd.DataFrame]
WRITTEN = ("caption", "answer")  # outputs that are texts


@dataclass(frozen=True)
class Config:
    """What is asked.

    Args:
        task: "caption" writes rows of origin synthetic, one an image; "judge" keeps the rows and fills in
            `match_probability`.
        made_by: content hash of the model's exported folder, for `written_by` or `judged_by`.
        split: whose rows; None for all.
        columns: further input columns of the model, the same for every image, such as a prompt or a question.
        params: of the model.
        batch_images: asked together.
    """

    task: Literal["caption", "judge"]
    made_by: str
    split: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    params: dict[str, Any] = field(default_factory=dict)
    batch_images: int = speed_only(64)


def run(config: dict[str, Any], inputs: dict[str, Path], work: Path, world: World) -> dict[str, Any]:
    """A caption table, a shard for each of `pairs`. Facts: `rows`, `task`, `made_by`.

    Args:
        inputs: `model`, the folder that MLflow keeps a version in; `pairs` and `images`.

    Raises:
        ConfigError: the model does not do what is asked.
    """
    settings = read(Config, config, "score")
    model, inputs_known, outputs = open_model(inputs["model"])
    _check(settings, inputs_known, outputs)
    pairs = Pairs.open(inputs["pairs"], inputs["images"])

    def ask(rows: pd.DataFrame) -> pd.DataFrame:
        for name, value in settings.columns.items():
            rows[name] = value
        return model.predict(None, rows, dict(settings.params))

    def scored(shard: int) -> pa.Table:
        view = pairs.shard(shard).select(split=settings.split)
        return _captioned(view, ask, settings) if settings.task == "caption" else _judged(view, ask, settings)

    rows = make_by_shard(scored, pairs, work, world, {"task": settings.task, "made_by": settings.made_by})
    return {"rows": rows, "task": settings.task, "made_by": settings.made_by}


def _check(settings: Config, known: list[str], outputs: list[str]) -> None:
    wanted = "match_probabilities" if settings.task == "judge" else "caption"
    if wanted not in outputs and not (settings.task == "caption" and set(WRITTEN) & set(outputs)):
        raise ConfigError(f"score.task: this model does not {settings.task}; it answers {', '.join(outputs)}")
    if unknown := sorted(set(settings.columns) - set(known)):
        raise ConfigError(f"score.columns: this model does not read {', '.join(unknown)}; it reads {', '.join(known)}")


def _captioned(view: Pairs, ask: Ask, settings: Config) -> pa.Table:
    images = view.select(rows=view.unique_images())
    written: list[list[str]] = []
    for start in range(0, len(images), settings.batch_images):
        rows = range(start, min(start + settings.batch_images, len(images)))
        answers = ask(pd.DataFrame({"image": [images.image_bytes(row) for row in rows]}))
        column = next(name for name in WRITTEN if name in answers)
        written += [[text] for text in answers[column]]
    return synthetic_rows(images.table(), written, settings.made_by, 0)


def _judged(view: Pairs, ask: Ask, settings: Config) -> pa.Table:
    table, ids = view.table(), view.image_ids
    order = np.argsort(ids, kind="stable")  # rows of an image together, so that it is encoded once
    firsts = np.flatnonzero(np.diff(ids[order], prepend=-1))
    groups = np.split(order, firsts[1:]) if len(order) else []
    captions, probability = table["caption"].to_pylist(), np.empty(len(table), np.float32)
    for start in range(0, len(groups), settings.batch_images):
        batch = groups[start : start + settings.batch_images]
        asked = {
            "image": [view.image_bytes(int(rows[0])) for rows in batch],
            "texts": [[captions[row] for row in rows] for rows in batch],
        }
        for rows, found in zip(batch, ask(pd.DataFrame(asked))["match_probabilities"], strict=True):
            probability[rows] = found
    return fill(table, match_probability=probability, judged_by=[settings.made_by] * len(table))
