"""How well each sample went: the common form in which two models of any kind are compared.

Kept with a registered version, so that it can be compared with a later one when its data are no longer in place.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from blip_pipelines.data import storage
from blip_pipelines.data.storage import MANIFEST, StorageError
from blip_pipelines.evaluation.filtering import CLEAN
from blip_pipelines.evaluation.question_answering import ACCURACIES

JUDGED_RIGHT = 0.5  # match probability above which the filter calls a caption right


class Sample(NamedTuple):
    """What was asked: an image and, where one belongs to the question, a text."""

    key: str
    text: str = ""


Scores = dict[tuple[str, str], dict[Sample, float]]  # (metric, subset) -> sample -> score, higher is better


def scores_of(folder: Path) -> Scores:
    """Of the predictions that an evaluation left.

    Returns:
        `cider` per image, `i2t_r1`, `i2t_r5`, `t2i_r1` and `t2i_r5` per query, `accuracy` per question.

    Raises:
        StorageError: there are no predictions.
    """
    scores: Scores = {}
    found = [(reader, folder / f"predictions_{kind}.parquet") for kind, reader in READERS.items()]
    for reader, path in found:
        if path.exists():
            for row in pq.read_table(path).to_pylist():
                for metric, sample, value in reader(row):
                    scores.setdefault((metric, row["subset"]), {})[sample] = value
    if not scores:
        raise StorageError(f"{folder}: no predictions in it; run the stage that measures this model")
    return scores


def _caption(row: Mapping[str, Any]) -> list[tuple[str, Sample, float]]:
    return [("cider", Sample(row["key"]), row["cider"])]


def _query(row: Mapping[str, Any]) -> list[tuple[str, Sample, float]]:
    sample = Sample(row["key"], "" if row["direction"] == "i2t" else row["caption"])
    return [(f"{row['direction']}_r{k}", sample, float(row["rank"] <= k)) for k in (1, 5)]


def _answer(row: Mapping[str, Any]) -> list[tuple[str, Sample, float]]:
    if row["metric"] not in ACCURACIES:
        return []
    return [("accuracy", Sample(row["key"], f"{row['data_set']}: {row['instruction']}"), row["score"])]


READERS: dict[str, Callable[[Mapping[str, Any]], list[tuple[str, Sample, float]]]] = {
    "captions": _caption,
    "retrieval": _query,
    "answers": _answer,
}


def scores_of_filter(decided: Path, noise: Path) -> Scores:
    """`right` per web caption whose truth is known: was it told right from wrong? Subsets are the kinds of noise.

    Args:
        decided: judged captions of a round of CapFilt; noise: the evaluator's side file.
    """
    known = {(row["key"], row["caption"]): row["kind"] for row in pq.read_table(noise).to_pylist()}
    scores: Scores = {}
    for entry in storage.read_json(decided / MANIFEST)["shards"]:
        columns = ["key", "caption", "origin", "match_probability"]
        for row in pq.read_table(decided / entry["name"], columns=columns).to_pylist():
            kind = known.get((row["key"], row["caption"]))
            if row["origin"] == "web" and kind is not None:
                right = (row["match_probability"] >= JUDGED_RIGHT) == (kind == CLEAN)
                scores.setdefault(("right", kind), {})[Sample(row["key"], row["caption"])] = float(right)
    return scores


def write_scores(path: Path, scores: Scores) -> None:
    """A row a score: metric, subset, key, text, score."""
    rows = [
        {"metric": metric, "subset": subset, "key": sample.key, "text": sample.text, "score": value}
        for (metric, subset), samples in sorted(scores.items())
        for sample, value in sorted(samples.items())
    ]
    with storage.writing(path) as temporary:
        pq.write_table(pa.Table.from_pylist(rows, SCHEMA), temporary, compression="zstd")


def read_scores(path: Path) -> Scores:
    scores: Scores = {}
    for row in pq.read_table(path).to_pylist():
        scores.setdefault((row["metric"], row["subset"]), {})[Sample(row["key"], row["text"])] = row["score"]
    return scores


SCHEMA = pa.schema([(name, pa.string()) for name in ("metric", "subset", "key", "text")] + [("score", pa.float64())])
