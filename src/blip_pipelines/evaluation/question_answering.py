"""How right an answer is: the metrics of the question data sets, each by its name.

A metric gives every row a score in [0, 1] (CIDEr: on its own scale), so that two models are compared row by row; the
area under the ROC curve is of a data set as a whole. Multiple-choice metrics look at the scores of the candidates.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from blip_pipelines.evaluation.captioning import score_captions
from blip_pipelines.evaluation.filtering import roc_auc
from blip_pipelines.evaluation.vqa_normalisation import normalise, normalise_punctuation, one_line

FEW = 4  # annotators: with fewer, leaving one out no longer tells right from wrong


class Answered(NamedTuple):
    """One row with what a model said.

    Attributes:
        text: the answer.
        references: of the annotators, not empty.
        candidates: what could be answered; None where anything could.
        scores: (C,) of the candidates, higher is likelier; None where the answer was written freely.
    """

    text: str
    references: Sequence[str]
    candidates: Sequence[str] | None = None
    scores: np.ndarray | None = None


class Measured(NamedTuple):
    """A metric over rows: `samples` (S,) float64, their mean is `value`; None of a metric that has no value a row."""

    value: float
    samples: np.ndarray | None


def vqa_accuracy(text: str, references: Sequence[str]) -> float:
    """The official VQA accuracy: of each annotator, min(1, others who said the same / 3), averaged.

    References are cleaned of punctuation only where they are not all the same, as upstream does. Differs: where fewer
    than four annotators answered, for which the official data have no case, an answer that one of them gave is right.
    """
    wanted, said = [one_line(reference) for reference in references], normalise(text)
    if len(wanted) < FEW:
        return exact_match(text, references)
    if len(set(wanted)) > 1:
        wanted = [normalise_punctuation(reference) for reference in wanted]
    matches = sum(reference == said for reference in wanted)
    others = [matches - (reference == said) for reference in wanted]
    return float(np.mean([min(1.0, count / 3) for count in others]))


def ivqa_accuracy(text: str, references: Sequence[str]) -> float:
    """min(1, annotators who said the same / 2), of iVQA's five."""
    said = _normal(text)
    return min(1.0, sum(_normal(reference) == said for reference in references) / 2)


def exact_match(text: str, references: Sequence[str]) -> float:
    """1 where the answer is one of the references, but for what `normalise` takes away."""
    said = _normal(text)
    return float(any(_normal(reference) == said for reference in references))


def _normal(text: str) -> str:
    """An answer of which nothing would be left, such as the option "a", stays as it is."""
    return normalise(text) or one_line(text).lower()


def reciprocal_rank(row: Answered) -> float:
    """1 / place of the best reference among the candidates; candidates of equal score stand before it.

    Raises:
        ValueError: the row has no scored candidates, or the reference is none of them.
    """
    candidates, scores = _scored(row)
    right = [index for index, candidate in enumerate(candidates) if exact_match(candidate, row.references)]
    if not right:
        raise ValueError(f"none of {len(candidates)} candidates is the reference {row.references[0]!r}")
    best = max(scores[index] for index in right)
    ahead = sum(score >= best for index, score in enumerate(scores) if index not in right)
    return 1.0 / (1 + ahead)


def area_under_roc(rows: Sequence[Answered]) -> float:
    """Of telling the rows whose answer is the first candidate from the rest, by its score less the best other's.

    Raises:
        ValueError: a row has no scored candidates, or all rows have one answer.
    """
    margins: dict[bool, list[float]] = {True: [], False: []}
    for row in rows:
        candidates, scores = _scored(row)
        margins[bool(exact_match(candidates[0], row.references))].append(scores[0] - max(scores[1:]))
    if not all(margins.values()):
        raise ValueError("all rows have one answer, so there is nothing to tell apart")
    return roc_auc(np.array(margins[True]), np.array(margins[False]))


def _scored(row: Answered) -> tuple[Sequence[str], list[float]]:
    if row.candidates is None or row.scores is None or len(row.candidates) < 2:
        raise ValueError("this metric ranks candidates: the row has none, or they were not scored")
    return row.candidates, [float(score) for score in row.scores]


def _by_row(score: Callable[[Answered], float]) -> Callable[[Sequence[Answered]], Measured]:
    def measure(rows: Sequence[Answered]) -> Measured:
        samples = np.array([score(row) for row in rows], np.float64)
        return Measured(float(samples.mean()), samples)

    return measure


def _cider(rows: Sequence[Answered]) -> Measured:
    scores = score_captions([row.text for row in rows], [row.references for row in rows])
    return Measured(scores.corpus["cider"], scores.samples["cider"])


METRICS: Mapping[str, Callable[[Sequence[Answered]], Measured]] = {
    "vqa_accuracy": _by_row(lambda row: vqa_accuracy(row.text, row.references)),
    "ivqa_accuracy": _by_row(lambda row: ivqa_accuracy(row.text, row.references)),
    "exact_match": _by_row(lambda row: exact_match(row.text, row.references)),
    "top1": _by_row(lambda row: exact_match(row.text, row.references)),  # `text` is the best candidate
    "mrr": _by_row(reciprocal_rank),
    "auc": lambda rows: Measured(area_under_roc(rows), None),
    "cider": _cider,
}
ACCURACIES = ("vqa_accuracy", "ivqa_accuracy", "exact_match", "top1")  # metrics whose rows may be pooled
