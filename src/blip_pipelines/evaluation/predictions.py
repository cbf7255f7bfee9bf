"""Measures of held-out rows, and what they are measures of: one row a query, one row a captioned image.

Retrieval is reported re-ranked by ITM (`i2t_r5`) and by ITC alone (`i2t_r5_itc`), beside the chance of a random order;
captions by beam search (`cider`) and by nucleus sampling (`cider_nucleus`), beside the caption of the nearest training
image (`baseline_cider`).
"""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from blip_pipelines.data import storage
from blip_pipelines.evaluation.bootstrap import bootstrap_difference
from blip_pipelines.evaluation.captioning import score_captions, tokenise
from blip_pipelines.evaluation.held_out import HeldOut
from blip_pipelines.evaluation.nearest import NearestImage
from blip_pipelines.evaluation.retrieval import Retrieval

ATTENTION = "attention.parquet"  # beside the predictions of a Q-Former: where its queries look
SHOWN_ANSWERS = 5  # of a query, kept in the predictions
Written = tuple[str, float]  # a caption and its log-probability


class Predictions:
    """Filled subset by subset.

    Args:
        nearest: the baseline of the captions, if there is one.
        draws, seed: of the bootstrap of the gain over it.
        jars: folder with the Java programs of METEOR and SPICE, if these are wanted.

    Attributes:
        metrics: flat, `<metric>/<subset>`.
    """

    def __init__(self, nearest: NearestImage | None, draws: int, seed: int, jars: str | None = None):
        self.nearest, self.draws, self.seed = nearest, draws, seed
        self.jars = Path(jars) if jars else None
        self.metrics: dict[str, float] = {}
        self._rows: dict[str, list[dict[str, Any]]] = {}

    def add_captions(self, scene: HeldOut, beam: list[Written], nucleus: list[Written] | None = None) -> None:
        """Of each image of the subset."""
        references = scene.references
        rows: list[dict[str, Any]] = [
            {"subset": scene.subset, "key": key, "references": captions}
            for key, captions in zip(scene.keys, references, strict=True)
        ]
        texts = {"": [text for text, _ in beam]}
        if nucleus is not None:
            texts["nucleus"] = [text for text, _ in nucleus]
        if self.nearest:
            nearest = self.nearest.answer(scene.rows, scene.gallery.images)
            texts["baseline"] = [caption for _, caption in nearest]
        metrics: dict[str, float] = {}
        ciders = {}
        for how, captions in texts.items():
            scores = score_captions(captions, references, None if how else self.jars)
            exact = [tokenise(c) in map(tokenise, r) for c, r in zip(captions, references, strict=True)]
            ciders[how] = scores.samples["cider"]
            for metric, value in (scores.corpus | {"exact": float(np.mean(exact))}).items():
                metrics[_named(metric, how)] = value
            for i, row in enumerate(rows):
                row[how or "generated"] = captions[i]
                row |= {_named(metric, how): float(values[i]) for metric, values in scores.samples.items()}
        for i, row in enumerate(rows):
            row["log_probability"] = beam[i][1]
            if self.nearest:
                row["baseline_key"] = nearest[i][0]
        if self.nearest:
            gain = bootstrap_difference(ciders[""], ciders["baseline"], self.draws, seed=self.seed)
            metrics |= {"cider_gain": gain.mean, "cider_gain_low": gain.low, "cider_gain_high": gain.high}
        self._add(scene.subset, "captions", metrics, rows)

    def add_retrieval(self, scene: HeldOut, by_similarity: Retrieval, by_matching: Retrieval) -> None:
        """Of each image among the rows and each row among the images."""
        metrics = (
            by_matching.recalls()
            | {f"{name}_itc": value for name, value in by_similarity.recalls().items()}
            | {f"chance_{name}": value for name, value in scene.gallery.chance().items()}
        )
        self._add(scene.subset, "retrieval", metrics, list(_answers(scene, by_similarity, by_matching)))

    def write(self, folder: Path) -> None:
        """`predictions_retrieval.parquet`, `predictions_captions.parquet`: those of which there are rows."""
        for kind, rows in self._rows.items():
            with storage.writing(folder / f"predictions_{kind}.parquet") as temporary:
                pq.write_table(pa.Table.from_pylist(rows), temporary, compression="zstd")

    def _add(self, subset: str, kind: str, metrics: dict[str, float], rows: list[dict[str, Any]]) -> None:
        self.metrics |= {f"{name}/{subset}": value for name, value in metrics.items()}
        self._rows.setdefault(kind, []).extend(rows)


def _named(metric: str, how: str) -> str:
    """cider, cider_nucleus, baseline_cider."""
    return {"": metric, "nucleus": f"{metric}_nucleus", "baseline": f"baseline_{metric}"}[how]


def _answers(scene: HeldOut, by_similarity: Retrieval, by_matching: Retrieval) -> list[dict[str, Any]]:
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
                    "subset": scene.subset,
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
