"""Measure an exported MED on held-out rows: retrieval both ways, captions, each against something simple.

Every rank encodes, scores and captions its share of the images; features and texts are gathered, image tokens never
travel. The first rank counts and writes. Retrieval is reported re-ranked by ITM (`i2t_r5`) and by ITC alone
(`i2t_r5_itc`), beside the chance of a random order; captions by beam search (`cider`) and by nucleus sampling
(`cider_nucleus`), beside the caption of the nearest training image (`baseline_cider`).

Predictions, one row a sample: `predictions_retrieval.parquet`, `predictions_captions.parquet`.

Shapes: I images, R caption rows, N image tokens, D width, E projection, P pairs.
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, normalize

from blip_pipelines.config import read, speed_only
from blip_pipelines.data import storage
from blip_pipelines.data.pairs import Pairs
from blip_pipelines.evaluation.bootstrap import bootstrap_difference
from blip_pipelines.evaluation.captioning import score_captions, tokenise
from blip_pipelines.evaluation.retrieval import Gallery, Retrieval, rerank, retrieve
from blip_pipelines.inference import scoring
from blip_pipelines.inference.generation import Captions, GenerationConfig, generate
from blip_pipelines.jobs.exported import Precision, RankMed
from blip_pipelines.training.distributed import World

log = logging.getLogger(__name__)

SHOWN_ANSWERS = 5  # of a query, kept in the predictions
Written = tuple[str, float]  # a caption and its log-probability

THUMBNAIL = 16  # pixels a side: what the nearest image is judged by where there is no frozen stem


@dataclass(frozen=True)
class Config:
    """What is measured, and how.

    Args:
        split, subsets: the rows; a subset's gallery is all its rows of the split.
        candidates: re-ranked by ITM per query.
        max_tokens: of a caption that is read.
        prompt: that the captioner was trained with; its captions go on from it.
        baseline_images: training images among which the nearest is sought, drawn at random if there are more.
        bootstrap_draws: for the interval of the gain over the baseline.
        jars: folder with the Java programs of METEOR and SPICE, if these are wanted.
    """

    split: str = "test"
    subsets: tuple[str, ...] = ("image", "combo", "concept")
    candidates: int = 16
    max_tokens: int = 30
    prompt: str = ""
    beam: GenerationConfig = field(default_factory=lambda: GenerationConfig("beam"))
    nucleus: GenerationConfig = field(default_factory=lambda: GenerationConfig("nucleus"))
    baseline_images: int = 20_000
    bootstrap_draws: int = 10_000
    seed: int = 0
    precision: Precision = "float32"
    jars: str | None = None
    batch_images: int = speed_only(64)


class NothingToMeasure(ValueError):
    """The table has no rows where the parameters look for them; the message says where there are some."""


def run(config: dict[str, Any], inputs: dict[str, Path], work: Path, world: World) -> dict[str, Any]:
    """Facts: `metrics`, flat, `<metric>/<subset>`; `rows` by subset.

    Args:
        inputs: `model`, the folder of `export_med`; `pairs`; `images`.

    Raises:
        NothingToMeasure: no row of the split is in any of the subsets.
    """
    settings = read(Config, config, "evaluation")
    model = RankMed(inputs["model"], inputs["images"], settings.precision, work, world)
    pairs = Pairs.open(inputs["pairs"], inputs["images"])
    views = {subset: pairs.select(split=settings.split, subset=subset) for subset in settings.subsets}
    views = {subset: view for subset, view in views.items() if len(view)}
    if not views:
        found = sorted(set(pairs.select(split=settings.split).column("subset")) - {None})
        raise NothingToMeasure(
            f"evaluation.subsets: no rows of split '{settings.split}' in {', '.join(settings.subsets)}; "
            f"the table has {', '.join(found) or 'none of that split'}"
        )
    if world.is_first and settings.jars is None:
        log.info("evaluation: no METEOR and no SPICE; for these, give the folder of their jars as evaluation.jars")
    baseline = _NearestImage.among(pairs.select(split="train"), model, settings) if world.is_first else None
    metrics: dict[str, float] = {}
    retrieval_rows: list[dict[str, Any]] = []
    caption_rows: list[dict[str, Any]] = []
    for subset, view in views.items():
        scene = _Scene(model, settings, view, world)
        by_similarity, by_matching = scene.retrieve()
        beam, nucleus = scene.caption(settings.beam), scene.caption(settings.nucleus)
        if world.is_first:
            measured, predictions = _measure_captions(scene, beam, nucleus, baseline)
            measured |= _measure_retrieval(scene.gallery, by_similarity, by_matching)
            metrics |= {f"{name}/{subset}": value for name, value in measured.items()}
            caption_rows += [{"subset": subset, **row} for row in predictions]
            retrieval_rows += [{"subset": subset, **row} for row in _answers(scene, by_similarity, by_matching)]
            log.info(
                "evaluation: %-8s %5d rows   R@5 image to text %.3f, text to image %.3f   CIDEr %.3f",
                subset,
                len(view),
                *(measured[name] for name in ("i2t_r5", "t2i_r5", "cider")),
            )
    if world.is_first:
        _write(work / "out" / "predictions_retrieval.parquet", retrieval_rows)
        _write(work / "out" / "predictions_captions.parquet", caption_rows)
    return {"metrics": metrics, "rows": {subset: len(view) for subset, view in views.items()}}


class _Scene:
    """One subset as this rank sees it: its share of the images encoded, the features of all."""

    def __init__(self, model: RankMed, settings: Config, rows: Pairs, world: World):
        self.model, self.settings, self.rows, self.world = model, settings, rows, world
        self.gallery = Gallery.of(rows.image_ids, rows.text_ids)
        self.captions = rows.captions(np.arange(len(rows)))
        shares = np.array_split(np.arange(len(self.gallery.images)), world.ranks)
        self.mine = shares[world.rank]
        read_images = model.reader(rows)
        batches = np.array_split(self.mine, max(1, -(-len(self.mine) // settings.batch_images)))
        with model.autocast():
            self.image_mine_ND = scoring.encode_images(
                model.med, (torch.from_numpy(read_images(self.gallery.images[batch])) for batch in batches)
            )
            self.token_ids, self.token_mask = map(torch.from_numpy, model.tokenizer(self.captions, settings.max_tokens))
            texts = np.array_split(np.arange(len(rows)), world.ranks)[world.rank]
            text_mine_E = scoring.text_features(model.med, self.token_ids[texts], self.token_mask[texts])
            image_mine_E = scoring.image_features(model.med, self.image_mine_ND)
        self.image_IE, self.text_RE = self._gather(image_mine_E), self._gather(text_mine_E)

    def retrieve(self) -> tuple[Retrieval, Retrieval]:
        """By ITC alone, and re-ranked by ITM."""
        found = retrieve(self.image_IE @ self.text_RE.T, self.gallery, self.settings.candidates)
        return found, rerank(found, self.gallery, self._match)

    def caption(self, config: GenerationConfig) -> list[Written]:
        """Text and log-probability of every image, on every rank."""
        model, settings, written = self.model, self.settings, list[Written]()
        keys = self.rows.keys[self.gallery.images[self.mine]]
        draw_ids = torch.tensor([int(key[:15], 16) for key in keys], dtype=torch.int64)
        for start in range(0, len(self.mine), settings.batch_images):
            batch = slice(start, start + settings.batch_images)
            with model.autocast(), torch.no_grad():
                image = model.med.project_image(self.image_mine_ND[batch].to(self.world.device))
                captions: Captions = generate(
                    model.med,
                    image,
                    model.tokenizer,
                    config,
                    prompt=settings.prompt,
                    seed=settings.seed,
                    draw_ids=draw_ids[batch],
                )
            written += zip(captions.texts, captions.log_probability.tolist(), strict=True)
        return [caption for share in self.world.gather_objects(written) for caption in share]

    def _match(self, images_P: np.ndarray, rows_P: np.ndarray) -> Tensor:
        """Match logits (P,); each pair is scored by the rank that holds its image."""
        held = np.isin(images_P, self.mine)
        with self.model.autocast():
            logits = scoring.match_logits(
                self.model.med,
                self.image_mine_ND,
                self.token_ids,
                self.token_mask,
                np.searchsorted(self.mine, images_P[held]),
                rows_P[held],
            )
        match_P = torch.zeros(len(images_P))
        match_P[torch.from_numpy(held)] = logits[:, 1]
        return self.world.sum(match_P.to(self.world.device)).cpu()

    def _gather(self, features: Tensor) -> Tensor:
        return self.world.gather_ragged(features.to(self.world.device)).cpu()


class _NearestImage:
    """The baseline: an image gets the caption of the nearest training image.

    Nearest by the cosine of centred features that owe nothing to the training: the mean of the frozen stem's grid, or,
    where images are read as plain pixels, a thumbnail. Captions as the model saw them, noise included; of several
    captions of an image the first.
    """

    def __init__(self, train: Pairs, images_K: np.ndarray, model: RankMed, settings: Config):
        self.model, self.settings = model, settings
        self.captions, self.keys = train.captions(images_K), train.keys[images_K]
        features_KF = self._features(train, images_K)
        self.mean_F = features_KF.mean(0)
        self.features_KF = normalize(features_KF - self.mean_F, dim=1)

    @classmethod
    def among(cls, train: Pairs, model: RankMed, settings: Config) -> "_NearestImage | None":
        """Over the training images, or `baseline_images` of them drawn at random; None where there are none."""
        images_K, most = train.unique_images(), settings.baseline_images
        if not len(images_K) or not most:
            log.info("evaluation: no training images, so no baseline of the nearest one's caption")
            return None
        if len(images_K) > most:
            draw = np.random.default_rng(settings.seed)
            images_K = np.sort(draw.choice(images_K, most, replace=False))
        return cls(train, images_K, model, settings)

    def answer(self, view: Pairs, rows: np.ndarray) -> list[tuple[str, str]]:
        """Key and caption of the training image nearest to the image of each row."""
        features_IF = normalize(self._features(view, rows) - self.mean_F, dim=1)
        nearest = (features_IF @ self.features_KF.T).argmax(1).tolist()
        return [(self.keys[index], self.captions[index]) for index in nearest]

    def _features(self, view: Pairs, rows: np.ndarray) -> Tensor:
        read_images, size = self.model.reader(view), self.settings.batch_images
        batches = []
        for start in range(0, len(rows), size):
            images = torch.from_numpy(read_images(rows[start : start + size])).float()
            batches.append(images.mean(1) if images.ndim == 3 else adaptive_avg_pool2d(images, THUMBNAIL).flatten(1))
        return torch.cat(batches)


def _measure_retrieval(gallery: Gallery, by_similarity: Retrieval, by_matching: Retrieval) -> dict[str, float]:
    return (
        by_matching.recalls()
        | {f"{name}_itc": value for name, value in by_similarity.recalls().items()}
        | {f"chance_{name}": value for name, value in gallery.chance().items()}
    )


def _measure_captions(
    scene: _Scene, beam: list[Written], nucleus: list[Written], baseline: _NearestImage | None
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Measures of one subset, and a prediction per image."""
    settings, images = scene.settings, scene.gallery.images
    references: list[list[str]] = [[] for _ in images]
    for caption, image in zip(scene.captions, scene.gallery.image_of_row, strict=True):
        references[image].append(caption)
    keys = scene.rows.keys[images]
    predictions: list[dict[str, Any]] = [
        {"key": key, "references": captions} for key, captions in zip(keys, references, strict=True)
    ]
    metrics: dict[str, float] = {}
    samples = {}
    texts = {"": [text for text, _ in beam], "nucleus": [text for text, _ in nucleus]}
    if baseline:
        nearest = baseline.answer(scene.rows, images)
        texts["baseline"] = [caption for _, caption in nearest]
    for name, captions in texts.items():
        jars = Path(settings.jars) if settings.jars and not name else None
        scores = score_captions(captions, references, jars)
        exact = np.array([float(tokenise(c) in map(tokenise, r)) for c, r in zip(captions, references, strict=True)])
        samples[name] = scores.samples["cider"]
        for metric, value in (scores.corpus | {"exact": float(exact.mean())}).items():
            metrics[_named(metric, name)] = value
        for i, prediction in enumerate(predictions):
            prediction[name or "generated"] = captions[i]
            prediction |= {_named(metric, name): float(values[i]) for metric, values in scores.samples.items()}
    for i, prediction in enumerate(predictions):
        prediction["log_probability"] = beam[i][1]
        if baseline:
            prediction["baseline_key"] = nearest[i][0]
    if baseline:
        gain = bootstrap_difference(samples[""], samples["baseline"], settings.bootstrap_draws, seed=settings.seed)
        metrics |= {"cider_gain": gain.mean, "cider_gain_low": gain.low, "cider_gain_high": gain.high}
    return metrics, predictions


def _named(metric: str, of: str) -> str:
    """cider, cider_nucleus, baseline_cider."""
    return {"": metric, "nucleus": f"{metric}_nucleus", "baseline": f"baseline_{metric}"}[of]


def _answers(scene: _Scene, by_similarity: Retrieval, by_matching: Retrieval) -> list[dict[str, Any]]:
    """A prediction per query: each image among the rows, each row among the images."""
    keys, captions = scene.rows.keys, np.array(scene.captions, dtype=object)
    every_row, images = np.arange(len(captions)), scene.gallery.images
    predictions = []
    for way, asked, answering, found, by_itc in (
        ("i2t", images, every_row, by_matching.i2t, by_similarity.i2t),
        ("t2i", every_row, images, by_matching.t2i, by_similarity.t2i),
    ):
        for query, row in enumerate(asked):
            best = answering[found.candidates[query, :SHOWN_ANSWERS].numpy()]
            pairs = (row, best) if way == "i2t" else (best, row)
            predictions.append(
                {
                    "direction": way,
                    "key": keys[row],
                    "caption": captions[row],
                    "top_keys": keys[best].tolist(),
                    "top_captions": captions[best].tolist(),
                    "top_hits": scene.gallery.are_hits(*pairs).tolist(),
                    "top_scores": found.scores[query, :SHOWN_ANSWERS].tolist(),
                    "rank": int(found.ranks[query]) + 1,
                    "rank_itc": int(by_itc.ranks[query]) + 1,
                }
            )
    return predictions


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    with storage.writing(path) as temporary:
        pq.write_table(pa.Table.from_pylist(rows), temporary, compression="zstd")
