"""What the report shows of slices: how well each stage does by source, category and length of the caption."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from blip_pipelines.data.storage import StorageError
from blip_pipelines.evaluation.bootstrap import bootstrap_difference
from blip_pipelines.evaluation.evidence import Evidence, in_order
from blip_pipelines.evaluation.page import Html, note, percent, plain, table, tag
from blip_pipelines.evaluation.scores import Sample, Scores, scores_of
from blip_pipelines.evaluation.slices import WAYS, rows_of, slice_order, sliced

METRICS: dict[str, tuple[str, Callable[[float], str]]] = {
    "cider": ("CIDEr-D", plain),
    "i2t_r1": ("i2t R@1", percent),
    "t2i_r1": ("t2i R@1", percent),
    "accuracy": ("right answers", percent),
}
DRAWS = 1000


def slice_tables(evidence: Evidence) -> Html:
    """Each stage that was measured sample by sample, over all its evaluation subsets together."""
    parts: list[Html] = []
    for kind, folders in (("", evidence.predictions), (", questions", evidence.answers)):
        for stage in in_order(folders):
            tables = _tables(folders[stage], evidence.pairs)
            if tables:
                parts += [tag("details", tag("summary", f"{stage}{kind}"), tables)]
    lead = note(
        "Means over the held-out samples of all subsets together, their 95 % bootstrap intervals, and how many samples "
        "they are of. A slice of few samples says little."
    )
    return tag("div", lead, parts) if parts else note("Nothing was measured sample by sample by this run.")


def _tables(folder: Path, pairs: Path) -> list[Html]:
    """A table for each way of slicing that tells samples apart."""
    try:
        scores = scores_of(folder)
    except StorageError:
        return []
    scores = {name: samples for name, samples in scores.items() if name[0] in METRICS}
    rows, found = list(rows_of(scores, pairs)), []
    for by in WAYS:
        by_slice = sliced(scores, by, rows)
        names = sorted({name for _, name in by_slice}, key=slice_order)
        if len(names) > 1:
            metrics = [metric for metric in METRICS if any(metric == found_in for found_in, _ in by_slice)]
            heads = [head for metric in metrics for head in (METRICS[metric][0], "95 %", "samples")]
            cells = [[name, *(cell for metric in metrics for cell in _cells(by_slice, metric, name))] for name in names]
            found.append(table([by, *heads], cells))
    return found


def _cells(by_slice: Scores, metric: str, name: str) -> list[str]:
    """Mean, interval and count."""
    samples: Mapping[Sample, float] = by_slice.get((metric, name), {})
    if not samples:
        return ["", "", "0"]
    values_S = np.array([samples[sample] for sample in sorted(samples)])
    mean = bootstrap_difference(values_S, np.zeros_like(values_S), DRAWS)
    write = METRICS[metric][1]
    low = write(mean.low).removesuffix(" %")
    return [write(mean.mean), f"{low} to {write(mean.high)}", f"{len(samples):,}"]
