"""What a model answered to rows of an instruction table: scores by data set, pooled, and against one answer for all.

The baseline of a held-in data set is the answer that most of its training rows have. Nobody has seen a training row of
a held-out one; its baseline is the best that any one answer can do on the very rows that are measured, which no honest
guess can beat. Where every row has candidates of its own, the answer is a place among them instead, chosen likewise.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from blip_pipelines.data import storage
from blip_pipelines.data.instructions import DataSet, Instructions
from blip_pipelines.evaluation.bootstrap import Difference, bootstrap_difference
from blip_pipelines.evaluation.question_answering import ACCURACIES, METRICS, Answered

PREDICTIONS = "predictions_answers.parquet"
ROLES = ("held_in", "held_out")

ANSWER_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),  # of the image
        pa.field("sample", pa.string(), nullable=False),
        pa.field("data_set", pa.string(), nullable=False),
        pa.field("task", pa.string(), nullable=False),
        pa.field("subset", pa.string(), nullable=False),  # held_in | held_out: what models are compared on
        pa.field("instruction", pa.string(), nullable=False),
        pa.field("answer", pa.string(), nullable=False),  # the likeliest reference
        pa.field("references", pa.list_(pa.string()), nullable=False),
        pa.field("candidates", pa.list_(pa.string())),  # the row's own
        pa.field("prediction", pa.string(), nullable=False),
        pa.field("metric", pa.string(), nullable=False),
        pa.field("score", pa.float64()),  # null of a metric that has no value a row
        pa.field("majority_score", pa.float64()),  # of the one answer; null where it is not judged by accuracy
    ]
)


class AnswerMetrics(NamedTuple):
    """`values` is flat: `<metric>/<data set>`, `majority/<data set>`, `accuracy/<role>`, `majority/<role>`,
    `accuracy_gain/<role>` over the majority with `_low` and `_high`, `rows/<data set>`; `rows` is of `ANSWER_SCHEMA`.
    """

    values: dict[str, float]
    rows: pa.Table


def measure_answers(
    asked: Instructions,
    texts: Sequence[str],
    scores: Sequence[np.ndarray | None],
    draws: int = 10_000,
    seed: int = 0,
) -> AnswerMetrics:
    """Score a model's answers.

    Args:
        asked: the rows, of an evaluation split; texts: (rows) what was answered.
        scores: (rows) of each row's candidates, in their order; None where the answer was written freely.
        draws, seed: of the bootstrap of the gain over the one answer.

    Raises:
        ValueError: a metric cannot be had of these rows; names the data set.
    """
    every = np.arange(len(asked))
    columns = {name: asked.values(name, every) for name in ("key", "sample", "data_set", "task", "role", "answer")}
    columns |= {"subset": columns.pop("role"), "instruction": asked.instructions(every)}
    columns |= {"references": asked.references(every), "candidates": asked.values("candidates", every)}
    common, candidates = asked.data_sets, asked.candidates(every)
    score, constant = np.full(len(asked), np.nan), np.full(len(asked), np.nan)
    names = np.array(columns["data_set"], dtype=object)
    values: dict[str, float] = {}
    for name in sorted(set(columns["data_set"])):
        data_set, rows = common[name], np.flatnonzero(names == name).tolist()
        answered = [Answered(texts[r], columns["references"][r], candidates[r], scores[r]) for r in rows]
        try:
            measured = METRICS[data_set.metric](answered)
        except ValueError as error:
            raise ValueError(f"{name}, {data_set.metric}: {error}") from error
        values[f"{data_set.metric}/{name}"], values[f"rows/{name}"] = measured.value, float(len(rows))
        if measured.samples is not None:
            score[rows] = measured.samples
        if data_set.metric in ACCURACIES:
            guesses = _one_answer(
                data_set, [columns["answer"][r] for r in rows], [columns["candidates"][r] for r in rows]
            )
            guessed = [Answered(guess, row.references) for guess, row in zip(guesses, answered, strict=True)]
            measured = METRICS[data_set.metric](guessed)
            values[f"majority/{name}"] = measured.value
            assert measured.samples is not None
            constant[rows] = measured.samples
    is_accuracy = ~np.isnan(constant)
    for role in ROLES:
        pooled = is_accuracy & (np.array(columns["subset"]) == role)
        if pooled.any():
            gain = bootstrap_difference(score[pooled], constant[pooled], draws, seed=seed)
            values |= {
                f"accuracy/{role}": float(score[pooled].mean()),
                f"majority/{role}": float(constant[pooled].mean()),
            }
            values |= named("accuracy_gain", role, gain)
    columns |= {"prediction": list(texts), "metric": [common[name].metric for name in names]}
    columns |= {"score": _nulls(score), "majority_score": _nulls(constant)}
    return AnswerMetrics(
        values, pa.table({field.name: pa.array(columns[field.name], field.type) for field in ANSWER_SCHEMA})
    )


def write_answers(folder: Path, rows: pa.Table) -> None:
    """`predictions_answers.parquet`, which `compare_answers`, the report and the gate read."""
    with storage.writing(folder / PREDICTIONS) as temporary:
        pq.write_table(rows.cast(ANSWER_SCHEMA), temporary, compression="zstd")


def compare_answers(new: Path, old: Path, draws: int = 10_000, seed: int = 0) -> dict[str, Difference]:
    """Mean difference of two models' scores on the same rows, with its 95 % bootstrap interval.

    Returns:
        By name of a data set; and, of all that are judged by accuracy, by role: `held_in`, `held_out`.

    Raises:
        ValueError: they were asked other things.
    """
    mine, theirs = (pq.read_table(folder / PREDICTIONS, schema=ANSWER_SCHEMA).to_pylist() for folder in (new, old))
    asked = [{(row["data_set"], row["sample"], row["instruction"]): row for row in rows} for rows in (mine, theirs)]
    if asked[0].keys() != asked[1].keys():
        raise ValueError(f"{new} and {old} answer other questions; evaluate both on the same rows")
    groups: dict[str, list[Any]] = {}
    for question, row in asked[0].items():
        if row["score"] is not None:
            groups.setdefault(row["data_set"], []).append(question)
            if row["metric"] in ACCURACIES:
                groups.setdefault(row["subset"], []).append(question)
    found = {}
    for name, questions in sorted(groups.items()):
        new_S, old_S = (np.array([rows[question]["score"] for question in sorted(questions)]) for rows in asked)
        found[name] = bootstrap_difference(new_S, old_S, draws, seed=seed)
    return found


def named(metric: str, of: str, difference: Difference) -> dict[str, float]:
    """A difference as flat numbers."""
    return {
        f"{metric}/{of}": difference.mean,
        f"{metric}_low/{of}": difference.low,
        f"{metric}_high/{of}": difference.high,
    }


def _one_answer(data_set: DataSet, answers: Sequence[str], candidates: Sequence[Sequence[str] | None]) -> list[str]:
    """What each row is answered by whoever does not look at it."""
    if candidates[0] is not None:
        own = [list(texts or []) for texts in candidates]
        places = [texts.index(answer) for texts, answer in zip(own, answers, strict=True) if answer in texts]
        place = Counter(places).most_common(1)[0][0] if places else 0
        return [texts[min(place, len(texts) - 1)] for texts in own]
    if data_set.role == "held_in" and data_set.majority is not None:
        return [data_set.majority] * len(answers)
    return [Counter(answers).most_common(1)[0][0]] * len(answers)


def _nulls(values: np.ndarray) -> list[float | None]:
    return [None if np.isnan(value) else float(value) for value in values]
