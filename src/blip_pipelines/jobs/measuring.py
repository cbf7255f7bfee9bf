"""Measure a model that retrieves and captions on held-out rows, each against something simple.

Every rank encodes, scores and captions its share of the images; features and texts are gathered, image tokens never
travel. The first rank counts and writes.

Shapes: I images, R caption rows, N image tokens, D width, Q features of an image, E projection, P pairs.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blip_pipelines.config import speed_only
from blip_pipelines.data.pairs import Pairs
from blip_pipelines.evaluation.held_out import HeldOut, held_out
from blip_pipelines.evaluation.nearest import NearestImage
from blip_pipelines.evaluation.predictions import Predictions, Written
from blip_pipelines.evaluation.retrieval import Retrieval, rerank, retrieve
from blip_pipelines.inference.generation import GenerationConfig
from blip_pipelines.inference.image_text import ImageText, similarities
from blip_pipelines.jobs.exported import RankModel
from blip_pipelines.jobs.receipt import OUTPUTS
from blip_pipelines.models.precision import Precision
from blip_pipelines.training.distributed import World

UNKNOWN_TEMPERATURE = 0.07  # where BLIP starts

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class HeldOutConfig:
    """Which rows, and what their captions are measured against.

    Args:
        split, subsets: the rows; a subset's gallery is all its rows of the split.
        baseline_images: training images among which the nearest is sought, drawn at random if there are more.
        bootstrap_draws: for the interval of the gain over the baseline.
        jars: folder with the Java programs of METEOR and SPICE, if these are wanted.
    """

    split: str = "test"
    subsets: tuple[str, ...] = ("image", "combo", "concept")
    baseline_images: int = 20_000
    bootstrap_draws: int = 10_000
    seed: int = 0
    precision: Precision = "float32"
    jars: str | None = None
    batch_images: int = speed_only(64)


@dataclass(frozen=True)
class MeasuringConfig(HeldOutConfig):
    """What is measured, and how.

    Args:
        candidates: re-ranked by ITM per query.
        similarity_scale: weight of ITC similarity beside the log-odds of ITM; null: 1 / temperature of the model. With
            1 the similarity hardly counts, as in BLIP.
        max_tokens: of a caption that is read.
        prompt: that the captioner was trained with; its captions go on from it.
    """

    candidates: int = 16
    similarity_scale: float | None = None
    max_tokens: int = 30
    prompt: str = ""
    beam: GenerationConfig = field(default_factory=lambda: GenerationConfig("beam"))
    nucleus: GenerationConfig = field(default_factory=lambda: GenerationConfig("nucleus"))


def measure(
    image_text: ImageText,
    model: RankModel,
    settings: MeasuringConfig,
    inputs: dict[str, Path],
    work: Path,
    world: World,
    temperature: float | None = None,
) -> dict[str, Any]:
    """Facts: `metrics`, flat, `<metric>/<subset>`; `rows` by subset. Predictions go to the outputs in `work`.

    Args:
        inputs: `pairs`, `images`.
        temperature: of the model's ITC; None where it is not known, and 0.07 is taken.

    Raises:
        NothingToMeasure: no row of the split is in any of the subsets.
    """
    scale = settings.similarity_scale or 1 / (temperature or UNKNOWN_TEMPERATURE)
    pairs = Pairs.open(inputs["pairs"], inputs["images"])
    scenes = held_out(pairs, settings.split, settings.subsets)
    predictions = predictions_of(pairs, model, settings, world)
    for held in scenes:
        scene = _Scene(image_text, model, settings, held, world)
        by_similarity, by_matching = scene.retrieve(scale)
        beam, nucleus = scene.caption(settings.beam), scene.caption(settings.nucleus)
        if predictions:
            predictions.add_captions(held, beam, nucleus)
            predictions.add_retrieval(held, by_similarity, by_matching)
            log.info(
                "evaluation: %-8s %5d rows   R@5 image to text %.3f, text to image %.3f   CIDEr %.3f",
                held.subset,
                len(held.captions),
                *(predictions.metrics[f"{name}/{held.subset}"] for name in ("i2t_r5", "t2i_r5", "cider")),
            )
    if predictions:
        predictions.write(work / OUTPUTS)
    return {
        "metrics": predictions.metrics if predictions else {},
        "rows": {held.subset: len(held.captions) for held in scenes},
    }


def predictions_of(pairs: Pairs, model: RankModel, settings: HeldOutConfig, world: World) -> Predictions | None:
    """What the first rank fills, with the baseline that the training rows of the table give."""
    if not world.is_first:
        return None
    if settings.jars is None:
        log.info("evaluation: no METEOR and no SPICE; for these, give the folder of their jars as evaluation.jars")
    train, most = pairs.select(split="train"), settings.baseline_images
    nearest = NearestImage.among(train, model.reader, most, settings.seed, settings.batch_images)
    return Predictions(nearest, settings.bootstrap_draws, settings.seed, settings.jars)


class Share:
    """The images of a subset that are this rank's.

    Attributes:
        mine: their indices among the subset's I images, ascending.
    """

    def __init__(self, held: HeldOut, world: World, batch_images: int):
        self.held, self.world, self.batch_images = held, world, batch_images
        self.mine = np.array_split(np.arange(len(held.gallery.images)), world.ranks)[world.rank]
        keys = held.keys[self.mine]
        self._draw_ids = torch.tensor([int(key[:15], 16) for key in keys], dtype=torch.int64)

    def batches(self) -> Iterator[tuple[slice, Tensor]]:
        """Slices of `mine`, and the int64 ids by which draws know their images."""
        for start in range(0, len(self.mine), self.batch_images):
            batch = slice(start, start + self.batch_images)
            yield batch, self._draw_ids[batch]

    def write(self, captions_of: Callable[[slice, Tensor], list[Written]]) -> list[Written]:
        """Text and log-probability of every image of the subset, on every rank; each rank writes its own, batchwise."""
        written = [caption for batch, draw_ids in self.batches() for caption in captions_of(batch, draw_ids)]
        return [caption for share in self.world.gather_objects(written) for caption in share]


class _Scene:
    """One subset as this rank sees it: its share of the images encoded, the features of all."""

    def __init__(self, image_text: ImageText, model: RankModel, settings: MeasuringConfig, held: HeldOut, world: World):
        self.image_text, self.model, self.settings, self.held, self.world = image_text, model, settings, held, world
        self.share = Share(held, world, settings.batch_images)
        mine, images = self.share.mine, held.gallery.images
        read_images = model.reader(held.rows)
        batches = np.array_split(mine, max(1, -(-len(mine) // settings.batch_images)))
        with model.autocast():
            self.image_mine_ND = image_text.encode_images(
                torch.from_numpy(read_images(images[batch])) for batch in batches
            )
            ids, mask = model.tokenizer(held.captions, settings.max_tokens)
            self.token_ids, self.token_mask = torch.from_numpy(ids), torch.from_numpy(mask)
            texts = np.array_split(np.arange(len(ids)), world.ranks)[world.rank]
            text_mine_E = image_text.text_features(self.token_ids[texts], self.token_mask[texts])
            image_mine_QE = image_text.image_features(self.image_mine_ND)
        self.image_IQE, self.text_RE = self._gather(image_mine_QE), self._gather(text_mine_E)

    def retrieve(self, similarity_scale: float) -> tuple[Retrieval, Retrieval]:
        """By ITC alone, and re-ranked by ITM."""
        found = retrieve(similarities(self.image_IQE, self.text_RE), self.held.gallery, self.settings.candidates)
        return found, rerank(found, self.held.gallery, self._match, similarity_scale)

    def caption(self, config: GenerationConfig) -> list[Written]:
        """Of every image, on every rank."""
        settings = self.settings

        def captions_of(batch: slice, draw_ids: Tensor) -> list[Written]:
            with self.model.autocast():
                captions = self.image_text.write(
                    *(self.image_mine_ND[batch], self.model.tokenizer, config),
                    *(settings.prompt, settings.seed, draw_ids),
                )
            return list(zip(captions.texts, captions.log_probability.tolist(), strict=True))

        return self.share.write(captions_of)

    def _match(self, images_P: np.ndarray, rows_P: np.ndarray) -> Tensor:
        """Log-odds of matching (P,); each pair is scored by the rank that holds its image."""
        held = np.isin(images_P, self.share.mine)
        places = np.searchsorted(self.share.mine, images_P[held])
        with self.model.autocast():
            logits = self.image_text.match_logits(
                self.image_mine_ND, self.token_ids, self.token_mask, places, rows_P[held]
            )
        match_P = torch.zeros(len(images_P))
        match_P[torch.from_numpy(held)] = logits[:, 1] - logits[:, 0]
        return self.world.sum(match_P.to(self.world.device)).cpu()

    def _gather(self, features: Tensor) -> Tensor:
        return self.world.gather_ragged(features.to(self.world.device)).cpu()
